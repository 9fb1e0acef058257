"""Chat template -> tokens and loss mask."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from osft.data.records import DataError, Record

IGNORE = -100
"""The label of a token without loss, as in PyTorch's cross entropy."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenized record. `labels[i]` is `input_ids[i]` where the token counts in the loss, else `IGNORE`."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that are predicted: the first one has nothing before it."""
        return sum(label != IGNORE for label in self.labels[1:])


def tokenize(record: Record, tokenizer: PreTrainedTokenizerBase, *, max_text_tokens: int = 512) -> Sample:
    """Tokens of a record, with loss on the assistant's tokens, or on all of a plain text (cut to `max_text_tokens`).

    Raises DataError if the tokenizer has no chat template or the assistant's text cannot be located exactly.
    """
    if record.text:
        input_ids = tokenizer(record.text, truncation=True, max_length=max_text_tokens)["input_ids"]
        return Sample(input_ids, list(input_ids))
    template = tokenizer.chat_template
    if template is None:
        raise DataError(
            f"{record.source}: the model's tokenizer has no chat template. Use a chat model, or set "
            "`tokenizer.chat_template` and save the tokenizer into the model folder"
        )
    messages = list(record.messages)
    if isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template):
        encoded: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        input_ids, in_loss = encoded["input_ids"], encoded["assistant_masks"]
    else:
        input_ids, in_loss = _search_spans(messages, tokenizer, record.source)
    labels = [token if counted else IGNORE for token, counted in zip(input_ids, in_loss, strict=True)]
    sample = Sample(list(input_ids), labels)
    if sample.num_loss_tokens == 0:
        raise DataError(f"{record.source}: the chat template leaves no assistant token to learn from")
    return sample


def _search_spans(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, source: str
) -> tuple[list[int], list[bool]]:
    """Tokens of the rendered chat, and whether each lies in what the assistant would have generated.

    An assistant turn starts where the prompt that asks for it ends (its rendering with a generation prompt) and
    runs through its content and the special token that closes it.
    """

    def render(part: Sequence[dict[str, Any]], **options: Any) -> str:
        return str(tokenizer.apply_chat_template(list(part), tokenize=False, **options))

    text = render(messages)
    closing = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)) or r"(?!)")
    spans = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:position], add_generation_prompt=True) if position else ""
        content = message["content"].strip()
        found = text.find(content, len(prompt)) if text.startswith(prompt) else -1
        if found < 0:
            raise DataError(
                f"{source}: messages[{position}] cannot be located in the rendered chat, because the model's chat "
                "template rewrites earlier turns. Add {% generation %} markers to the template"
            )
        end = found + len(content)
        close = closing.match(text, end)
        spans.append((len(prompt), close.end() if close else end))

    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    in_loss = [
        any(start < span_end and end > span_start for span_start, span_end in spans)
        for start, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], in_loss
