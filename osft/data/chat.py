"""Chat template -> tokens and loss mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from osft.data.left_out import check_nothing_left_out
from osft.data.records import DataError, Record
from osft.data.rendered_chat import RenderedChat
from osft.data.template_keys import check_read, knows_role, with_known_roles
from osft.data.token_spans import Span, TokenizerMismatchError, encode

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


def tokenize(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_text_tokens: int = 512,
    unmask_messages: bool = False,
) -> Sample:
    """Tokens of a record, with loss on the assistant's tokens, or on all of a plain text (cut to `max_text_tokens`).

    An assistant's turn counts from where generation would begin (the role header is not in it, rendered reasoning and
    tool calls are) through the special token that closes it. Where the template has {% generation %} markers, what
    they enclose of that counts, and the closing token. With `unmask_messages`, or `unmask` in the record, the other
    messages count as well, except the system's: their content and the special token that closes it. What the record
    says of a message (`learn`) goes before all of this; text of the role `pretraining` counts whole.

    Raises DataError if the tokenizer has no chat template, the template refuses the chat, does not read a key of it or
    leaves a message out, or a message cannot be located exactly in what it renders or among the tokens.
    """
    (sample,) = tokenize_all([record], tokenizer, max_text_tokens=max_text_tokens, unmask_messages=unmask_messages)
    return sample


def tokenize_all(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_text_tokens: int = 512,
    unmask_messages: bool = False,
) -> list[Sample]:
    """`tokenize` of each record; the chats are handed to the tokenizer together."""
    samples: dict[int, Sample] = {}
    chats: dict[int, tuple[str, list[Span]]] = {}
    for at, record in enumerate(records):
        if record.text:
            input_ids = tokenizer(record.text, truncation=True, max_length=max_text_tokens)["input_ids"]
            samples[at] = Sample(input_ids, list(input_ids))
        elif _is_document(record, tokenizer):
            samples[at] = _document(record, tokenizer)
        else:
            chats[at] = _rendered(record, tokenizer, unmask_messages=unmask_messages)
    encoded = encode(tokenizer, [text for text, _ in chats.values()])
    for (at, (_, spans)), tokens in zip(chats.items(), encoded, strict=True):
        try:
            in_loss = tokens.in_spans(spans)
        except TokenizerMismatchError as error:
            raise DataError(f"{records[at].source}: {error}") from error
        if not in_loss[1:].any():
            raise DataError(f"{records[at].source}: the chat template leaves no token to learn from")
        samples[at] = Sample(tokens.input_ids, np.where(in_loss, tokens.input_ids, IGNORE).tolist())
    return [samples[at] for at in range(len(records))]


def _rendered(record: Record, tokenizer: PreTrainedTokenizerBase, *, unmask_messages: bool) -> tuple[str, list[Span]]:
    """A chat as the template renders it, and where what has a loss lies in it."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"{record.source}: the model's tokenizer has no chat template. Use a chat model, or set "
            "`tokenizer.chat_template` and save the tokenizer into the model folder"
        )
    template = tokenizer.get_chat_template(tools=list(record.tools) or None)
    record = with_known_roles(template, record)
    check_read(template, record)
    chat = RenderedChat(record, tokenizer)
    check_nothing_left_out(record, tokenizer, template)
    unmask = unmask_messages or record.unmask
    learned = [position for position in range(len(record.messages)) if _is_learned(record, position, unmask)]
    return chat.text, [span for position in learned for span in chat.spans(position)]


def _is_document(record: Record, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a record is one text of the role `pretraining` (InstructLab's), for which the template has no form."""
    if [message["role"] for message in record.messages] != ["pretraining"]:
        return False
    return tokenizer.chat_template is None or not knows_role(tokenizer.get_chat_template(), "pretraining")


def _document(record: Record, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """All of a text, and the token that ends it, as `osft.data.documents` joins texts."""
    input_ids = list(tokenizer(record.messages[0]["content"], verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and input_ids[-1:] != [tokenizer.eos_token_id]:
        input_ids.append(tokenizer.eos_token_id)
    return Sample(input_ids, list(input_ids))


def _is_learned(record: Record, position: int, unmask: bool) -> bool:
    """Whether the message at `position` has a loss."""
    if record.learn and (learn := record.learn[position]) is not None:
        return learn
    role = record.messages[position]["role"]
    return role in ("assistant", "pretraining") or (unmask and role != "system")
