"""Samples that begin alike -> one copy of what they begin with, from which they branch.

A chat template opens every sample with the same words, a task asks the same question of each record, and the answers
that are compared of a record differ in their last few tokens. Here the row of a micro-batch holds a prefix tree: tokens
that samples have in common up to a place lie there once, each at the position that it has in the samples, and a token
sees those between the tree's root and itself. That is what it sees in a sample of its own, so outputs and gradients are
those of samples head to tail but for rounding.

Only a model whose attention takes a mask of any form can compute that, which is measured (`osft.subspace.preflight`).
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Branches:
    """Sequences in one row, depth first: what follows a token lies behind it, and then the rest."""

    input_ids: list[int]
    position_ids: list[int]
    ends: list[int]
    """For each token, the place behind all that follow it. Those before that place, and none beyond it, see it."""
    places: list[list[int]]
    """For each sequence, in which places its tokens lie."""


def branches_of(sequences: Sequence[list[int]]) -> Branches:
    """The prefix tree of sequences of tokens."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    ends: list[int] = []
    places: list[list[int]] = [[] for _ in sequences]
    path: list[int] = []
    previous: list[int] = []
    for index in _in_order(sequences):
        sequence = sequences[index]
        shared = _num_shared(previous, sequence)
        for place in path[shared:]:
            ends[place] = len(input_ids)
        path[shared:] = range(len(input_ids), len(input_ids) + len(sequence) - shared)
        input_ids += sequence[shared:]
        position_ids += range(shared, len(sequence))
        ends += [0] * (len(sequence) - shared)
        places[index] = path.copy()
        previous = sequence
    for place in path:
        ends[place] = len(input_ids)
    return Branches(input_ids, position_ids, ends, places)


def plan_branches(sequences: Sequence[list[int]], max_tokens: int, world_size: int = 1) -> list[list[list[int]]]:
    """As `osft.data.packing.plan_micro_batches`, of sequences that share what they begin with: `plan[rank][step]`.

    Sequences that begin alike are put together, so a micro-batch is a run of them in lexicographic order. There are as
    many micro-batches as such runs of at most `max_tokens` tokens take, up to a multiple of `world_size`, each as small
    as that number allows. Raises ValueError if a sequence alone exceeds `max_tokens`.
    """
    order = _in_order(sequences)
    ordered = [sequences[index] for index in order]
    lengths = [len(sequence) for sequence in ordered]
    if lengths and (longest := max(lengths)) > max_tokens:
        first = next(index for index, sequence in enumerate(sequences) if len(sequence) == longest)
        raise ValueError(f"sample {first} has {longest} tokens, more than max_tokens={max_tokens}")
    # What each adds to a row in which the one before it lies.
    added = [
        len(sequence) - _num_shared(before, sequence) for before, sequence in zip([[], *ordered], ordered, strict=False)
    ]

    def runs(budget: int) -> list[list[int]]:
        found: list[list[int]] = []
        room = -1
        for index, length, more in zip(order, lengths, added, strict=True):
            if more <= room:
                found[-1].append(index)
                room -= more
            else:
                found.append([index])
                room = budget - length
        return found

    wanted = -(-max(1, len(runs(max_tokens))) // world_size) * world_size
    low, high = max([1, *lengths]), max_tokens
    while low < high:  # the smallest budget that needs no more micro-batches
        middle = (low + high) // 2
        low, high = (low, middle) if len(runs(middle)) <= wanted else (middle + 1, high)
    bins = runs(low)
    bins += [[] for _ in range(wanted - len(bins))]
    return [bins[rank::world_size] for rank in range(world_size)]


def _in_order(sequences: Sequence[list[int]]) -> list[int]:
    """The sequences' numbers, those that begin alike next to each other."""
    return sorted(range(len(sequences)), key=lambda index: sequences[index])


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens with which both begin."""
    for position, (token, of_other) in enumerate(zip(one, other, strict=False)):
        if token != of_other:
            return position
    return min(len(one), len(other))
