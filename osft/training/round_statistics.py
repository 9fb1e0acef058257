"""What a model knows, handed from one training to the next (protect="activations").

A model's osft.json names statistics (`osft.subspace.statistics`): those that its training started from, added to those
of what it learned, which are measured with the tuned model on records of that training before these are forgotten. The
next training protects all of it without any of that data. They stay in the store that they are written to, by their
content; no copy goes with the model, whose size they have a tenth to two thirds of (`osft.subspace.statistics_store`).

    the model to train                              what is protected
    names statistics that are there                 all that they were measured on
    names some that are gone                        what its own writing shows now; that is said, with their name
    names some of fewer weights than are targets    the same
    was tuned by protect="weights", an older        the same
    release, or names none for another reason
    is a base model                                 the same
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from osft import storage
from osft.data.chat import Sample
from osft.data.files import data_name
from osft.data.packing import FAST_TOKENS, Feeding
from osft.data.samples import Samples
from osft.models.loading import empty_model
from osft.models.origin import StoredStatistics, read_origin
from osft.settings.subspace import SubspaceConfig
from osft.settings.training import TrainConfig
from osft.subspace.calibration import measure
from osft.subspace.statistics_store import load_statistics, save_statistics, statistics_address
from osft.subspace.targets import select_targets

logger = logging.getLogger(__name__)


def carried_statistics(
    model: Path,
    store: str | Path,
    subspace: SubspaceConfig,
    *,
    trust_remote_code: bool = False,
) -> str | None:
    """The path or URI of the statistics that the model in a folder carries, of all target weights at least.

    They are looked for in `store` by their content, and where the model says that they are. None for a model that has
    none that can be used; a warning says why not. Raises DamagedFile for statistics that are not what was written.
    """
    origin = read_origin(model)
    if origin is None:
        return None
    named = origin.statistics
    instead = "what it knows is measured now, on text that it writes itself"
    if named is None:
        logger.warning(
            f"statistics: {model} was tuned without protect='activations', or by an older release: {instead}"
        )
        return None
    targets = select_targets(empty_model(model, trust_remote_code=trust_remote_code), subspace.target_patterns)
    places = dict.fromkeys((statistics_address(store, named.sha256), named.address))
    for address in places:
        if storage.find(address) is None:
            continue
        found = load_statistics(address)
        if found.sha256 != named.sha256:
            continue  # others have been put in their place
        known = {target for layer in found.layout for target in layer}
        if missing := [target.name for target in targets if target.name not in known]:
            logger.warning(
                f"statistics: {address}, which {model} carries, has nothing of {missing[0]}: {instead}, and what "
                "earlier rounds learned is kept only as far as that text shows it"
            )
            return None
        return address
    logger.warning(
        f"statistics: {named.address}, which {model} carries, is not there any more: {instead}, and what "
        "earlier rounds learned is kept only as far as that text shows it. Put them back, if there is a copy"
    )
    return None


class RoundStatistics:
    """Adds to the statistics that a training started from those of what it learned. Make and call it on every rank.

    Raises FileNotFoundError or DamagedFile when it is made if the former are not there, which is before the training.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        samples: Samples,
        *,
        folder: Path,
        data_uri: str,
        start: str,
        feeding: Feeding,
    ) -> None:
        """`model`: in training, of the checkpoint in `folder`. `start`: path or URI of statistics, in their store."""
        self._model, self._seed, self._data_uri, self._start = model, config.seed, data_uri, start
        shared: list[Any] = [None]
        if feeding.rank == 0:
            before = load_statistics(start)
            shared = [({target for layer in before.layout for target in layer}, before.parts[0].num_tokens)]
        if feeding.world_size > 1:
            torch.distributed.broadcast_object_list(shared, src=0)
        ((names, num_tokens),) = shared
        # Not only of what is trained now: a sum is of the same weights as its parts.
        empty = empty_model(folder, trust_remote_code=config.trust_remote_code)
        self._targets = [target for target in select_targets(empty) if target.name in names]
        self._samples = some_of(samples, num_tokens, config.seed)
        longest = max(len(sample.input_ids) for sample in self._samples)
        max_tokens = min(feeding.max_tokens, max(FAST_TOKENS[feeding.device.type], longest))
        self._feeding = replace(feeding, max_tokens=max_tokens)

    def __call__(self) -> StoredStatistics | None:
        """Measure the model as it is now, add and store. On rank 0 the sum, else None."""
        total = measure(
            self._model,
            self._targets,
            self._samples,
            name=data_name(self._data_uri),
            source=self._data_uri,
            seed=self._seed,
            onto=None if self._feeding.rank else load_statistics(self._start),
            feeding=self._feeding,
        )
        if self._feeding.rank:
            return None
        address = save_statistics(total, self._start.rsplit("/", 2)[0])
        return StoredStatistics(address=address, sha256=load_statistics(address).sha256)


def some_of(samples: Samples, num_tokens: int, seed: int) -> list[Sample]:
    """Samples in random order until they have `num_tokens` tokens, or there are no more."""
    order = torch.randperm(len(samples.lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: list[Sample] = []
    for index in order:
        chosen.append(samples[index])
        num_tokens -= len(chosen[-1].input_ids)
        if num_tokens <= 0:
            break
    return chosen
