"""Splitting a weight with the help of the factors that the round before it was trained with (protect="weights").

The model's osft.json names that set. It is looked for in the store by its name, then where the model says that it is.

    the model                                        its weights are split
    names a set that is there                        from that (`osft.subspace.next_split`), each whose split follows
                                                     from it; the others, which a warning names, by `decompose`
    names one that is gone, damaged, or was made     by `decompose`, and a line says why
    with other settings
    is a base model, or names none                   by `decompose`
"""

import logging
from dataclasses import fields
from pathlib import Path

import torch

from osft import storage
from osft.models.origin import read_origin
from osft.settings.subspace import SubspaceConfig
from osft.storage.sealed import DamagedFile
from osft.subspace.decomposition import Factors, decompose
from osft.subspace.factor_set import FactorSet, FactorsMismatchError, read_factor_set
from osft.subspace.next_split import UnknownSplitError, next_split

logger = logging.getLogger(__name__)


class LastRound:
    """The factors that a model was trained with, if there are any."""

    def __init__(self, model_path: str | Path, store: str | Path, config: SubspaceConfig) -> None:
        """`model_path`: the model's folder. `store`: path or URI. Nothing but the set's manifest is read."""
        self._free_subspace = config.free_subspace
        self._address, self._factors = "", None
        origin = read_origin(Path(model_path))
        if origin is not None and origin.factors is not None:
            self._address, self._factors = _find(origin.factors, store, config)

    def __str__(self) -> str:
        return f"the last round's ({self._address})"

    def split(self, target: str, weight: torch.Tensor, rank: int) -> tuple[Factors, bool]:
        """The split of a target weight, on its device, and whether it is from the last round's."""
        before = self._of(target, weight, rank)
        if before is not None:
            try:
                return next_split(weight, before), True
            except UnknownSplitError as error:
                logger.warning(f"factors: {target} is decomposed, its split does not follow from {self}: {error}")
        return decompose(weight, rank, self._free_subspace), False

    def _of(self, target: str, weight: torch.Tensor, rank: int) -> Factors | None:
        """What a weight was split into, on its device; None if there is nothing that fits."""
        described = self._factors.weights.get(target) if self._factors else None
        if self._factors is None or described is None or (described.rank, described.shape) != (rank, weight.shape):
            return None
        storage.fetch_files(self._address.rsplit("/", 2)[0], [described.file])
        try:
            found = self._factors.factors(target)
        except (DamagedFile, FileNotFoundError) as error:
            logger.warning(f"factors: {target} is decomposed: {error}")
            return None
        moved = {field.name: getattr(found, field.name) for field in fields(found)}
        return Factors(**{name: None if tensor is None else tensor.to(weight.device) for name, tensor in moved.items()})


def _find(named: str, store: str | Path, config: SubspaceConfig) -> tuple[str, FactorSet | None]:
    """The address of the set that a model names, and the set, if it can be used."""
    for address in dict.fromkeys((storage.join(store, "sets", named.rsplit("/", 1)[-1]), named)):
        path = storage.find(address)
        if path is None:
            continue
        try:
            found = read_factor_set(path, 0)
        except (DamagedFile, FactorsMismatchError) as error:
            logger.warning(f"factors: all weights are decomposed: {error}")
            return "", None
        if (found.protect, found.free_subspace) != (config.protect, config.free_subspace):
            logger.info(f"factors: all weights are decomposed, the last round's ({address}) has another kind of split")
            return "", None
        return address, found
    logger.info(f"factors: all weights are decomposed, the last round's ({named}) are not there any more")
    return "", None
