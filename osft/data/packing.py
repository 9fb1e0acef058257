"""Samples -> micro-batches under a token budget.

Packed, samples follow each other in one row; their position ids start again at 0, which is how `transformers`
recognizes packed samples and keeps them from attending to each other. A model that cannot keep them apart (a recurrent
state runs through the row) gets one sample a row: rows are filled up on the right, where a causal model does not look.
Which of the two a model needs is measured (`osft.subspace.preflight`), and whether samples can share a beginning.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from osft.data.branches import branches_of, plan_branches
from osft.data.chat import IGNORE, Sample
from osft.data.samples import Samples


class Batching(StrEnum):
    """How the samples of a micro-batch lie in the rows that a model reads."""

    PACKED = "packed"
    """Head to tail in one row, kept apart by the attention mask and the position ids."""
    PADDED = "padded"
    """One sample a row."""
    BRANCHED = "branched"
    """In one row, and samples that begin alike share what they begin with (`osft.data.branches`)."""


FAST_TOKENS = {"cuda": 2048, "cpu": 512}
"""Of a micro-batch, by the kind of device: with how many the model computes fast what need not be in few batches.
A CPU that masks a packed row computes what the mask hides, too."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass reads. R rows of T tokens; L of these tokens count in the loss."""

    input_ids: torch.Tensor
    """(R, T), int64. R is 1 but where samples have rows of their own."""
    position_ids: torch.Tensor
    """(R, T), int64: of each token in its sample, from 0."""
    loss_positions: torch.Tensor
    """(L,), int64: the positions in all rows, one row after the other, whose output predicts a token that counts."""
    targets: torch.Tensor
    """(L,), int64: the tokens that they should predict."""
    sample_of_target: torch.Tensor
    """(L,), int64: which of the samples each target belongs to."""
    is_token: torch.Tensor
    """(R, T), bool: False where a row is filled up."""
    batching: Batching
    longest: int
    """Tokens of the longest sample."""
    ends: torch.Tensor | None = None
    """(R, T), int64, of branched samples: the place in the row behind all tokens that see this one."""
    boundaries: torch.Tensor | None = None
    """(samples + 1,), int32, of packed samples: where each begins, and where the last one ends."""

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same on `device`, as `on_device`."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: on_device(value, device) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return MicroBatch(**(values | tensors))


def on_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor there. From the CPU to a GPU it is copied without waiting for what the GPU does."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Feeding:
    """How a process feeds samples to its model."""

    max_tokens: int
    """Of a micro-batch."""
    device: torch.device
    batching: Batching = Batching.PACKED
    rank: int = 0
    world_size: int = 1

    def batches(self, samples: Samples, indices: Sequence[int] | None = None) -> Iterator[tuple[list[int], MicroBatch]]:
        """This rank's micro-batches of some samples (all by default), and the indices of those that each holds.

        Every rank gets as many as the others; one that has nothing to do, micro-batches without a loss.
        """
        chosen = range(len(samples.lengths)) if indices is None else indices
        if self.batching is Batching.BRANCHED:
            yield from self._branched(samples, chosen)
            return
        plan = plan_micro_batches([samples.lengths[i] for i in chosen], self.max_tokens, self.world_size, self.batching)
        for positions in plan[self.rank]:
            held = [chosen[position] for position in positions]
            yield held, collate([samples[i] for i in held], self.batching).to(self.device)

    def _branched(self, samples: Samples, chosen: Sequence[int]) -> Iterator[tuple[list[int], MicroBatch]]:
        """What they begin with says which belong together, so they are read before that is planned: some at a time."""
        for start in range(0, max(1, len(chosen)), _READ_AT_ONCE):
            numbers = chosen[start : start + _READ_AT_ONCE]
            read = [samples[i] for i in numbers]
            plan = plan_branches([sample.input_ids for sample in read], self.max_tokens, self.world_size)
            for positions in plan[self.rank]:
                batch = collate([read[position] for position in positions], self.batching)
                yield [numbers[position] for position in positions], batch.to(self.device)


_READ_AT_ONCE = 1024


def collate(samples: Sequence[Sample], batching: Batching = Batching.PACKED) -> MicroBatch:
    """Lay samples out in rows. Without samples: one token and no loss, for a process that has nothing to do."""
    if not samples:
        samples = [Sample([0], [IGNORE])]
    if batching is Batching.BRANCHED:
        return _collate_branches(samples)
    lengths = [len(sample.input_ids) for sample in samples]
    packed = batching is Batching.PACKED
    width = sum(lengths) if packed else max(lengths)
    starts = list(accumulate(lengths[:-1], initial=0)) if packed else range(0, len(samples) * width, width)
    rows = 1 if packed else len(samples)
    input_ids = torch.zeros(rows * width, dtype=torch.int64)
    # Counted on over what fills a row up: position ids that start again would announce another sample.
    position_ids = torch.arange(width).repeat(rows)
    labels = torch.full_like(input_ids, IGNORE)
    sample_index = torch.full_like(input_ids, -1)
    for index, (start, sample) in enumerate(zip(starts, samples, strict=True)):
        stop = start + len(sample.input_ids)
        input_ids[start:stop] = torch.as_tensor(sample.input_ids)
        position_ids[start:stop] = torch.arange(stop - start)
        # The first token of a sample is never a target: the position before it belongs to another sample.
        labels[start + 1 : stop] = torch.as_tensor(sample.labels[1:])
        sample_index[start:stop] = index
    (target_positions,) = (labels != IGNORE).nonzero(as_tuple=True)
    return MicroBatch(
        input_ids=input_ids.view(rows, width),
        position_ids=position_ids.view(rows, width),
        loss_positions=target_positions - 1,
        targets=labels[target_positions],
        sample_of_target=sample_index[target_positions],
        is_token=(sample_index >= 0).view(rows, width),
        batching=batching,
        longest=max(lengths),
        boundaries=torch.tensor([*starts, width], dtype=torch.int32) if packed else None,
    )


def _collate_branches(samples: Sequence[Sample]) -> MicroBatch:
    """`collate`, of a prefix tree. What several samples predict at one place are as many targets."""
    branches = branches_of([sample.input_ids for sample in samples])
    found = [
        (places[position - 1], sample.labels[position], index)
        for index, (sample, places) in enumerate(zip(samples, branches.places, strict=True))
        for position in range(1, len(places))
        if sample.labels[position] != IGNORE
    ]
    loss_positions, targets, sample_of_target = torch.tensor(found, dtype=torch.int64).reshape(-1, 3).unbind(1)
    rows = torch.tensor([branches.input_ids, branches.position_ids, branches.ends])[:, None]
    return MicroBatch(
        input_ids=rows[0],
        position_ids=rows[1],
        loss_positions=loss_positions,
        targets=targets,
        sample_of_target=sample_of_target,
        is_token=torch.ones_like(rows[0], dtype=torch.bool),
        batching=Batching.BRANCHED,
        longest=max(len(sample.input_ids) for sample in samples),
        ends=rows[2],
    )


def plan_micro_batches(
    lengths: Sequence[int], max_tokens: int, world_size: int = 1, batching: Batching = Batching.PACKED
) -> list[list[list[int]]]:
    """Distribute samples over processes and micro-batches: `plan[rank][step]` lists positions in `lengths`.

    Every micro-batch holds at most `max_tokens` tokens, those that fill up rows included, and every rank has as many
    micro-batches as the others (an empty list where there is nothing to do): as many as the bound needs, up to a
    multiple of `world_size`, and each as small as that number allows (MULTIFIT; Coffman, Garey & Johnson 1978), so that
    the ranks have about as much to do. O(n log n) of n samples. Raises ValueError if a sample alone exceeds
    `max_tokens`.
    """
    sizes = np.maximum(np.asarray(lengths, np.int64), 1)
    if len(sizes) and sizes.max() > max_tokens:
        first = int((sizes > max_tokens).argmax())
        raise ValueError(f"sample {first} has {lengths[first]} tokens, more than max_tokens={max_tokens}")
    different, numbers = (found.tolist() for found in np.unique(sizes, return_counts=True))
    fill = _fill_rows if batching is Batching.PADDED else _fill_packed

    def needed(budget: int) -> int:
        return sum(repeats for repeats, _ in fill(different, numbers, budget))

    wanted = -(-max(1, needed(max_tokens)) // world_size) * world_size
    low, high = max([*different[-1:], -(-int(sizes.sum()) // wanted)]), max_tokens
    while low < high:  # the smallest budget that needs no more micro-batches
        middle = (low + high) // 2
        low, high = (low, middle) if needed(middle) <= wanted else (middle + 1, high)

    kinds = fill(different, numbers, low)
    kinds.sort(key=lambda kind: -sum(different[at] * count for at, count in kind[1]))  # a step's are about as large
    by_size, first_of = np.argsort(sizes, kind="stable").tolist(), [0, *accumulate(numbers)]
    bins: list[list[int]] = []
    for repeats, taken in kinds:
        for _ in range(repeats):
            bins.append([])
            for at, count in taken:
                bins[-1] += by_size[first_of[at] : first_of[at] + count]
                first_of[at] += count
    bins += [[] for _ in range(wanted - len(bins))]
    return [bins[rank::world_size] for rank in range(world_size)]


_Kind = tuple[int, list[tuple[int, int]]]
"""How many micro-batches are alike, and what is in each: which of the different lengths, and how many samples."""


def _fill_packed(different: Sequence[int], numbers: Sequence[int], budget: int) -> list[_Kind]:
    """First-fit decreasing, one micro-batch after another: each takes the longest sample that fits, again and again.

    `numbers` of samples have the `different` lengths, ascending. As long as there are enough, micro-batches are alike:
    the time depends on the different lengths, not on the number of samples.
    """
    left = [0, *numbers]
    shorter = list(range(len(left)))  # shorter[i] <= i: towards the longest that is left of the first i lengths

    def longest(of: int) -> int:
        while shorter[of] != of:
            shorter[of] = of = shorter[shorter[of]]
        return of

    kinds: list[_Kind] = []
    while at := longest(len(different)):
        room, taken = budget, list[tuple[int, int]]()
        while at:
            count = min(left[at], room // different[at - 1])
            taken.append((at - 1, count))
            room -= count * different[at - 1]
            at = longest(min(at - 1, bisect_right(different, room)))
        repeats = min(left[at + 1] // count for at, count in taken)
        for at, count in taken:
            left[at + 1] -= repeats * count
            if not left[at + 1]:
                shorter[at + 1] = at
        kinds.append((repeats, taken))
    return kinds


def _fill_rows(different: Sequence[int], numbers: Sequence[int], budget: int) -> list[_Kind]:
    """As `_fill_packed`, where each sample is a row as long as the first one of its micro-batch."""
    kinds: list[_Kind] = []
    room = 0  # rows
    for at in reversed(range(len(different))):
        count = min(numbers[at], room)
        if count:
            kinds[-1][1].append((at, count))
        room, left, rows = room - count, numbers[at] - count, budget // different[at]
        if left >= rows:
            kinds.append((left // rows, [(at, rows)]))
        if left % rows:
            kinds.append((1, [(at, left % rows)]))
            room = rows - left % rows
    return kinds
