"""Micro-batches keep the bound, and packed samples do not see each other."""

import math
import random

import numpy as np
import pytest
import torch

from osft.data.chat import IGNORE, Sample
from osft.data.packing import Batching, collate, plan_micro_batches
from osft.models.likelihood import token_nll
from tests.conftest import tiny_llama


def samples(count: int, seed: int = 0) -> list[Sample]:
    numbers = random.Random(seed)
    made = []
    for _ in range(count):
        tokens = [numbers.randrange(258) for _ in range(numbers.randrange(2, 40))]
        made.append(
            Sample(tokens, [IGNORE if numbers.random() < 0.5 else token for token in tokens[:-1]] + tokens[-1:])
        )
    return made


@pytest.mark.parametrize("batching", [Batching.PACKED, Batching.PADDED])
@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("max_tokens", [40, 100, 10_000])
@pytest.mark.parametrize("count", [1, 5, 64])
def test_plan_keeps_the_bound_and_every_sample_once(batching, world_size, max_tokens, count):
    """What fills rows up counts, too."""
    made = samples(count)
    plan = plan_micro_batches([len(sample.input_ids) for sample in made], max_tokens, world_size, batching)
    assert len(plan) == world_size
    assert len({len(steps) for steps in plan}) == 1, "every rank takes part in every collective"
    assert sorted(position for steps in plan for bin in steps for position in bin) == list(range(count))
    batches = [collate([made[p] for p in bin], batching) for steps in plan for bin in steps]
    assert max(batch.input_ids.numel() for batch in batches) <= max_tokens


def test_plan_of_rows_uses_every_rank_and_fills_up_little():
    lengths = [len(sample.input_ids) for sample in samples(200)]
    plan = plan_micro_batches(lengths, 10_000, 4, Batching.PADDED)
    computed = [sum(len(bin) * max(lengths[p] for p in bin) for bin in steps) for steps in plan]
    assert max(computed) <= 1.4 * sum(lengths) / 4
    (steps,) = plan_micro_batches(lengths, 128, batching=Batching.PADDED)
    assert sum(len(bin) * max(lengths[p] for p in bin) for bin in steps) <= 1.1 * sum(lengths)


def test_rows_are_filled_up_on_the_right_and_count_on():
    batch = collate([Sample([5, 6, 7], [IGNORE, 6, 7]), Sample([8, 9], [8, 9])], Batching.PADDED)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.is_token.tolist() == [[True, True, True], [True, True, False]]
    assert batch.loss_positions.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [6, 7, 9]
    assert batch.sample_of_target.tolist() == [0, 0, 1]


def least_largest(lengths: list[int], bins: int) -> int:
    """Tokens of the largest of so many micro-batches, of the best of all plans."""
    filled = {(0,) * bins}
    for length in lengths:
        filled = {
            tuple(sorted((*state[:at], state[at] + length, *state[at + 1 :]))) for state in filled for at in range(bins)
        }
    return min(state[-1] for state in filled)


@pytest.mark.parametrize("seed", range(40))
def test_plan_is_nearly_the_best_of_all(seed):
    """Within the bounds of first-fit decreasing and of MULTIFIT, which a mistake in either exceeds."""
    numbers = random.Random(seed)
    max_tokens, world_size = numbers.randrange(20, 60), numbers.choice([1, 2, 3])
    few = [numbers.randrange(1, 21) for _ in range(numbers.randrange(1, 5))]  # lengths that come again and again
    lengths = [numbers.choice([*few, numbers.randrange(1, 21)]) for _ in range(numbers.randrange(0, 9))]
    plan = plan_micro_batches(lengths, max_tokens, world_size)
    bins = [bin for steps in plan for bin in steps]
    assert sorted(position for bin in bins for position in bin) == list(range(len(lengths)))
    best = next(count for count in range(1, 10) if least_largest(lengths, count) <= max_tokens)
    assert len(bins) <= math.ceil((11 * best + 6) // 9 / world_size) * world_size
    largest = max(sum(lengths[position] for position in bin) for bin in bins)
    assert largest <= min(max_tokens, 13 / 11 * least_largest(lengths, len(bins)) + 1)


@pytest.mark.parametrize("equal", [False, True])
def test_plan_of_many_samples_wastes_little_and_is_balanced(equal):
    """Also of so many that a plan which looks at each micro-batch for each sample would take hours."""
    max_tokens, tail = 1600, np.random.default_rng(0).lognormal(5.0, 1.0, 100_000)
    lengths = [max_tokens // 8] * 100_000 if equal else np.clip(tail, 8, max_tokens).astype(int).tolist()
    plan = plan_micro_batches(lengths, max_tokens, 8)
    filled = np.array([[sum(lengths[position] for position in bin) for bin in steps] for steps in plan])
    assert filled.max() <= max_tokens
    assert filled.sum() == sum(lengths) >= 0.99 * filled.size * max_tokens
    assert filled.sum(axis=1).max() <= 1.02 * filled.sum(axis=1).mean()
    assert filled.max(axis=0).sum() <= 1.02 * filled.mean(axis=0).sum(), "in a step, ranks wait for the slowest"
    assert sorted(position for steps in plan for bin in steps for position in bin) == list(range(len(lengths)))
    assert plan == plan_micro_batches(lengths, max_tokens, 8)


def test_sample_over_the_bound_is_refused():
    with pytest.raises(ValueError, match="sample 1 has 50 tokens, more than max_tokens=40"):
        plan_micro_batches([10, 50], 40)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_are_isolated(attention):
    model = tiny_llama(attn_implementation=attention).eval()
    made = samples(6)
    with torch.no_grad():
        alone = [token_nll(model, collate([sample])) for sample in made]
        together = token_nll(model, collate(made))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    # The check itself would notice a leak: without the restarting positions the losses differ.
    batch = collate(made)
    batch.position_ids.copy_(torch.arange(batch.input_ids.shape[1]))
    with torch.no_grad():
        leaked = token_nll(model, batch)
    assert not torch.allclose(leaked, together, rtol=1e-3, atol=1e-3)


def test_targets_are_the_next_tokens_that_count():
    batch = collate([Sample([5, 6, 7], [IGNORE, 6, IGNORE]), Sample([8, 9], [8, 9])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.loss_positions.tolist() == [0, 3]
    assert batch.targets.tolist() == [6, 9]
    assert batch.sample_of_target.tolist() == [0, 1]


def test_micro_batch_without_samples_has_a_zero_gradient():
    model = tiny_llama()
    token_nll(model, collate([])).sum().backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())
