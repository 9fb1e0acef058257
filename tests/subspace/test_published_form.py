"""What the library's form of OSFT learns and forgets, beside the published form and full fine-tuning.

A two-layer byte-level Llama is pre-trained on English prose and tuned on Python source, both of which come with
every Python. Forgetting is the rise of the loss on held-out prose, learning the fall of the loss on held-out code,
in nats per byte. Methods scale their steps differently, so they are compared at equal forgetting, along what
several learning rates give.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from pydoc_data import topics
from statistics import fmean

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from osft.settings.subspace import SubspaceConfig
from osft.subspace import inject, refresh, select_targets
from tests.conftest import tiny_llama
from tests.subspace.published_form import inject_published, published_step

RATIO = 0.25
ROW, ROWS = 64, 16
PRETRAINING_STEPS, TUNING_STEPS = 300, 60
# From little forgetting to about the most that a method learns in these steps.
LEARNING_RATES = {
    "published": (4e-3, 1.6e-2),
    "complement": (2e-3, 6e-3, 2e-2),
    "unconstrained": (4e-3,),
    "full": (4e-3,),
}
TOLERANCE = 0.01
"""Nats per byte: over eight pre-training seeds, ours minus published at the highest learning rate, where the two are
closest, has mean 0.006 and standard deviation 0.010. At the lower one the mean is 0.018 and the least 0.006."""
COMPARED = ("published", "complement")
ORDERS = 2
"""Where learning is weighed against forgetting, means over so many orders of the tuning text are compared."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Bytes as tokens: a stream to draw rows from (T,), or fixed rows (N, ROW)."""

    prose: torch.Tensor
    prose_held_out: torch.Tensor
    code: torch.Tensor
    code_held_out: torch.Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """One tuned model."""

    forgetting: float
    learning: float
    tuning_loss: float
    """On fixed rows of the text that it was tuned on."""


def stream(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()))


def fixed_rows(tokens: torch.Tensor, count: int = 200) -> torch.Tensor:
    """`count` rows, evenly spread over the text."""
    rows = tokens[: len(tokens) // ROW * ROW].view(-1, ROW)
    return rows[:: max(1, len(rows) // count)][:count]


def make_texts() -> Texts:
    prose = stream("\n".join(topics.topics[name] for name in sorted(topics.topics)))
    sources = [inspect.getsource(import_module(name)) for name in ("argparse", "textwrap", "difflib", "tarfile")]
    cut = len(prose) * 9 // 10
    return Texts(
        prose=prose[:cut],
        prose_held_out=fixed_rows(prose[cut:]),
        code=stream("\n".join(sources)),
        code_held_out=fixed_rows(stream(inspect.getsource(import_module("optparse")))),
    )


def loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def measured_loss(model: nn.Module, rows: torch.Tensor) -> float:
    return loss(model, rows).item()


def train(
    model: nn.Module,
    text: torch.Tensor,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    finish_step: Callable[[torch.optim.Optimizer], None],
) -> None:
    """AdamW on rows drawn from `text`, with a learning rate that falls linearly to 0."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        starts = torch.randint(len(text) - ROW, (ROWS,), generator=generator).tolist()
        loss(model, torch.stack([text[start : start + ROW] for start in starts])).backward()
        finish_step(optimizer)


def plain_step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def pretrain(texts: Texts, seed: int) -> nn.Module:
    model = tiny_llama(
        seed, vocab_size=256, hidden_size=64, intermediate_size=160, eos_token_id=None, initializer_range=0.02
    )
    train(
        model,
        texts.prose,
        steps=PRETRAINING_STEPS,
        learning_rate=3e-3,
        seed=seed,
        finish_step=plain_step,
    )
    return model


def tune(base: nn.Module, method: str, learning_rate: float, texts: Texts, seed: int) -> Outcome:
    model = copy.deepcopy(base)

    def refreshed_step(optimizer: torch.optim.Optimizer) -> None:
        plain_step(optimizer)
        refresh(model, learning_rate=0.0)

    finish_step: Callable[[torch.optim.Optimizer], None] = refreshed_step
    if method == "published":
        inject_published(model, RATIO)

        def finish_step(optimizer: torch.optim.Optimizer) -> None:
            published_step(model, optimizer)

    elif method == "unconstrained":
        inject(model, SubspaceConfig(unfreeze_rank_ratio=1.0))
    elif method == "full":  # of the same weights
        model.requires_grad_(False)
        for target in select_targets(model):
            model.get_submodule(target.name).weight.requires_grad_(True)
        finish_step = plain_step
    else:
        inject(model, SubspaceConfig(unfreeze_rank_ratio=RATIO, free_subspace=method))
    train(model, texts.code, steps=TUNING_STEPS, learning_rate=learning_rate, seed=seed, finish_step=finish_step)
    return Outcome(
        forgetting=measured_loss(model, texts.prose_held_out) - measured_loss(base, texts.prose_held_out),
        learning=measured_loss(base, texts.code_held_out) - measured_loss(model, texts.code_held_out),
        tuning_loss=measured_loss(model, fixed_rows(texts.code)),
    )


def learning_at(curve: list[Outcome], forgetting: float) -> float:
    """The most that a method learns without forgetting more, linear between its outcomes and the untouched model."""
    points = sorted([(0.0, 0.0), *((outcome.forgetting, outcome.learning) for outcome in curve)])
    forgettings, learnings = zip(*points, strict=True)
    return float(np.interp(forgetting, forgettings, np.maximum.accumulate(learnings)))


def compare(seed: int) -> dict[str, list[Outcome]]:
    """By method, an outcome a learning rate."""
    texts = make_texts()
    base = pretrain(texts, seed)
    return {
        method: [
            mean([tune(base, method, rate, texts, order) for order in range(ORDERS if method in COMPARED else 1)])
            for rate in rates
        ]
        for method, rates in LEARNING_RATES.items()
    }


def mean(outcomes: list[Outcome]) -> Outcome:
    return Outcome(
        **{field.name: fmean(getattr(outcome, field.name) for outcome in outcomes) for field in fields(Outcome)}
    )


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, list[Outcome]]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain nothing from a second one, and sums keep their order
    yield compare(seed=0)
    torch.set_num_threads(threads)


def test_learns_at_least_as_much_as_the_published_form_at_equal_forgetting(outcomes):
    for published in outcomes["published"]:
        assert published.forgetting > 0.01, "nothing is forgotten, so the comparison shows nothing"
        ours = learning_at(outcomes["complement"], published.forgetting)
        assert ours >= published.learning - TOLERANCE


def test_without_frozen_directions_it_learns_what_full_fine_tuning_learns(outcomes):
    ours, full = (min(outcome.tuning_loss for outcome in outcomes[name]) for name in ("unconstrained", "full"))
    assert ours <= 1.02 * full
