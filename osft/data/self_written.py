"""Text that a model writes itself, which stands for what it knows where its training data is not at hand.

A quarter of the sequences is plain text, from the token with which texts begin. A quarter are chats, where the
tokenizer has a chat template: the template opens a user's turn, the model writes it, the template opens the assistant's
turn, and the model writes that. At temperature 1 a mean over such text is one over what the model takes text to be, and
protection reaches as far as that. So the other half begins as text of other kinds does, such as code, which the model
seldom writes unasked: measured, learning German then moves what SmolLM2-135M says of Python a seventh as far, and what
it says of prose no further.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from osft.data.chat import Sample
from osft.storage.atomic import atomic_path

NUM_TOKENS = {2048: 3072, 4096: 6144, 8192: 12288, 16384: 24576, 32768: 49152}
"""The widest input of the model's layers, at most, and how many tokens are written by default: 1.5 for each dimension.
3,072 protected well at widths of 576 and 1,536, and are few for the latter."""
OPENINGS = (
    "import os\nimport sys\n", "1. ", "#include <stdio.h>\n", "Question:", "    def __init__(self,", "From:",
    "<!DOCTYPE html>\n<html>", "Abstract", "function(", "Monday,", "SELECT * FROM", "Theorem", "class",
    "{\n  \"name\":", "public static", "|", "for i in range(", "$ ", "    return", "@",
)  # fmt: skip
"""How texts of other kinds begin: code, markup, data, lists, letters."""
FORMS = ("plain", "chat", "opened", "opened")
"""Taken in turns."""
FORMAT = 2
"""Part of the key of all that is made of such text: raise it when the text is written differently."""
ROWS_AT_ONCE = 64
"""Sequences that are written together, at most."""
_SPARE_ROWS = 1.25
"""So many times the sequences that would do if none ended early."""
_USERS_SHARE = 4
"""A user's turn takes at most one in so many tokens of a sequence."""
_FEWEST_TOKENS = 4
"""That the model adds to a sequence on average; below, the text is degenerate."""
_MARKER = "the user's words"
_REMEDY = "Give text instead of letting it write"


def default_num_tokens(width: int) -> int:
    """Tokens to write for a model whose widest layer input is `width` wide."""
    return next((tokens for limit, tokens in NUM_TOKENS.items() if width <= limit), max(NUM_TOKENS.values()))


def write_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int,
    seed: int,
    temperature: float = 1.0,
    sequence_length: int = 128,
    batch_size: int | None = None,
    forms: Sequence[str] = FORMS,
) -> list[list[int]]:
    """Texts of at most `sequence_length` tokens, together `num_tokens`, as token ids; the same for the same seed.

    What a chat template puts in counts. `forms`, taken in turns, are "plain", "chat" and "opened". `batch_size`, by
    default as many sequences as are needed, up to ROWS_AT_ONCE, changes the text. Raises ValueError, with the model's
    name, if its tokenizer has no token that begins or ends a text, if the model computes NaN, and if what it writes is
    over at once or one token over and over.
    """
    name = model.config.name_or_path or type(model).__name__
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ValueError(f"the tokenizer of {name} has no token that begins or ends a text. {_REMEDY}")
    size = batch_size or min(ROWS_AT_ONCE, round(-(-num_tokens // sequence_length) * _SPARE_ROWS))
    found = _forms(model, tokenizer, first, itertools.islice(itertools.cycle(forms), size))
    texts: list[list[int]] = []
    devices = [model.device] if model.device.type == "cuda" else []
    training = model.training
    model.eval()
    with tqdm(total=num_tokens, desc="write", unit="token", mininterval=2.0) as bar, torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        while (missing := num_tokens - sum(map(len, texts))) > 0:
            rows = _write(model, found, missing, temperature, sequence_length, name)
            _check(rows, name)
            for row in rows:
                texts += [row.tokens[:missing]] if missing > 0 else []
                missing -= len(row.tokens)
            bar.update(sum(map(len, texts)) - bar.n)
    model.train(training)
    return texts


def as_samples(texts: Iterable[Sequence[int]]) -> list[Sample]:
    """Texts with a loss on every token."""
    return [Sample(list(text), list(text)) for text in texts]


def save_texts(texts: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Write texts as JSON lines of plain text, {"text": …}, with the special tokens that they hold."""
    with atomic_path(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for text in texts:
            decoded = tokenizer.decode(list(text), skip_special_tokens=False)
            lines.write(json.dumps({"text": decoded}, ensure_ascii=False) + "\n")


@dataclass(frozen=True, slots=True)
class _Form:
    """What surrounds that which the model writes."""

    opening: list[int]
    """Before the first written token, at least one."""
    turn: list[int]
    """Between the user's and the assistant's words; empty for plain text."""
    ends: frozenset[int]
    """What ends the text."""
    kept_out: frozenset[int] = frozenset()
    """What the user does not write."""


class _Row:
    """One sequence as it comes."""

    def __init__(self, form: _Form, sequence_length: int) -> None:
        self._form, self._length = form, sequence_length
        self.forced = list(form.opening)
        """What comes next whatever the model says."""
        self._users_left = sequence_length // _USERS_SHARE if form.turn else 0
        self.tokens: list[int] = []
        self.written: list[int] = []
        """Of the tokens, those that the model chose."""
        self.is_done = False

    @property
    def kept_out(self) -> frozenset[int]:
        """What may not come next."""
        return self._form.kept_out if self._users_left and not self.forced else frozenset()

    def take(self, token: int) -> None:
        """The next token."""
        if self.is_done:
            return
        self.tokens.append(token)
        if self.forced:
            self.forced.pop(0)
        else:
            self.written.append(token)
            if self._users_left:
                self._users_left -= 1
                if token == self._form.turn[0]:
                    self._users_left, self.forced = 0, self._form.turn[1:]
                elif not self._users_left:
                    self.forced = list(self._form.turn)
            elif token in self._form.ends:
                self.is_done = True
        self.is_done |= len(self.tokens) == self._length


class _Writing(LogitsProcessor):
    """Puts in what the forms say, and knows how far each sequence is."""

    def __init__(self, forms: Sequence[_Form], sequence_length: int, name: str) -> None:
        self.rows = [_Row(form, sequence_length) for form in forms]
        self._seen, self._name = 0, name

    def see(self, sequences: torch.Tensor) -> None:
        """The tokens (num_rows, t) so far."""
        for column in sequences[:, self._seen :].T.tolist():
            for row, token in zip(self.rows, column, strict=True):
                row.take(token)
        self._seen = max(self._seen, sequences.shape[1])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores (num_rows, vocabulary) of the next token."""
        if scores.isnan().any():
            raise ValueError(
                f"{self._name} computes NaN when it writes. Check its weights, or give it text to measure on"
            )
        self.see(input_ids)
        for index, row in enumerate(self.rows):
            if row.is_done:
                continue
            if row.forced:
                scores[index] = -torch.inf
                scores[index, row.forced[0]] = 0
            elif row.kept_out:
                scores[index, list(row.kept_out)] = -torch.inf
        return scores


class _Enough(StoppingCriteria):
    """All sequences are over, or hold enough tokens."""

    def __init__(self, writing: _Writing, num_tokens: int) -> None:
        self._writing, self._num_tokens = writing, num_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(num_rows,): the same for all."""
        self._writing.see(input_ids)
        rows = self._writing.rows
        enough = all(row.is_done for row in rows) or sum(len(row.tokens) for row in rows) >= self._num_tokens
        return torch.full((len(input_ids),), enough, device=input_ids.device)


def _write(
    model: Any, forms: Sequence[_Form], num_tokens: int, temperature: float, sequence_length: int, name: str
) -> list[_Row]:
    """A text of each form, until they are over or hold `num_tokens`."""
    writing = _Writing(forms, sequence_length, name)
    own_config = model.generation_config
    # Its settings would fill in what is None here: ends of text among them, and a user's turn ends with one.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_length=sequence_length,
        pad_token_id=forms[0].opening[0],
    )
    starts = torch.tensor([[form.opening[0]] for form in forms], device=model.device)
    try:
        sequences = model.generate(
            starts,
            attention_mask=torch.ones_like(starts),
            logits_processor=LogitsProcessorList([writing]),
            stopping_criteria=StoppingCriteriaList([_Enough(writing, num_tokens)]),
        )
    finally:
        model.generation_config = own_config
    final = _Writing(forms, sequence_length, name)  # generate may have looked at tokens that it took back
    final.see(sequences)
    return final.rows


def _check(rows: Sequence[_Row], name: str) -> None:
    """Raise ValueError if the model wrote next to nothing, or one token over and over."""
    mean = sum(len(row.written) for row in rows) / len(rows)
    if mean < _FEWEST_TOKENS and all(row.is_done for row in rows):
        raise ValueError(f"what {name} writes is over after {mean:.1f} tokens on average. {_REMEDY}")
    tokens = [token for row in rows for token in row.written]
    if len(tokens) > _FEWEST_TOKENS and len(set(tokens)) == 1:
        raise ValueError(f"{name} writes one token over and over. {_REMEDY}")


def _forms(model: Any, tokenizer: PreTrainedTokenizerBase, first: int, forms: Iterable[str]) -> list[_Form]:
    """Forms by name; without a chat template plain text takes the place of chats."""
    ends = _ends(model, tokenizer)
    plain = _Form([first], [], ends)
    chat = _chat(model, tokenizer) or plain
    openings = itertools.cycle(tokenizer(opening, add_special_tokens=False)["input_ids"] for opening in OPENINGS)

    def form(kind: str) -> _Form:
        if kind == "opened":
            return _Form([first, *next(openings)], [], ends)
        return chat if kind == "chat" else plain

    return [form(kind) for kind in forms]


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends a text of this model."""
    configured = model.generation_config.eos_token_id
    found = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*found, tokenizer.eos_token_id] if token is not None)


def _chat(model: Any, tokenizer: PreTrainedTokenizerBase) -> _Form | None:
    """A chat of one question and its answer; None if there is no template, or it does not render the user's words."""
    if not tokenizer.chat_template:
        return None
    question = [{"role": "user", "content": _MARKER}]
    try:
        rendered = str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        return None
    before, marker, after = rendered.partition(_MARKER)
    opening, turn = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
    if not (marker and opening and turn):
        return None
    special = frozenset(tokenizer.all_special_ids)
    return _Form(opening, turn, _ends(model, tokenizer) | (special & {turn[0]}), special - {turn[0]})
