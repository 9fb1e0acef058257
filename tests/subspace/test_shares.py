"""Weights shared among processes by what they cost."""

import pytest

from osft.subspace.shares import cost, share_of
from osft.subspace.targets import Target


def a_model(blocks: int) -> list[Target]:
    """The weights of Llama blocks."""
    shapes = {"q": (2048, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 2048)}
    shapes |= {"gate": (5632, 2048), "up": (5632, 2048), "down": (2048, 5632)}
    return [
        Target(name=f"{block}.{name}", tensor=f"{block}.{name}.weight", shape=shape)
        for block in range(blocks)
        for name, shape in shapes.items()
    ]


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 64])
def test_every_weight_is_in_one_share_and_no_process_has_much_more_to_do(processes):
    targets = a_model(4)
    shares = [share_of(targets, number, processes) for number in range(processes)]
    assert sorted(t.name for share in shares for t in share) == sorted(t.name for t in targets)
    loads = [sum(cost(target.shape) for target in share) for share in shares]
    dearest, mean = max(cost(target.shape) for target in targets), sum(loads) / processes
    assert max(loads) <= max(dearest, 4 / 3 * mean)
    assert share_of(targets, 0, 1) == targets


def test_a_stack_of_experts_costs_what_its_experts_cost():
    assert cost((8, 512, 2048)) == 8 * cost((512, 2048)) == 8 * cost((2048, 512))
