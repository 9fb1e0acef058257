"""Self-distillation: on text that the model wrote itself, it is held to what it said before it was trained.

    loss of a step = loss of the data + distill_weight * KL(start || current)      nats per token

The text is cut into pieces of at most `distill_tokens` tokens, and the pieces are put together to as many for each
step; a run that has more steps than there are pieces begins again. Which piece a step gets, and its weight, depend on
neither the number of processes nor the size of the micro-batches. (Hinton et al. 2015, arXiv:1503.02531; Li and Hoiem
2016, arXiv:1606.09282, where the teacher is the model's own start and no old data is needed.)
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from osft.data.chat import Sample
from osft.data.packing import Feeding
from osft.data.samples import SampleList, Samples
from osft.settings.training import TrainConfig
from osft.training.teacher import TaughtBatch, taught


@dataclass(frozen=True, slots=True)
class DistilledText:
    """What one optimizer step distils."""

    batches: Sequence[TaughtBatch]
    """This rank's."""
    num_tokens: int
    """Predictions that are compared, over all ranks."""
    weight: float
    """Of their mean divergence in the loss."""


NOTHING_DISTILLED = DistilledText((), 0, 0.0)


class Distillation:
    """The self-written text in the order of the steps, with what the start says of it, which is measured once.

    Make it on all ranks while the model is the start, its coefficients zero.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, text: Samples, feeding: Feeding) -> None:
        longest = config.distill_tokens
        pieces = SampleList([piece for i in range(len(text.lengths)) for piece in _pieces(text[i].input_ids, longest)])
        if not pieces.lengths:
            raise ValueError("there is no self-written text to distil. Give distill_weight=0, or another model")
        self._steps = []
        for group in _groups(pieces.lengths, longest, config.seed):
            num_tokens = sum(pieces.num_loss_tokens[i] for i in group)
            self._steps.append(DistilledText(taught(model, pieces, feeding, group), num_tokens, config.distill_weight))

    def of_step(self, number: int) -> DistilledText:
        """What step `number`, from 1, distils."""
        return self._steps[(number - 1) % len(self._steps)]


def _pieces(tokens: list[int], longest: int) -> list[Sample]:
    """As few pieces of about one length as the bound allows. All tokens count, so at least two."""
    count = -(-len(tokens) // longest)
    bounds = [len(tokens) * i // count for i in range(count + 1)]
    parts = [tokens[start:stop] for start, stop in pairwise(bounds)]
    return [Sample(part, part) for part in parts if len(part) > 1]


def _groups(lengths: Sequence[int], tokens: int, seed: int) -> list[list[int]]:
    """The pieces in a random order, as many together as `tokens` allows."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    groups: list[list[int]] = [[]]
    for piece in order:
        if groups[-1] and sum(lengths[i] for i in groups[-1]) + lengths[piece] > tokens:
            groups.append([])
        groups[-1].append(piece)
    return groups
