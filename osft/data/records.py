"""Reading and validating raw data: JSON lines, one record a line.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"messages": […], "choices": ["yes", "no"]}     a task whose answer is one of a few
    {"text": "…"}                                   plain text, for evaluation

Every error names the file and the line.
"""

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def to_dict(self) -> dict[str, Any]:
        """The record as it is written in a JSON line."""
        if self.text:
            return {"text": self.text}
        record: dict[str, Any] = {"messages": list(self.messages)}
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
    """The files of a data path: a file, a glob, or a folder (its *.jsonl files).

    Raises FileNotFoundError if there is none.
    """
    path = Path(uri)
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise FileNotFoundError(f"data folder {uri} holds no .jsonl file")
        return files
    if path.is_file():
        return [path]
    files = sorted(Path(match) for match in glob.glob(uri, recursive=True) if Path(match).is_file())
    if not files:
        raise FileNotFoundError(f"data {uri} does not exist. Give a .jsonl file, a folder of them, or a glob")
    return files


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


def read_records(uri: str, *, allow_text: bool = False) -> Iterator[Record]:
    """All records of a file, folder or glob, validated.

    `allow_text` admits plain-text records. Raises FileNotFoundError for a missing path and DataError at the
    first bad line, or if a file holds no record.
    """
    for file in data_files(uri):
        found = False
        with file.open(encoding="utf-8", errors="strict") as lines:
            try:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        found = True
                        yield parse_record(line, f"{file}:{number}", allow_text=allow_text)
            except UnicodeDecodeError as error:
                raise DataError(f"{file} is not UTF-8 text: {error}") from None
        if not found:
            raise DataError(f"{file} holds no record: it is empty. Give at least one JSON line")


def parse_record(line: str, source: str, *, allow_text: bool = False) -> Record:
    """Validate one JSON line. Raises DataError that names `source`."""

    def refuse(problem: str) -> DataError:
        return DataError(f"{source}: {problem}")

    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise refuse(f"not valid JSON ({error.msg} at column {error.colno}): {line.strip()[:80]!r}") from None
    if not isinstance(value, dict):
        raise refuse(f"a record must be a JSON object, this is a {type(value).__name__}")

    if allow_text and "messages" not in value and isinstance(value.get("text"), str) and value["text"].strip():
        return Record(source=source, text=value["text"])

    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        keys = ", ".join(map(repr, value)) or "nothing"
        wanted = "a non-empty list 'messages' of {role, content}" + (" or a non-empty 'text'" if allow_text else "")
        raise refuse(f"a record needs {wanted}; this one has {keys}")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise refuse(f"messages[{position}] needs a role out of {', '.join(ROLES)}; got {role!r}")
        if not isinstance(message.get("content"), str):
            raise refuse(f"messages[{position}] needs a string 'content'; got {message.get('content')!r}")
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise refuse("there is no assistant message with text, so there is nothing to learn. Add one or drop the line")

    choices = value.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise refuse(f"'choices' must be a list of non-empty strings; got {choices!r}")
    if choices and (messages[-1]["role"] != "assistant" or messages[-1]["content"] not in choices):
        raise refuse(f"the last message must be the assistant's and one of the choices {choices!r}")
    kept = tuple({"role": m["role"], "content": m["content"]} for m in messages)
    return Record(source=source, messages=kept, choices=tuple(choices))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
