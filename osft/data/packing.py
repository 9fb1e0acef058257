"""Samples -> micro-batches under a token budget.

Samples are packed head to tail into one row; their position ids start again at 0, which is how `transformers`
recognizes packed samples and keeps them from attending to each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from osft.data.chat import IGNORE, Sample


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass reads. T tokens, of which L count in the loss."""

    input_ids: torch.Tensor
    """(1, T), int64."""
    position_ids: torch.Tensor
    """(1, T), int64; starts at 0 with each sample."""
    loss_positions: torch.Tensor
    """(L,), int64: the positions whose output predicts a token that counts."""
    targets: torch.Tensor
    """(L,), int64: the tokens that they should predict."""
    sample_of_target: torch.Tensor
    """(L,), int64: which of the packed samples each target belongs to."""

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same on `device`."""
        return MicroBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.loss_positions.to(device),
            self.targets.to(device),
            self.sample_of_target.to(device),
        )


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """Pack samples into one row. Without samples: one token and no loss, for a process that has nothing to do."""
    if not samples:
        samples = [Sample([0], [IGNORE])]
    input_ids = torch.tensor([token for sample in samples for token in sample.input_ids])
    position_ids = torch.cat([torch.arange(len(sample.input_ids)) for sample in samples])
    # The first token of a sample is never a target: the position before it belongs to another sample.
    labels = torch.tensor([label for sample in samples for label in [IGNORE, *sample.labels[1:]]])
    sample_index = torch.tensor([index for index, sample in enumerate(samples) for _ in sample.input_ids])
    (target_positions,) = (labels != IGNORE).nonzero(as_tuple=True)
    return MicroBatch(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        loss_positions=target_positions - 1,
        targets=labels[target_positions],
        sample_of_target=sample_index[target_positions],
    )


def plan_micro_batches(lengths: Sequence[int], max_tokens: int, world_size: int = 1) -> list[list[list[int]]]:
    """Distribute samples over processes and micro-batches: `plan[rank][step]` lists positions in `lengths`.

    Every micro-batch holds at most `max_tokens` tokens, every rank has as many micro-batches as the others (an
    empty list where there is nothing to do), and the longest samples go first to the least filled micro-batch.
    Raises ValueError if a sample alone exceeds `max_tokens`.
    """
    too_long = [position for position, length in enumerate(lengths) if length > max_tokens]
    if too_long:
        raise ValueError(f"sample {too_long[0]} has {lengths[too_long[0]]} tokens, more than max_tokens={max_tokens}")
    longest_first = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    rounds = max(1, -(-sum(lengths) // (max_tokens * world_size)))
    while True:
        bins: list[list[int]] = [[] for _ in range(rounds * world_size)]
        filled = [0] * len(bins)
        for position in longest_first:
            least = min(range(len(bins)), key=filled.__getitem__)
            bins[least].append(position)
            filled[least] += lengths[position]
        if max(filled) <= max_tokens:
            return [bins[rank::world_size] for rank in range(world_size)]
        rounds += 1
