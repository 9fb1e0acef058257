"""Reading and validating raw data: JSON lines, one record a line.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"messages": […], "choices": ["yes", "no"]}     a task whose answer is one of a few
    {"text": "…"}                                   plain text, for evaluation

A chat may have `tools` (a list of JSON schemas) and `"unmask": true` (loss on every message but the system's). An
assistant's message may have `reasoning_content` and `tool_calls`, a tool's message `tool_call_id` and `name`; they
go to the chat template as they are. Other keys are left out.

Every error names the file and the line.
"""

import glob
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osft import storage

_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")

ROLES = ("system", "user", "assistant", "tool")


class DataError(ValueError):
    """A record that cannot be used; the message names its file and line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One validated record."""

    source: str
    """`file:line`."""
    messages: tuple[dict[str, Any], ...] = ()
    text: str = ""
    choices: tuple[str, ...] = ()
    """All possible answers, if the task is to choose; the last message is then one of them."""
    tools: tuple[dict[str, Any], ...] = ()
    """What the assistant may call, as the chat template wants it (JSON schemas of functions)."""
    unmask: bool = False
    """Loss on every message but the system's, not only on the assistant's."""
    learn: tuple[bool | None, ...] = ()
    """For each message, whether it has a loss; None where the record does not say. Empty if it says so of none."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template beside messages and tools, `documents` or `enable_thinking` for example."""

    def to_dict(self) -> dict[str, Any]:
        """The record as it is written in a JSON line; what is not there has no key."""
        if self.text:
            return {"text": self.text}
        record: dict[str, Any] = {"messages": list(self.messages)}
        if self.tools:
            record["tools"] = list(self.tools)
        if self.unmask:
            record["unmask"] = True
        return record | {"choices": list(self.choices)} if self.choices else record

    @property
    def content_hash(self) -> str:
        """Equal for records that say the same, whatever file they are in."""
        return _hash(self.to_dict())

    @property
    def prompt_hash(self) -> str:
        """Equal for records that ask the same, whatever the answer: they belong to one side of a split."""
        return _hash([m for m in self.messages if m["role"] != "assistant"] or self.text)


def data_files(uri: str) -> list[Path]:
    """The files of a data path or URI: a file, a glob, or a folder (its *.jsonl files).

    Raises FileNotFoundError if there is none.
    """
    path = storage.fetch(uri)
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise FileNotFoundError(f"data folder {uri} holds no .jsonl file")
        return files
    if path.is_file():
        return [path]
    files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    if not files:
        raise FileNotFoundError(f"data {uri} does not exist. Give a .jsonl file, a folder of them, or a glob")
    return files


def is_hub_dataset(uri: str) -> bool:
    """Whether a data path is the id of a Hugging Face data set, `org/name` or `org/name@revision`, and no file's."""
    return bool(_DATASET_ID.fullmatch(uri)) and not storage.is_remote(uri) and not Path(uri).exists()


def data_name(uri: str) -> str:
    """What the records of a data path are called: the file's or folder's name, the part after `example:`."""
    path = Path(uri.split(":", 1)[-1] if uri.startswith("example:") else uri)
    if any(character in path.name for character in "*?["):
        path = path.parent
    return path.stem or path.absolute().name


def check_names(uris: Sequence[str]) -> None:
    """Raise DataError unless the data paths have different names: results are told apart by them."""
    names = [data_name(uri) for uri in uris]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two data sets are called {name!r} ({', '.join(uris)}). Rename one of the files")


def read_json_lines(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """`file:line` and JSON object of each line that is not blank, of a file, folder or glob.

    Raises FileNotFoundError for a missing path and DataError at the first bad line, or if a file holds no line.
    """
    for file in data_files(uri):
        found, name = False, storage.name_of(file)
        with file.open(encoding="utf-8", errors="strict") as lines:
            try:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        found = True
                        yield f"{name}:{number}", _parse_object(line, f"{name}:{number}")
            except UnicodeDecodeError as error:
                raise DataError(f"{name} is not UTF-8 text: {error}") from None
        if not found:
            raise DataError(f"{name} holds no record: it is empty. Give at least one JSON line")


def read_records(uri: str, *, allow_text: bool = False) -> Iterator[Record]:
    """All records of a file, folder or glob, validated.

    `allow_text` admits plain-text records. Raises as `read_json_lines`.
    """
    for source, value in read_json_lines(uri):
        yield _to_record(value, source, allow_text=allow_text)


def parse_record(line: str, source: str, *, allow_text: bool = False) -> Record:
    """Validate one JSON line. Raises DataError that names `source`."""
    return _to_record(_parse_object(line, source), source, allow_text=allow_text)


def _parse_object(line: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"not valid JSON ({error.msg} at column {error.colno}): {line.strip()[:80]!r}"
        raise DataError(f"{source}: {problem}") from None
    if not isinstance(value, dict):
        raise DataError(f"{source}: a record must be a JSON object, this is a {type(value).__name__}")
    if "\\ud" in line.lower() and re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
        raise DataError(f"{source}: an escape \\ud800 … \\udfff stands alone, which is no character. Repair the text")
    return value


def _to_record(value: dict[str, Any], source: str, *, allow_text: bool) -> Record:
    def refuse(problem: str) -> DataError:
        return DataError(f"{source}: {problem}")

    if allow_text and "messages" not in value and isinstance(value.get("text"), str) and value["text"].strip():
        return Record(source=source, text=value["text"])

    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        keys = ", ".join(map(repr, value)) or "nothing"
        wanted = "a non-empty list 'messages' of {role, content}" + (" or a non-empty 'text'" if allow_text else "")
        raise refuse(f"a record needs {wanted}; this one has {keys}")
    kept = tuple(_message(message, f"{source}: messages[{position}]") for position, message in enumerate(messages))
    if not any(m["role"] == "assistant" and (m["content"].strip() or len(m) > 2) for m in kept):
        raise refuse("there is no assistant message with text, so there is nothing to learn. Add one or drop the line")

    choices = value.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise refuse(f"'choices' must be a list of non-empty strings; got {choices!r}")
    if choices and (kept[-1]["role"] != "assistant" or kept[-1]["content"] not in choices):
        raise refuse(f"the last message must be the assistant's and one of the choices {choices!r}")
    tools = value.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and _function_name(tool) for tool in tools):
        raise refuse(f"'tools' must be a list of JSON schemas of functions, each with a name; got {tools!r:.200}")
    unmask = value.get("unmask") or False
    if not isinstance(unmask, bool):
        raise refuse(f"'unmask' must be true or false; got {unmask!r}")
    return Record(source=source, messages=kept, choices=tuple(choices), tools=tuple(tools), unmask=unmask)


def _message(message: Any, place: str) -> dict[str, Any]:
    """The keys of a message that a chat template reads; `place` begins its errors."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise DataError(f"{place} needs a role out of {', '.join(ROLES)}; got {role!r}")
    role, content = message["role"], message.get("content")
    for key in ("reasoning_content", "tool_calls"):
        if message.get(key) and role != "assistant":
            raise DataError(f"{place} has {key!r}, but its role is {role!r}. Only an assistant's message may have it")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) and _function_name(call) for call in calls):
        problem = "'tool_calls' must be a list of objects with a 'function' that has a name"
        raise DataError(f"{place}: {problem}; got {calls!r:.200}")
    for call in calls:
        if not isinstance(call.get("function", call).get("arguments", {}), dict | str):
            raise DataError(f"{place}: the arguments of a tool call must be an object or a string; got {call!r:.200}")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{place} needs a string 'content'; got {content!r}")

    kept: dict[str, Any] = {"role": role, "content": content}
    optional = {"assistant": ("reasoning_content",), "tool": ("tool_call_id", "name")}
    for key in optional.get(role, ()):
        text = message.get(key)
        if text is not None and not isinstance(text, str):
            raise DataError(f"{place}: {key!r} must be a string; got {text!r:.200}")
        if text:
            kept[key] = text
    return kept | {"tool_calls": calls} if calls else kept


def _function_name(schema: dict[str, Any]) -> str:
    """The name of a tool or of a call, `{"function": {"name": …}}` or `{"name": …}`; empty where there is none."""
    function = schema.get("function", schema)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
