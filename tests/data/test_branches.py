"""Samples that begin alike share their beginning, and the model says of each what it says of it alone."""

import itertools
import random

import pytest
import torch

from osft.data.branches import branches_of, plan_branches
from osft.data.chat import IGNORE, Sample
from osft.data.packing import Batching, Feeding, collate
from osft.data.samples import SampleList
from osft.models.likelihood import sample_nll, token_nll
from tests.conftest import tiny_llama


def sequences(count: int, seed: int = 0) -> list[list[int]]:
    """Of two tokens only, so that many begin alike, are equal, or are the beginning of another."""
    numbers = random.Random(seed)
    return [[numbers.randrange(2) for _ in range(numbers.randrange(1, 9))] for _ in range(count)]


def samples(count: int, seed: int = 0) -> list[Sample]:
    numbers = random.Random(seed)
    return [
        Sample(tokens, [token if numbers.random() < 0.5 else IGNORE for token in tokens])
        for tokens in sequences(count, seed)
    ]


def size_of_tree(of: list[list[int]]) -> int:
    """Different beginnings, of one token or more."""
    return len({tuple(sequence[:end]) for sequence in of for end in range(1, len(sequence) + 1)})


@pytest.mark.parametrize("seed", range(5))
def test_each_token_lies_in_the_row_once_and_is_seen_by_what_follows_it(seed):
    given = sequences(12, seed)
    tree = branches_of(given)
    assert len(tree.input_ids) == size_of_tree(given)
    for sequence, places in zip(given, tree.places, strict=True):
        assert [tree.input_ids[place] for place in places] == sequence
        assert [tree.position_ids[place] for place in places] == list(range(len(sequence)))
        for position, query in enumerate(places):
            seen = [key for key, end in enumerate(tree.ends) if key <= query < end]
            assert seen == places[: position + 1]


def test_a_question_is_computed_once_for_all_records_and_a_prompt_for_all_its_answers():
    question, prompts, answers = [*range(50, 90)], ([1, 2, 3], [1, 4]), ([7, 1], [7, 2, 3], [8, 9])
    together = [
        Sample(question + prompt + answer, [IGNORE] * len(question + prompt) + answer)
        for prompt, answer in itertools.product(prompts, answers)
    ]
    batch = collate(together, Batching.BRANCHED)
    assert batch.input_ids.shape == (1, 40 + (1 + 2 + 6) + (1 + 6))
    assert batch.targets.tolist() == 2 * [7, 1, 7, 2, 3, 8, 9]
    assert batch.sample_of_target.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5]


@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients_are_those_of_samples_alone(seed):
    model, made = tiny_llama(seed=1), samples(12, seed)

    def computed(batches: list[list[Sample]], batching: Batching) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        losses = [token_nll(model, collate(held, batching)) for held in batches]
        torch.cat(losses).sum().backward()
        return torch.cat(losses).detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    alone, gradients = computed([[sample] for sample in made], Batching.PADDED)
    together, same_gradients = computed([made], Batching.BRANCHED)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    for found, expected in zip(same_gradients, gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("max_tokens", [8, 20, 10_000])
@pytest.mark.parametrize("count", [0, 1, 5, 64])
def test_plan_keeps_the_bound_and_every_sample_once(world_size, max_tokens, count):
    given = sequences(count)
    plan = plan_branches(given, max_tokens, world_size)
    assert len(plan) == world_size
    assert len({len(steps) for steps in plan}) == 1, "every rank takes part in every collective"
    bins = [bin for steps in plan for bin in steps]
    assert sorted(position for bin in bins for position in bin) == list(range(count))
    sizes = [size_of_tree([given[p] for p in bin]) for bin in bins]
    assert max(sizes) <= max_tokens
    if max_tokens == 10_000 and count == 64:
        assert sum(sizes) < 0.8 * sum(map(len, given))
        assert max(sizes) < 1.5 * sum(sizes) / len(sizes), "the ranks have about as much to do"


def test_a_sample_that_no_micro_batch_holds_is_named():
    with pytest.raises(ValueError, match="sample 1 has 9 tokens, more than max_tokens=8"):
        plan_branches([[1] * 8, [2] * 9, [3]], 8)


def test_more_samples_than_are_read_at_once_have_their_losses(monkeypatch):
    monkeypatch.setattr("osft.data.packing._READ_AT_ONCE", 5)
    made = SampleList(samples(17))
    model, device = tiny_llama(seed=1), torch.device("cpu")
    found, expected = (
        sample_nll(model, made, Feeding(max_tokens=12, device=device, batching=batching))
        for batching in (Batching.BRANCHED, Batching.PADDED)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
