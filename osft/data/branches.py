"""Answers to one prompt -> one copy of the prompt, from which they branch.

The answers that are compared of a record differ in their last few tokens, and all else would be computed once for each.
Here the tokens before them lie in a row once; each answer follows them, at the positions it has alone, and sees them
and itself. Only a model whose attention takes a mask of any form can compute that, which is measured
(`osft.subspace.preflight`); others get each answer with a prompt of its own.
"""

from collections.abc import Sequence

import torch

from osft.data.chat import IGNORE, Sample
from osft.data.packing import Batching, MicroBatch


def num_tokens(group: Sequence[Sample]) -> int:
    """What `collate_branches` makes of a group, in tokens."""
    shared = _num_shared(group)
    return shared + sum(len(sample.input_ids) - shared for sample in group)


def collate_branches(groups: Sequence[Sequence[Sample]]) -> MicroBatch:
    """Groups of samples that begin alike in one row. `sample_of_target` counts the samples of all groups, in order."""
    input_ids: list[int] = []
    positions: list[int] = []
    branches: list[int] = []
    loss_positions: list[int] = []
    targets: list[int] = []
    sample_of_target: list[int] = []
    sample_index = 0
    for group in groups:
        shared, root = _num_shared(group), len(input_ids)
        input_ids += group[0].input_ids[:shared]
        positions += range(shared)
        branches += [0] * shared
        for branch, sample in enumerate(group, start=1):
            start = len(input_ids) - shared  # where the sample would begin if this were all its own
            for position in range(shared, len(sample.input_ids)):
                if position and sample.labels[position] != IGNORE:
                    loss_positions.append(root + shared - 1 if position == shared else start + position - 1)
                    targets.append(sample.labels[position])
                    sample_of_target.append(sample_index)
            input_ids += sample.input_ids[shared:]
            positions += range(shared, len(sample.input_ids))
            branches += [branch] * (len(sample.input_ids) - shared)
            sample_index += 1
    rows = torch.tensor([input_ids, positions, branches])[:, None]
    return MicroBatch(
        input_ids=rows[0],
        position_ids=rows[1],
        loss_positions=torch.tensor(loss_positions, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        sample_of_target=torch.tensor(sample_of_target, dtype=torch.int64),
        is_token=torch.ones_like(rows[0], dtype=torch.bool),
        batching=Batching.BRANCHED,
        branches=rows[2],
    )


def _num_shared(group: Sequence[Sample]) -> int:
    """Tokens with which all samples of a group begin and which nobody predicts. Each keeps one or more of its own."""
    first, *others = group
    most = min(len(sample.input_ids) for sample in group) - 1
    for position in range(most):
        if position and any(sample.labels[position] != IGNORE for sample in group):
            return position
        if any(sample.input_ids[position] != first.input_ids[position] for sample in others):
            return position
    return most
