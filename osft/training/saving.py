"""Writing the tuned model: a plain Hugging Face folder, and beside its rounded weights what makes them exact again.

The exact weight is W = W0 + D in float32, D = L X R^T the update. What is served is W in the dtype of the base model,
or in `save_dtype`. Where that has fewer bits than W, the difference is kept in exact/ (`osft.models.rounding`), and
what the rounding did to the update is measured, for each weight, with D' = W' - W0 the update that is served:

    update_lost      1 - <D', D> / |D|^2     the share of the update that is not in D' (negative: D' overshoots)
    rounding_error   |D' - D| / |D|
    frozen_share     |D' - P D'| / |D'|      P projects on what training can reach; of D itself the share is 0

What was not trained, and a weight whose update is zero, is written byte for byte as it came.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from osft.models.checkpoint import SavedTensor, write_checkpoint
from osft.models.conversion import ModelWeights, TensorGroup
from osft.models.origin import RoundingLoss
from osft.models.rounding import UpdateSums, encode_residual, generator_of, round_weight
from osft.settings.run import Rounding
from osft.subspace.linear import OSFTLinear
from osft.subspace.model import osft_layers
from osft.subspace.weight import OSFTWeight, Split


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedModel:
    """What was written."""

    starts_from_exact: bool
    """Whether the base's trained weights were exact: kept in exact/, or stored in float32."""
    dtype: str
    """Of the trained weights as they are served."""
    rounding: str
    """How they were rounded; "none" where the dtype holds them exactly."""
    total: RoundingLoss
    """Over all weights together."""
    weights: dict[str, RoundingLoss]
    """Of each target."""


def save_merged(
    model: PreTrainedModel,
    stored: ModelWeights,
    folder: Path,
    *,
    save_dtype: str = "auto",
    rounding: Rounding = "stochastic",
    moments: Callable[[str], torch.Tensor | None] | None = None,
    seed: int = 0,
    files: Callable[[SavedModel], Mapping[str, str]] | None = None,
    rank: int = 0,
) -> SavedModel | None:
    """Write the tuned model with the names, shapes and (save_dtype "auto") dtypes that it came with.

    `rounding` is one of `osft.models.rounding`; `moments`, called on all ranks, gives the second moments of a target's
    inputs, which "compensated" needs (for None, as for experts, the nearest numbers are taken); `seed` is for
    "stochastic". `files` gives more files of the folder, by name, when the weights are written. Call it on every rank;
    rank 0 writes, one weight or stack of experts at a time, and gets what was written.
    """
    layers = {name + layer.tensor_suffix: (name, layer) for name, layer in osft_layers(model)}
    writer = _Writer(stored, save_dtype, rounding, seed, trained=list(layers))

    def tensors() -> Iterator[SavedTensor]:
        for group in stored.groups:
            trained = {}
            for name in group.shapes:  # on all ranks
                if name in layers:
                    target, layer = layers[name]
                    inputs = moments(target) if moments else None
                    trained[name] = _Trained(target, layer, layer.split(), inputs)
            if rank == 0:
                yield from writer.group(group, trained)
        if rank == 0:
            yield from (writer.unchanged(name) for name in stored.unused)

    if rank != 0:
        for _ in tensors():
            pass
        return None
    write_checkpoint(
        folder,
        tensors(),
        stored.folder,
        dtype=writer.new_dtype,
        files=lambda: files(writer.summary()) if files else {},
    )
    return writer.summary()


class _Writer:
    """Rounds and measures, on rank 0."""

    def __init__(
        self, stored: ModelWeights, save_dtype: str, rounding: Rounding, seed: int, *, trained: Sequence[str]
    ) -> None:
        self._stored, self._rounding, self._seed = stored, rounding, seed
        self._main_dtype = stored.served_dtype(trained[0])
        self._starts_from_exact = stored.are_exact(trained)
        self.new_dtype: torch.dtype | None = None if save_dtype == "auto" else getattr(torch, save_dtype)
        """What the stored dtype of the trained weights becomes; None: it stays."""
        self._losses: dict[str, RoundingLoss] = {}
        self._sums = UpdateSums()
        self._dtypes: set[torch.dtype] = set()
        self._has_rounded = False

    def group(self, group: TensorGroup, trained: Mapping[str, "_Trained"]) -> Iterator[SavedTensor]:
        """The stored tensors that a group of the model's becomes. `trained`: those that were, by the model's name."""
        exact, served = {}, {}
        for name, one in trained.items():
            target, split = one.target, one.split
            dtype = self._dtype(group.stored_names[0])
            self._dtypes.add(dtype)
            update = split.update()
            if not update.any():
                self._losses[target] = RoundingLoss(update_lost=None, rounding_error=None, frozen_share=None)
                continue
            whole = split.weight()
            rounded = self._round(one, whole, dtype)
            moved = rounded.float() - split.base.float()
            sums = UpdateSums.of(update, moved, moved - split.free_part(moved))
            self._sums.add(sums)
            self._losses[target] = sums.loss()
            exact[name], served[name] = whole.cpu(), rounded.cpu()
        if not exact:
            yield from (self.unchanged(name) for name in group.stored_names)
            return
        pairs = zip(self._stored.stored_form(group, exact), self._stored.stored_form(group, served), strict=True)
        for (name, whole), (_, rounded) in pairs:
            if torch.equal(whole, self._stored.reader.tensor(name).to(whole.dtype)):  # an expert without an update
                yield self.unchanged(name)
            else:
                yield self._saved(name, whole, rounded.to(self._dtype(name)))

    def unchanged(self, name: str) -> SavedTensor:
        """A stored tensor as it came, or in the dtype that was asked for."""
        reader, dtype = self._stored.reader, self._dtype(name)
        if dtype == reader.served_dtype(name):
            return reader.saved(name)
        exact = reader.tensor(name)
        return self._saved(name, exact, exact.to(dtype))

    def summary(self) -> SavedModel:
        """What was written, when all is."""
        return SavedModel(
            starts_from_exact=self._starts_from_exact,
            dtype=" and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self._dtypes)),
            rounding=self._rounding if self._has_rounded else "none",
            total=self._sums.loss(),
            weights=self._losses,
        )

    def _saved(self, name: str, exact: torch.Tensor, served: torch.Tensor) -> SavedTensor:
        if torch.equal(exact.float(), served.float()):
            return SavedTensor(name, served)
        self._has_rounded = True
        return SavedTensor(name, served, encode_residual(exact, served))

    def _round(self, trained: "_Trained", exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The exact weight of a target in `dtype`."""
        return round_weight(
            exact,
            trained.split.base,
            dtype,
            "nearest" if self._rounding == "compensated" and trained.moments is None else self._rounding,
            moments=trained.moments,
            transposed=isinstance(trained.layer, OSFTLinear) and trained.layer.transposed,
            generator=generator_of(trained.target, self._seed) if self._rounding == "stochastic" else None,
        )

    def _dtype(self, name: str) -> torch.dtype:
        """In which a stored tensor is written. What has a dtype of its own (float32 in a bfloat16 model) keeps it."""
        before = self._stored.reader.served_dtype(name)
        return self.new_dtype if self.new_dtype is not None and before == self._main_dtype else before


@dataclass(frozen=True, slots=True)
class _Trained:
    """A trained weight, whole."""

    target: str
    layer: OSFTWeight
    split: Split
    moments: torch.Tensor | None
    """(n, n), of its inputs."""
