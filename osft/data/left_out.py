"""Messages that a chat template leaves out: what a user, a tool or the system said would be dropped in silence."""

import json
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from osft.data.records import DataError, Record

_CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def check_nothing_left_out(record: Record, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Raise DataError if the tokenizer's `template` renders nothing of a message that is not the assistant's."""
    shape = tuple((message["role"], "tool_calls" in message) for message in record.messages)
    given = json.dumps([record.tools, record.extra], sort_keys=True)
    for position in _left_out(tokenizer, template, shape, given):
        message = record.messages[position]
        if message["content"].strip():
            raise DataError(
                f"{record.source}: the model's chat template leaves messages[{position}] out, whose role is "
                f"{message['role']!r}. Remove the message, or use a template that renders it"
            )


@lru_cache(maxsize=1024)
def _left_out(
    tokenizer: PreTrainedTokenizerBase, template: str, shape: tuple[tuple[str, bool], ...], given: str
) -> tuple[int, ...]:
    """Positions of the messages that are not rendered in a chat of these roles and calls, the assistant's left aside.

    Chats of one shape are rendered alike, so that one in thousands is looked at. Empty where the template refuses the
    stand-in for a chat, of which nothing is known then.
    """
    tools, extra = json.loads(given)
    marks = [f"\ue000{position}\ue001" for position in range(len(shape))]
    messages: list[Any] = [
        {"role": role, "content": mark} | ({"tool_calls": [_CALL]} if calls else {})
        for (role, calls), mark in zip(shape, marks, strict=True)
    ]
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, chat_template=template, **extra
        )
    except (TemplateError, TypeError, ValueError):
        return ()
    return tuple(at for at, (role, _) in enumerate(shape) if role != "assistant" and marks[at] not in str(text))
