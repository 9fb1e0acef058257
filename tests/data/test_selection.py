"""The samples that are held out to choose by depend on their prompts only."""

import random

import pytest

from osft.data.chat import IGNORE, Sample
from osft.data.samples import SampleList
from osft.data.selection import LEAST, select, selection_size


def chats(prompts: list[int], answers: int = 1) -> list[Sample]:
    """Samples of some prompts, with so many different answers each."""
    return [
        Sample([7, prompt // 256, prompt % 256, answer, 1], [IGNORE, IGNORE, IGNORE, answer, 1])
        for prompt in prompts
        for answer in range(answers)
    ]


def held_out(samples: list[Sample], wanted: int = 64) -> list[Sample]:
    return [samples[i] for i in select(SampleList(samples), wanted)]


def keys(samples: list[Sample]) -> set[tuple[int, ...]]:
    return {tuple(sample.input_ids) for sample in samples}


@pytest.mark.parametrize(
    ("num_samples", "wanted", "size"), [(32, 64, 16), (400, 64, 40), (5000, 64, 64), (400, 20, 20)]
)
def test_a_tenth_is_held_out_but_a_few_at_least(num_samples, wanted, size):
    assert selection_size(num_samples, wanted) == size
    assert len(held_out(chats(list(range(num_samples))), wanted)) == size


def test_too_few_samples_are_refused_by_their_number():
    with pytest.raises(ValueError, match="at least 16 of the training samples, and there are 31. Give at least 32"):
        select(SampleList(chats(list(range(31)))), 64)


def test_order_of_the_samples_does_not_matter():
    samples = chats(list(range(300)))
    shuffled = random.Random(0).sample(samples, len(samples))
    assert keys(held_out(shuffled)) == keys(held_out(samples))


def test_of_data_that_grows_what_was_held_out_mostly_stays():
    small, large = chats(list(range(1000))), chats(list(range(1100)))
    assert len(keys(held_out(small)) & keys(held_out(large))) > 50


def test_one_question_is_on_one_side():
    samples = chats(list(range(100)), answers=3)
    chosen = select(SampleList(samples), 64)
    trained = [samples[i] for i in range(len(samples)) if i not in set(chosen)]
    assert LEAST <= len(chosen) <= 32
    prompts = [{tuple(s.input_ids[:3]) for s in side} for side in (trained, [samples[i] for i in chosen])]
    assert not prompts[0] & prompts[1]


def test_text_without_a_prompt_is_told_apart_by_its_tokens():
    texts = [Sample([1, 2, i], [1, 2, i]) for i in range(100)]
    assert len(held_out(texts + texts)) == 20, "both copies of a text are on one side"
    assert len(keys(held_out(texts + texts))) == 10


def test_one_prompt_for_all_samples_is_refused():
    with pytest.raises(ValueError, match="16 of the 40 training samples by whole prompts, and the 1 .* give 40. Give"):
        select(SampleList(chats([1], answers=40)), 64)


def test_prompt_that_other_training_data_has_is_not_held_out():
    samples, replayed = chats(list(range(100))), chats(list(range(0, 100, 2)))
    chosen = select(SampleList(samples), 64, others=SampleList(replayed))
    assert len(chosen) == 16
    assert all(index % 2 for index in chosen)
    with pytest.raises(ValueError, match="the 0 different prompts that are not replayed, too, give 0"):
        select(SampleList(samples), 64, others=SampleList(samples))
