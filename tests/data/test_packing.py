"""Micro-batches keep the bound, and packed samples do not see each other."""

import random

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


@pytest.mark.parametrize("batching", Batching)
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


def test_plan_fills_micro_batches_well():
    lengths = [len(sample.input_ids) for sample in samples(200)]
    (steps,) = plan_micro_batches(lengths, 128)
    assert len(steps) <= 1.1 * sum(lengths) / 128 + 1


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
