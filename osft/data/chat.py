"""Chat template -> tokens and loss mask."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from osft.data.records import DataError, Record

IGNORE = -100
"""The label of a token without loss, as in PyTorch's cross entropy."""

SENTINEL = "\ue000\ue001\ue000"
"""Stands for a message's text in a second rendering. Characters of the private use area have no case, are no white
space and need no escape, so a template passes them on as they are."""

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError)
"""What a template raises for a chat that it does not want or was not written for."""

Span = tuple[int, int]
"""First character and the one after the last, in the rendered chat."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenized record. `labels[i]` is `input_ids[i]` where the token counts in the loss, else `IGNORE`."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that are predicted: the first one has nothing before it."""
        return sum(label != IGNORE for label in self.labels[1:])


def tokenize(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_text_tokens: int = 512,
    unmask_messages: bool = False,
) -> Sample:
    """Tokens of a record, with loss on the assistant's tokens, or on all of a plain text (cut to `max_text_tokens`).

    What {% generation %} markers in the template enclose counts. Without them an assistant's turn counts from where
    generation would begin (the role header is not in it, rendered reasoning and tool calls are) through the special
    token that closes it. With `unmask_messages`, or `unmask` in the record, the other messages count as well, except
    the system's: their content and the special token that closes it.

    Raises DataError if the tokenizer has no chat template, the template refuses the chat, or a message cannot be
    located exactly in what it renders.
    """
    if record.text:
        input_ids = tokenizer(record.text, truncation=True, max_length=max_text_tokens)["input_ids"]
        return Sample(input_ids, list(input_ids))
    if tokenizer.chat_template is None:
        raise DataError(
            f"{record.source}: the model's tokenizer has no chat template. Use a chat model, or set "
            "`tokenizer.chat_template` and save the tokenizer into the model folder"
        )
    chat = RenderedChat(record, tokenizer)
    unmask = unmask_messages or record.unmask
    learned = [
        position
        for position, message in enumerate(record.messages)
        if (not chat.is_marked if message["role"] == "assistant" else unmask and message["role"] != "system")
    ]
    input_ids, in_loss = chat.encode([chat.span(position) for position in learned])
    labels = [token if counted else IGNORE for token, counted in zip(input_ids, in_loss, strict=True)]
    sample = Sample(list(input_ids), labels)
    if sample.num_loss_tokens == 0:
        raise DataError(f"{record.source}: the chat template leaves no token to learn from")
    return sample


class RenderedChat:
    """A chat as its template renders it, and where each message lies in it.

    Templates rewrite: they strip or change the content, drop the reasoning of earlier turns, move tools and system
    texts into a user's turn. So a message's text is not searched for; the chat is rendered again with a sentinel in
    its place, and what stands before and after the sentinel also stands before and after the message.
    """

    def __init__(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> None:
        self._record = record
        self._messages = list(record.messages)
        self._tokenizer = tokenizer
        self._tools: Any = list(record.tools) or None
        template = tokenizer.get_chat_template(tools=self._tools)
        self.is_marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        """Whether the template says itself what the assistant generates."""
        try:
            self.text = self._render(self._messages)
        except TEMPLATE_ERRORS as error:
            raise _refused(record, error) from error

    def encode(self, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Tokens of the chat, and whether each has a character in one of the spans or is marked by the template."""
        encoded = self._tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        in_loss = np.zeros(len(starts), dtype=bool)
        for first, last in spans:
            in_loss |= (starts < last) & (ends > first)
        if self.is_marked:
            marked: Any = self._tokenizer.apply_chat_template(
                self._messages, tools=self._tools, return_dict=True, return_assistant_tokens_mask=True
            )
            in_loss |= np.array(marked["assistant_masks"], dtype=bool)
        return encoded["input_ids"], in_loss.tolist()

    def span(self, position: int) -> Span:
        """What counts of the message at `position`. Raises DataError if it cannot be located."""
        around = self._around(position)
        span = None
        if around and self._messages[position]["role"] == "assistant":
            start = self._generation_start(position, *around)
            end = self._generation_end(position, *around)
            span = None if start is None or end is None else (start, end)
        elif around and self.text.startswith(around[0]):
            end = len(self.text) - len(around[1])
            closing = self._special_tokens.match(self.text, end)
            if closing and not self._header.startswith(closing.group()):  # a turn may be left open
                end = closing.end()
            span = len(around[0]), end
        if span is None:
            raise DataError(
                f"{self._record.source}: messages[{position}] cannot be located in the rendered chat, because the "
                "model's chat template leaves it out, repeats it or depends on what it says. Change the message, or "
                "add {% generation %} markers to the template"
            )
        return span

    def _around(self, position: int) -> tuple[str, str] | None:
        """What is rendered before and after a message's content, or after the name of the last function it calls.

        The part after is the end of the chat's own rendering. The part before is its beginning, except for an
        assistant's message whose content itself holds reasoning, which templates cut out: there they agree as far
        as to the reasoning.
        """
        around = self._render_around(position, len(self._messages))
        if around and self.text.endswith(around[1]):
            exact = self.text.startswith(around[0]) and len(around[0]) + len(around[1]) <= len(self.text)
            if exact or self._messages[position]["role"] == "assistant":
                return around
        content = self._messages[position]["content"].strip()
        if content and self.text.count(content) == 1:  # the template decides by the content, but renders it as it is
            before, after = self.text.split(content)
            return before, after
        return None

    def _generation_start(self, position: int, before: str, after: str) -> int | None:
        """Where the assistant would begin to generate the message."""
        exact = self.text.startswith(before)
        content = len(before) if exact else _common_length(self.text[: len(self.text) - len(after)], before)
        prompt = self._prompt(position)
        if prompt and len(prompt) <= content and self.text.startswith(prompt):
            return len(prompt)
        # The template rewrites what is before the message. As the chat's last message it follows its prompt:
        last = self._render_around(position, position + 1)
        if exact and prompt and last and last[0].startswith(prompt) and before.endswith(last[0][len(prompt) :]):
            return len(before) - len(last[0]) + len(prompt)
        # The template rewrites the message itself when others follow: the header that asks for it remains.
        previous = self._around(position - 1) if position else ("", self.text)
        if self._header and previous:
            found = self.text.rfind(self._header, len(self.text) - len(previous[1]), content)
            if found >= 0:
                return found + len(self._header)
        return content if exact else None

    def _generation_end(self, position: int, before: str, after: str) -> int | None:
        """Where the assistant would stop, after the special token that closes the message."""
        end = len(self.text) - len(after)
        calls = "tool_calls" in self._messages[position]
        closing = None if calls else self._special_tokens.match(self.text, end)
        if closing:
            return closing.end()
        last = self._render_around(position, position + 1)
        if last:
            # As the chat's last message it ends with its closing token; another one may close it before others.
            tokens = list(self._special_tokens.finditer(last[1]))
            body = last[1][: tokens[-1].start()] if tokens else last[1].rstrip()
            closing = self._special_tokens.match(after, len(body))
            if after.startswith(body) and (closing or not tokens):
                return end + (closing.end() if closing else len(body))
        return None if calls else end

    def _render_around(self, position: int, length: int) -> tuple[str, str] | None:
        """The first `length` messages, rendered and divided at the sentinel; None if it is not there once."""
        message = dict(self._messages[position])
        if "tool_calls" in message:
            *others, call = message["tool_calls"]
            function = call.get("function", call) | {"name": SENTINEL}
            message["tool_calls"] = [*others, call | {"function": function} if "function" in call else function]
        else:
            message["content"] = SENTINEL
        try:
            pieces = self._render([*self._messages[:position], message, *self._messages[position + 1 : length]]).split(
                SENTINEL
            )
        except TEMPLATE_ERRORS:
            return None
        return (pieces[0], pieces[1]) if len(pieces) == 2 else None

    def _prompt(self, position: int) -> str:
        """The prompt for the message at `position`; empty for the first one, or if the template refuses it."""
        if not position:
            return ""
        try:
            return self._render(self._messages[:position], add_generation_prompt=True)
        except TEMPLATE_ERRORS:
            return ""

    @cached_property
    def _header(self) -> str:
        """What the template adds to a chat to ask for an answer; may be empty."""
        question = [{"role": "user", "content": SENTINEL}]
        try:
            chat, prompt = self._render(question), self._render(question, add_generation_prompt=True)
        except TEMPLATE_ERRORS:
            return ""
        return prompt.removeprefix(chat) if prompt.startswith(chat) else ""

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        """Any of the tokenizer's special tokens, the longest first."""
        special = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        special.update(self._tokenizer.all_special_tokens)
        longest_first = sorted(filter(None, special), key=lambda token: (-len(token), token))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _render(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        messages = list(messages)
        return str(self._tokenizer.apply_chat_template(messages, tools=self._tools, tokenize=False, **options))


def _common_length(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _refused(record: Record, error: Exception) -> DataError:
    return DataError(f"{record.source}: the model's chat template refuses this chat: {error}")
