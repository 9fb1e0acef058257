"""Compiled blocks: the losses of the others, few compilations, the same names."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from osft.data.chat import Sample
from osft.data.packing import collate
from osft.subspace.model import inject
from osft.subspace.targets import transformer_blocks
from osft.training.compiling import compile_blocks
from osft.training.loop import make_optimizer, train_step
from tests.conftest import tiny_llama
from tests.training.test_distillation import settings

LENGTHS = (11, 13, 17, 19, 23, 29)
"""None is a size of the model, which would be taken for it."""


@pytest.fixture
def compiler() -> None:
    if not shutil.which("g++"):
        pytest.skip("there is no compiler here")
    torch.compiler.reset()
    counters.clear()


def steps(*, compiled: bool, gradient_checkpointing: bool) -> list[tuple[float, float]]:
    """Losses and gradient norms of steps whose micro-batches all have other lengths, one sample and several."""
    config = settings()
    model = inject(tiny_llama(attn_implementation="sdpa"), config.subspace).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    names = [*model.state_dict()]
    if compiled:
        compile_blocks(model)
    optimizer = make_optimizer(model, config, fused=True)
    found = []
    for first in range(4):
        texts = [Sample([*range(length)], [*range(length)]) for length in LENGTHS[first:]]
        batches = [collate(texts[:count]) for count in (1, 2, 3)]
        loss, _, norm = train_step(model, optimizer, batches, num_loss_tokens=100, max_grad_norm=1.0)
        found.append((loss.item(), norm.item()))
    assert [*model.state_dict()] == names
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)  # the compiler takes minutes on a busy machine
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_losses_are_the_same_and_lengths_are_not_compiled_one_by_one(compiler, gradient_checkpointing):
    expected = steps(compiled=False, gradient_checkpointing=gradient_checkpointing)
    assert not counters["stats"], "nothing is compiled that was not asked for"
    found = steps(compiled=True, gradient_checkpointing=gradient_checkpointing)
    assert torch.tensor(found) == pytest.approx(torch.tensor(expected), rel=1e-5)
    assert not counters["graph_break"]
    # The first block and the others, with a mask and without.
    assert 1 <= counters["stats"]["unique_graphs"] <= 4


def test_every_block_is_compiled_for_any_length(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append((function.__self__, how)) or function)
    model = tiny_llama()
    compile_blocks(model)
    assert asked == [(block, {"dynamic": True}) for block in transformer_blocks(model)[1]]
