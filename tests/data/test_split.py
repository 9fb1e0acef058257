"""Neither side of a split stays empty where there are two prompts."""

import hashlib
from collections.abc import Iterable

import numpy as np
import pytest

from osft.data.record_spool import DIGEST
from osft.data.split import by_prompt, is_held_out


def prompts(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


def held_out(hashes: Iterable[str], fraction: float, **options: bool) -> set[str]:
    """The prompts that are held out, of records with these."""
    names = list(hashes)
    mask = by_prompt(np.frombuffer(bytes.fromhex("".join(names)), DIGEST), fraction, **options)
    chosen = {name for name, is_out in zip(names, mask, strict=True) if is_out}
    assert chosen.isdisjoint(name for name, is_out in zip(names, mask, strict=True) if not is_out)
    return chosen


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3, 100])
def test_both_sides_have_a_prompt(fraction, count):
    chosen = held_out(prompts(count) * 3, fraction)
    assert 0 < len(chosen) < count
    by_hash = {prompt for prompt in prompts(count) if is_held_out(prompt, fraction)}
    assert len(chosen ^ by_hash) <= 1, "only where a side would be empty"
    if 0 < len(by_hash) < count:
        assert chosen == by_hash


def test_the_prompt_that_is_moved_depends_on_the_prompts_only():
    assert held_out(prompts(9), 1e-9) == held_out(reversed(prompts(9)), 1e-9) == {min(prompts(9))}
    assert held_out(prompts(9), 1 - 1e-9) == set(prompts(9)) - {max(prompts(9))}


def test_a_fraction_of_0_holds_nothing_out_unless_one_is_wanted():
    assert held_out(prompts(9), 0) == set()
    assert held_out(prompts(9), 0, at_least_one=True) == {min(prompts(9))}
    assert held_out(prompts(1), 0, at_least_one=True) == set()


def test_no_record_is_held_out_of_none():
    assert len(by_prompt(np.array([], DIGEST), 0.1)) == 0
