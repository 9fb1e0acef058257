"""What a factor set is like, in a small file: what the report of a round shows of it when the factors are gone.

It is written by whoever has the factors. A weight of 4,096 directions takes 3 kB in it, its factors 200 MB.
"""

from typing import ClassVar

import torch

from osft.settings.subspace import FreeSubspace, Protect
from osft.storage.record import Record, RecordPart
from osft.subspace.factor_set import FactorSet

POINTS = 300
"""Values of a spectrum that are kept at most."""


class WeightSpectrum(RecordPart):
    """The spectrum of one target weight, or of its inputs (`FactorSet.spectrum`), and where it is split."""

    rank: int
    """Unfrozen directions."""
    size: int
    """All directions."""
    energy: float
    """The sum of the squares of all values."""
    frozen_energy: float
    """That of the frozen ones."""
    indices: tuple[int, ...]
    """Of `values`, from 0, ascending: evenly spread, both ends included."""
    values: tuple[float, ...]
    """Descending."""


class FactorSummary(Record):
    """A factor set without its factors."""

    FORMAT: ClassVar[int] = 1

    key: str
    """Of the set."""
    protect: Protect
    unfreeze_rank_ratio: float
    free_subspace: FreeSubspace
    statistics: str | None
    """With protect="activations": the file of the statistics that it was computed from, relative to the store."""
    weights: dict[str, WeightSpectrum]
    """By target."""


def summarized(factors: FactorSet) -> FactorSummary:
    """The summary of a set whose files are on this machine."""
    return FactorSummary(
        key=factors.key,
        protect=factors.protect,
        unfreeze_rank_ratio=factors.unfreeze_rank_ratio,
        free_subspace=factors.free_subspace,
        statistics=factors.statistics,
        weights={name: _spectrum(factors.spectrum(name), weight.rank) for name, weight in factors.weights.items()},
    )


def _spectrum(values: torch.Tensor, rank: int) -> WeightSpectrum:
    """values: (n,), descending."""
    squares, size = values.double().square(), len(values)
    indices = torch.linspace(0, size - 1, min(size, POINTS), dtype=torch.float64).round().long()
    return WeightSpectrum(
        rank=rank,
        size=size,
        energy=squares.sum().item(),
        frozen_energy=squares[: size - rank].sum().item(),
        indices=tuple(indices.tolist()),
        values=tuple(float(f"{value:.6g}") for value in values[indices].tolist()),
    )
