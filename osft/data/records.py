"""Reading and validating raw data, one record after another, of any format (`osft.data.rows`).

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"messages": […], "choices": ["yes", "no"]}     a task whose answer is one of a few
    {"text": "…"}                                   plain text, for evaluation

Other forms of chats become `messages` (`osft.data.record_forms`, `osft.data.messages`). A chat may have `tools` (a list
of JSON schemas) and `"unmask": true` (loss on every message but the system's). The keys of `ABOUT_THE_RECORD` are
ignored and counted. Any other key is a variable for the chat template, as `chat_template_kwargs` are, and is refused
where the template does not read it: nothing that a record says is dropped in silence.

Every error names the file and the line.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osft.data import files
from osft.data.files import DataError
from osft.data.json_rows import parse_line
from osft.data.messages import function_name, read_message, unrolled, without_foreign_nulls, without_nulls
from osft.data.record_forms import decoded, to_messages
from osft.data.rows import read_file

__all__ = ["DataError", "Record", "parse_record", "read_records", "report_lines"]

ABOUT_THE_RECORD = frozenset(
    {
        *("id", "uuid", "uid", "idx", "index", "__index_level_0__", "hash", "prompt_id", "conversation_id"),
        *("source", "dataset", "group", "split", "url", "license", "model", "model_name", "created_at", "timestamp"),
        *("category", "topic", "language", "metadata", "meta", "parallel_tool_calls"),
    }
)
"""Keys that say where a record is from and how it is called, never what is said in it. `parallel_tool_calls` is an
option of OpenAI's service that changes no text. What else describes a record belongs below `metadata`."""

_RESERVED = frozenset(
    {
        *("messages", "tools", "conversation", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
        *("return_assistant_tokens_mask", "sanitize_control_tokens", "bos_token", "eos_token", "pad_token"),
        *("unk_token", "sep_token", "cls_token", "mask_token", "raise_exception", "strftime_now", "namespace", "dict"),
    }
)
"""Parameters of the call that renders a chat, and what transformers gives every template: a record sets neither."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One validated record."""

    source: str
    """`file:line` or `file: row n`."""
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
        learn = self.learn or (None,) * len(self.messages)
        record: dict[str, Any] = {
            "messages": [
                message if train is None else message | {"train": train}
                for message, train in zip(self.messages, learn, strict=True)
            ]
        }
        if self.tools:
            record["tools"] = list(self.tools)
        if self.unmask:
            record["unmask"] = True
        if self.choices:
            record["choices"] = list(self.choices)
        return record | self.extra

    @property
    def content_hash(self) -> str:
        """Equal for records that say the same, whatever file they are in."""
        return _hash(self.to_dict())

    @property
    def prompt_hash(self) -> str:
        """Equal for records that ask the same, whatever the answer: they belong to one side of a split."""
        return _hash([m for m in self.messages if m["role"] != "assistant"] or self.text)


def read_records(uri: str, *, allow_text: bool = False, counts: Counter[str] | None = None) -> Iterator[Record]:
    """All records of a data path (`osft.data.files.data_files`), validated.

    `allow_text` admits plain-text records. To `counts` is added how many records were converted from what, and had
    which key that is ignored.

    Raises FileNotFoundError for a missing path, and DataError at the first bad record or for a file without one.
    """
    for file in files.data_files(uri):
        yield from read_records_of(file, allow_text=allow_text, counts=counts)


def read_records_of(file: Path, *, allow_text: bool = False, counts: Counter[str] | None = None) -> Iterator[Record]:
    """As `read_records`, of one file."""
    counts = Counter() if counts is None else counts
    for source, row in read_file(file):
        yield _to_record(row, source, counts, allow_text=allow_text)


def parse_record(line: str, source: str, *, allow_text: bool = False) -> Record:
    """Validate one JSON line. Raises DataError that names `source`."""
    return _to_record(parse_line(line, source), source, Counter(), allow_text=allow_text)


def report_lines(counts: Mapping[str, int]) -> list[str]:
    """What `read_records` counted, for people: `120 records converted from ShareGPT`."""
    return [f"{number} {'record' if number == 1 else 'records'}: {what}" for what, number in sorted(counts.items())]


def _to_record(row: dict[str, Any], source: str, counts: Counter[str], *, allow_text: bool) -> Record:
    def refuse(problem: str) -> DataError:
        return DataError(f"{source}: {problem}")

    value = decoded(row, source, counts)
    if allow_text and not value.keys() - {"text"} - ABOUT_THE_RECORD and isinstance(value.get("text"), str):
        if not value["text"].strip():
            raise refuse("a record needs 'messages' or a non-empty 'text'; its text is empty. Drop the line")
        _ignore(value, counts)
        return Record(source=source, text=value["text"])

    value = to_messages(value, source, counts)
    read = [
        read_message(message, f"{source}: messages[{position}]", counts)
        for position, message in enumerate(value.pop("messages"))
    ]
    learn = tuple(train for _, train in read)
    messages, holds_chats = unrolled([message for message, _ in read], source)
    if holds_chats:
        counts["chats taken out of InstructLab's pretraining messages"] += 1
        if any(train is not None for train in learn):
            raise refuse(
                "'weight' and 'train' do not go with a pretraining message, which has a loss on all. Drop them"
            )
        learn = ()
    _check_something_to_learn(messages, learn, source)

    choices = value.pop("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise refuse(f"'choices' must be a list of non-empty strings; got {choices!r}")
    if choices and (messages[-1]["role"] != "assistant" or messages[-1]["content"] not in choices):
        raise refuse(f"the last message must be the assistant's and one of the choices {choices!r}")
    tools = value.pop("tools", None) or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and function_name(tool) for tool in tools):
        raise refuse(f"'tools' must be a list of JSON schemas of functions, each with a name; got {tools!r:.200}")
    written = (tools, messages)
    tools = without_nulls(tools)
    messages = without_foreign_nulls(messages, tools)
    if written != (tools, messages):
        counts["nulls that Arrow added to calls or tools left out"] += 1
    unmask = value.pop("unmask", None) or False
    if not isinstance(unmask, bool):
        raise refuse(f"'unmask' must be true or false; got {unmask!r}")
    _ignore(value, counts)
    return Record(
        source=source,
        messages=tuple(messages),
        choices=tuple(choices),
        tools=tuple(tools),
        unmask=unmask or holds_chats,
        learn=learn if any(train is not None for train in learn) else (),
        extra=_variables(value, source),
    )


def _check_something_to_learn(messages: list[dict[str, Any]], learn: tuple[bool | None, ...], source: str) -> None:
    spoken = [m["role"] in ("assistant", "pretraining") and (m["content"].strip() or len(m) > 2) for m in messages]
    if not any(spoken) and True not in learn:
        raise DataError(
            f"{source}: there is no assistant message with text, so there is nothing to learn. Add one or drop the line"
        )
    if learn and not any(train or (train is None and text) for train, text in zip(learn, spoken, strict=True)):
        raise DataError(
            f"{source}: 'weight' or 'train' turns the loss of every assistant's message off, so there is nothing to "
            "learn. Turn one on or drop the line"
        )


def _ignore(value: dict[str, Any], counts: Counter[str]) -> None:
    for key in value.keys() & ABOUT_THE_RECORD:
        del value[key]
        counts[f"key {key!r} ignored"] += 1


def _variables(value: dict[str, Any], source: str) -> dict[str, Any]:
    """What is left of a record: variables for its chat template."""
    given = value.pop("chat_template_kwargs", None) or {}
    if not isinstance(given, dict):
        raise DataError(f"{source}: 'chat_template_kwargs' must be an object; got {given!r:.80}")
    for key in value.keys() & given.keys():
        if value[key] != given[key]:
            raise DataError(f"{source}: {key!r} and chat_template_kwargs.{key} differ. Keep one of them")
    found = {key: part for key, part in (value | given).items() if part not in (None, "", [], {})}
    for key, part in found.items():
        if key in _RESERVED:
            raise DataError(f"{source}: {key!r} is no variable of a chat template that a record can set. Remove it")
        try:
            json.dumps(part)
        except (TypeError, ValueError):
            problem = f"{key!r} is a {type(part).__name__}, which no chat template reads"
            raise DataError(f"{source}: {problem}. Remove it, or move it below 'metadata'") from None
    return found


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
