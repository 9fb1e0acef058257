"""A chat as its template renders it, and where each message lies in it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from osft.data.records import DataError, Record
from osft.data.token_spans import Span

SENTINEL = "\ue000\ue001\ue000"
"""Stands for a message's text in a second rendering. Characters of the private use area have no case, are no white
space and need no escape, so a template passes them on as they are."""

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError)
"""What a template raises for a chat that it does not want or was not written for."""


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
        self._template = tokenizer.get_chat_template(tools=self._tools)
        self._is_marked = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self._template) is not None
        try:
            self.text = self._render(self._messages)
        except TEMPLATE_ERRORS as error:
            raise DataError(f"{record.source}: the model's chat template refuses this chat: {error}") from error

    def spans(self, position: int) -> list[Span]:
        """What counts of the message at `position`: of an assistant's, what {% generation %} markers enclose.

        Raises DataError if it cannot be located, or the markers leave out what it says.
        """
        span = self._span(position)
        if self._is_marked and self._messages[position]["role"] == "assistant":
            return self._marked(position, span)
        if span is None:
            raise self._not_located(position)
        return [span]

    def _span(self, position: int) -> Span | None:
        """From where the message's author begins to write it through the special token that closes it."""
        if plain := self._plain_answer(position):
            return plain
        around = self._around(position)
        if around is None:
            return None
        if self._messages[position]["role"] == "assistant":
            start = self._generation_start(position, *around)
            end = self._generation_end(position, *around)
            return None if start is None or end is None else (start, end)
        if not self.text.startswith(around[0]):
            return None
        end = len(self.text) - len(around[1])
        return len(around[0]), self._closing(end) or end

    def _plain_answer(self, position: int) -> Span | None:
        """The span of an answer that the template renders as it is between its header and a closing token."""
        header = self._habits.header
        if not header or position not in self._contents:
            return None
        start, end = self._contents[position]
        closed = self._closing(end)
        return (start, closed) if closed and self.text.endswith(header, 0, start) else None

    @cached_property
    def _contents(self) -> dict[int, Span]:
        """Where the answers without reasoning and calls stand, by their positions; empty if the template changes any.

        One more rendering finds them all, where each of the others takes two: of long chats, most of the time.
        """
        plain = [
            position
            for position, message in enumerate(self._messages)
            if message["role"] == "assistant" and message.keys() == {"role", "content"}
        ]
        try:
            before, *pieces = self._render(
                [m | {"content": SENTINEL} if at in plain else m for at, m in enumerate(self._messages)]
            ).split(SENTINEL)
        except TEMPLATE_ERRORS:
            return {}
        if len(pieces) != len(plain) or not self.text.startswith(before):
            return {}
        found, start = {}, len(before)
        for position, piece in zip(plain, pieces, strict=True):
            content = self._messages[position]["content"]
            if not self.text.startswith(content + piece, start):
                content = content.strip()
            if not self.text.startswith(content + piece, start):
                return {}
            found[position] = (start, start + len(content))
            start += len(content) + len(piece)
        return found if start == len(self.text) else {}

    def _marked(self, position: int, span: Span | None) -> list[Span]:
        """What the template's markers enclose of an assistant's message, and the token that closes it.

        Markers are not believed where they enclose a header or another message: only the message's own span counts.
        """
        if span is None:
            return self._marked_unlocated(position)
        enclosed = [(max(first, span[0]), min(last, span[1])) for first, last in self._blocks]
        enclosed = [(first, last) for first, last in enclosed if first < last]
        outside = "".join(_without(self.text, said, enclosed) for said in self._said(position, span))
        if not enclosed or outside.strip():
            raise DataError(
                f"{self._record.source}: the {{% generation %}} markers of the model's chat template leave out "
                f"messages[{position}] or a part of it, which would not be learned. Enclose all that the assistant "
                'writes or take the markers out of the template, or give the message "weight": 0'
            )
        # An answer that does not end is no answer: what closes the turn is generated, too.
        return [*enclosed[:-1], (enclosed[-1][0], span[1])]

    def _said(self, position: int, span: Span) -> list[Span]:
        """Where the assistant's content, its reasoning and the name of the last function that it calls stand."""
        around, message = self._around(position), self._messages[position]
        assert around is not None, "there is a span"
        end = len(self.text) - len(around[1])
        said = [(min(max(span[0], self._content_start(*around)), end), end)]
        for key in ("content", "reasoning_content", "thinking", "reasoning"):
            text = (message.get(key) or "").strip()
            at = self.text.find(text, *span) if text else -1
            said += [(at, at + len(text))] if at >= 0 else []
        return said

    def _marked_unlocated(self, position: int) -> list[Span]:
        """The marked blocks that the message adds to the chat, without the header that asks for it."""
        before = len(self._blocks_of(self._messages[:position])) if position else 0
        through = len(self._blocks_of(self._messages[: position + 1]))
        whole = self._blocks_of(self._messages)
        others = [m if m["role"] == "assistant" else m | {"content": SENTINEL} for m in self._messages]
        blocks_with_others = self._blocks_of(others, holding=SENTINEL)
        if not before < through <= len(whole) or blocks_with_others:
            raise self._not_located(position)
        return [span for block in whole[before:through] if (span := self._without_header(block))[0] < span[1]]

    def _without_header(self, block: Span) -> Span:
        """A marked block without the header before, and the white space after the token that closes it."""
        first, last = block
        header = self._habits.header
        at = self.text.find(header, max(0, first - len(header) + 1), last) if header else -1
        if 0 <= at <= first:
            first = at + len(header)
        stripped = self.text[first:last].rstrip()
        tokens = list(self._habits.special_tokens.finditer(stripped))
        return first, first + len(stripped) if tokens and tokens[-1].end() == len(stripped) else last

    def _not_located(self, position: int) -> DataError:
        advice = "add {% generation %} markers to the template"
        if self._is_marked:
            advice = "move the template's {% generation %} markers, which do not enclose it alone"
        return DataError(
            f"{self._record.source}: messages[{position}] cannot be located in the rendered chat: the model's chat "
            f"template leaves it out, repeats it or depends on what it says. Change the message, or {advice}"
        )

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

    def _content_start(self, before: str, after: str) -> int:
        """Where the content begins, or the reasoning within it that the template treats on its own."""
        if self.text.startswith(before):
            return len(before)
        return _common_length(self.text[: len(self.text) - len(after)], before)

    def _generation_start(self, position: int, before: str, after: str) -> int | None:
        """Where the assistant would begin to generate the message."""
        exact = self.text.startswith(before)
        content = self._content_start(before, after)
        prompt = self._prompt(position)
        if prompt and len(prompt) <= content and self.text.startswith(prompt):
            asked, opening = len(prompt), self._habits.opening
            return asked + len(opening) if self.text.startswith(opening, asked, content) else asked
        # The template rewrites what is before the message. As the chat's last message it follows its prompt:
        last = self._render_around(position, position + 1)
        if exact and prompt and last and last[0].startswith(prompt) and before.endswith(last[0][len(prompt) :]):
            return len(before) - len(last[0]) + len(prompt)
        # The template rewrites the message itself when others follow: the header that asks for it remains.
        previous = self._around(position - 1) if position else ("", self.text)
        if self._habits.header and previous:
            found = self.text.rfind(self._habits.header, len(self.text) - len(previous[1]), content)
            if found >= 0:
                return found + len(self._habits.header)
        return content if exact else None

    def _generation_end(self, position: int, before: str, after: str) -> int | None:
        """Where the assistant would stop, after the special token that closes the message."""
        end = len(self.text) - len(after)
        calls = "tool_calls" in self._messages[position]
        closed = None if calls else self._closing(end)
        if closed:
            return closed
        last = self._render_around(position, position + 1)
        if last:
            # As the chat's last message it ends with its closing token; another one may close it before others.
            rendered = last[1].removesuffix(self._habits.trailer)
            tokens = list(self._habits.special_tokens.finditer(rendered))
            body = rendered[: tokens[-1].start()] if tokens else rendered.rstrip()
            closing = self._habits.special_tokens.match(after, len(body)) if tokens else None
            if after.startswith(body) and (closing or not tokens):
                return end + (closing.end() if closing else len(body))
        return None if calls else end

    def _closing(self, end: int) -> int | None:
        """Where the special token ends that closes the turn whose content ends at `end`; None if it is left open."""
        token = self._habits.special_tokens.match(self.text, end)
        if token is None or self._habits.header.startswith(token.group()):
            return None
        opens_the_next = self._habits.leaves_open and token.group() != self._tokenizer.eos_token
        return None if opens_the_next else token.end()

    def _render_around(self, position: int, length: int) -> tuple[str, str] | None:
        """The first `length` messages, rendered and divided at the sentinel; None if it is not there once.

        The name of a function may come again: templates repeat it in the turn that has the call's result.
        """
        message, name = dict(self._messages[position]), ""
        if "tool_calls" in message:
            *others, call = message["tool_calls"]
            name = call.get("function", call)["name"]
            function = call.get("function", call) | {"name": SENTINEL}
            message["tool_calls"] = [*others, call | {"function": function} if "function" in call else function]
        else:
            message["content"] = SENTINEL
        messages = [*self._messages[:position], message, *self._messages[position + 1 : length]]
        try:
            before, *pieces = self._render(messages).split(SENTINEL)
        except TEMPLATE_ERRORS:
            return None
        return (before, name.join(pieces)) if len(pieces) == 1 or (name and pieces) else None

    def _prompt(self, position: int) -> str:
        """The prompt for the message at `position`; empty for the first one, or if the template refuses it."""
        if not position:
            return ""
        try:
            return self._render(self._messages[:position], add_generation_prompt=True)
        except TEMPLATE_ERRORS:
            return ""

    @cached_property
    def _habits(self) -> "_Habits":
        variables = json.dumps([self._tools, self._record.extra], sort_keys=True)
        return _habits(self._tokenizer, self._template, len(self._tokenizer), variables)

    @cached_property
    def _blocks(self) -> list[Span]:
        """What the template's markers enclose in the rendered chat."""
        return self._blocks_of(self._messages)

    def _blocks_of(self, messages: Sequence[dict[str, Any]], *, holding: str = "") -> list[Span]:
        """What the markers enclose in other messages' rendering; with `holding`, only blocks with this in them.

        Raises DataError if the template refuses the messages.
        """
        try:
            rendered: Any = render_jinja_template(  # it says that it returns a text
                conversations=[[{k: v for k, v in message.items() if v is not None} for message in messages]],
                tools=self._tools,
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map | self._record.extra,
            )
        except TEMPLATE_ERRORS as error:
            problem = "the {% generation %} markers of the model's chat template cannot be followed"
            raise DataError(f"{self._record.source}: {problem}: {error}") from error
        (text,), (blocks,) = rendered
        return [(first, last) for first, last in blocks if holding in text[first:last]]

    def _render(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        return _render(self._tokenizer, messages, self._tools, {**self._record.extra, **options})


@dataclass(frozen=True, slots=True)
class _Habits:
    """What a tokenizer and its template do with any chat."""

    header: str
    """What the template adds to a chat to ask for an answer; may be empty."""
    opening: str
    """What opens an assistant's turn where the template does not ask for one; empty if it has no words."""
    trailer: str
    """What ends a chat after the special token that closes its last turn."""
    leaves_open: bool
    """Whether nothing closes an assistant's turn."""
    special_tokens: re.Pattern[str]
    """Any of the tokenizer's special tokens, the longest first."""


@lru_cache(maxsize=8)
def _habits(tokenizer: PreTrainedTokenizerBase, template: str, num_tokens: int, variables: str) -> _Habits:
    """`template`, `num_tokens` and `variables`, the tools and others in JSON, are what changes of one tokenizer."""
    tools, extra = json.loads(variables)

    def render(*messages: dict[str, Any], **options: Any) -> str | None:
        try:
            return _render(tokenizer, messages, tools, extra | options)
        except TEMPLATE_ERRORS:
            return None

    question, answer = ({"role": role, "content": SENTINEL} for role in ("user", "assistant"))
    chat, prompt, answered = render(question), render(question, add_generation_prompt=True), render(question, answer)
    header = opening = ""
    if chat is not None and prompt is not None and prompt.startswith(chat):
        header = prompt.removeprefix(chat)
        if not header and answered is not None and answered.startswith(chat):
            opening = answered.removeprefix(chat).split(SENTINEL)[0]
    ending = answered.split(SENTINEL)[-1] if answered is not None else ""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    longest_first = sorted(filter(None, special), key=lambda token: (-len(token), token))
    special_tokens = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    closing = special_tokens.match(ending)
    return _Habits(
        header=header,
        opening=opening if any(character.isalnum() for character in opening) else "",
        trailer=ending[closing.end() :] if closing else "",
        leaves_open=answered is not None and not ending.strip(),
        special_tokens=special_tokens,
    )


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: Any, variables: dict[str, Any]
) -> str:
    options = {**variables, "tokenize": False}
    return str(tokenizer.apply_chat_template(list(messages), tools=tools, **options))


def _common_length(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _without(text: str, span: Span, taken: Sequence[Span]) -> str:
    """What remains of the text in `span` without that in `taken`, spans in their order."""
    rest, at = "", span[0]
    for first, last in taken:
        rest += text[at : max(at, min(first, span[1]))]
        at = max(at, last)
    return rest + text[at : span[1]]
