"""Sharing the weights of a model among processes that split them."""

from collections.abc import Iterable

from osft.subspace.targets import Target


def share_of(targets: Iterable[Target], number: int, processes: int) -> list[Target]:
    """The weights of process `number` of so many: the dearest first, each to the process that has least to do.

    Longest processing time first: the last process ends at most 4/3 of the shortest possible time (Graham, 1969,
    "Bounds on multiprocessing timing anomalies"). The same in every process; with one, all of them in their order.
    """
    given = list(targets)
    loads, chosen = [0.0] * processes, set()
    for target in sorted(given, key=lambda target: (-cost(target.shape), target.name)):
        least = loads.index(min(loads))
        loads[least] += cost(target.shape)
        if least == number:
            chosen.add(target.name)
    return [target for target in given if target.name in chosen]


def cost(shape: tuple[int, ...]) -> float:
    """About the multiplications of `decompose`: the Gram matrix of the short side, and its eigenvectors."""
    *stack, m, n = shape
    short, long = sorted((m, n))
    return (stack[0] if stack else 1) * short**2 * (long + 12.0 * short)
