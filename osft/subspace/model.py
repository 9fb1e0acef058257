"""The method applied to a whole model."""

from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from osft.settings.optimization import DEFAULT_STIFFNESS
from osft.settings.subspace import SubspaceConfig
from osft.subspace.decomposition import SplitKind, decompose, split_by_inputs, split_of_inputs, unfrozen_rank
from osft.subspace.experts import OSFTExperts
from osft.subspace.linear import OSFTLinear
from osft.subspace.rank_allocation import allocate_ranks
from osft.subspace.statistics import Statistics
from osft.subspace.targets import Target, select_targets, transformer_blocks
from osft.subspace.weight import OSFTWeight, local, whole


def osft_layers(model: nn.Module) -> Iterator[tuple[str, OSFTWeight]]:
    """The model's trained weights and the names of their targets, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, OSFTExperts):
            yield name.removesuffix(module.name_suffix), module
        elif isinstance(module, OSFTWeight):
            yield name, module


def inject_empty(
    model: nn.Module,
    targets: Sequence[Target],
    ranks: Mapping[str, int],
    *,
    split_kinds: Mapping[str, SplitKind],
    base_dtypes: Mapping[str, torch.dtype] | None = None,
    stiffness: float = 0.0,
) -> None:
    """Make `targets` trainable in place, on their device, with `ranks[target.name]` unfrozen directions each.

    The bases are left empty and everything else is frozen. `split_kinds`, by target. `base_dtypes` (by target) is the
    dtype in which a base weight is kept, by default that of the weight.
    """
    model.requires_grad_(False)
    stack, blocks = transformer_blocks(model)
    for target in targets:
        owner, _, leaf = target.name.rpartition(".")
        rank, split_kind = ranks[target.name], split_kinds[target.name]
        base_dtype = (base_dtypes or {}).get(target.name)
        if target.name == target.tensor:
            experts = model.get_submodule(owner)
            OSFTExperts(experts, leaf, rank=rank, split_kind=split_kind, base_dtype=base_dtype, stiffness=stiffness)
        else:
            linear = model.get_submodule(target.name)
            assert isinstance(linear, nn.Linear | Conv1D)
            layer = OSFTLinear(linear, rank=rank, split_kind=split_kind, base_dtype=base_dtype, stiffness=stiffness)
            number = target.name.removeprefix(f"{stack}.").partition(".")[0]
            layer.read_by(blocks.get_submodule(number))
            model.set_submodule(target.name, layer)


def share_input_bases(model: nn.Module, inputs: Mapping[str, Hashable]) -> None:
    """Let the linear layers of a block that are split by the same input hold one basis of it.

    `inputs` says which: target -> whatever stands for its input.
    """
    stack, _ = transformer_blocks(model)
    first: dict[tuple[str, Hashable], OSFTLinear] = {}
    for name, layer in osft_layers(model):
        if isinstance(layer, OSFTLinear) and name in inputs:
            number = name.removeprefix(f"{stack}.").partition(".")[0]
            owner = first.setdefault((number, inputs[name]), layer)
            if owner is not layer:
                layer.share_input_basis(owner)


def inject(
    model: nn.Module,
    config: SubspaceConfig,
    *,
    importance: Mapping[str, float] | None = None,
    statistics: Statistics | None = None,
    stiffness: float = DEFAULT_STIFFNESS,
) -> nn.Module:
    """Split the target weights of a loaded model and make them trainable in their free subspace, in place.

    For models that fit into one process; the training worker builds the same from a factor store without ever
    holding the whole model. Returns `model`. `importance` is that of `measure_importance`, for the adaptive rank
    allocation; `statistics` (of these targets) and `stiffness` are for protect="activations". Raises ValueError as
    `select_targets` and `allocate_ranks` do, and for statistics of other targets.
    """
    targets = select_targets(model, config.target_patterns)
    if config.protect == "weights":
        ranks = allocate_ranks(targets, config, importance)
        inject_empty(model, targets, ranks, split_kinds=dict.fromkeys(ranks, config.free_subspace))
        for _, layer in osft_layers(model):
            layer.fill_(decompose(layer.dense_weight().detach(), layer.rank, layer.split_kind))
        return model
    if statistics is None:
        raise ValueError("protect='activations' needs the statistics of the layers' inputs (`calibration.measure`)")
    measured = {name: inputs for inputs in statistics.inputs() for name in inputs.targets}
    if missing := [target.name for target in targets if target.name not in measured]:
        raise ValueError(f"the statistics are those of other weights: they have none of {missing[0]}")
    split_kinds = {target.name: split_of_inputs(transposed=measured[target.name].transposed) for target in targets}
    ranks = {
        target.name: unfrozen_rank(target.shape, config.unfreeze_rank_ratio, split_kinds[target.name])
        for target in targets
    }
    inject_empty(model, targets, ranks, split_kinds=split_kinds, stiffness=stiffness)
    share_input_bases(model, {name: inputs.targets for name, inputs in measured.items()})
    for name, layer in osft_layers(model):
        inputs = measured[name]
        layer.fill_(
            split_by_inputs(
                inputs.kept,
                layer.rank,
                layer.split_kind,
                gradient_energy=inputs.gradient_energies[name],
                unit=statistics.unit,
            )
        )
    return model


def refresh(model: nn.Module, *, learning_rate: float) -> None:
    """Recompute the dense weight of every OSFT layer. Call it after each optimizer step, with the rate it was made."""
    gather = _GatherOnce()
    for _, layer in osft_layers(model):
        layer.refresh_(learning_rate, gather)


def recompute(model: nn.Module) -> None:
    """Recompute the dense weight of every OSFT layer from coefficients that are in the free subspace."""
    gather = _GatherOnce()
    for _, layer in osft_layers(model):
        layer.recompute_(gather)


class _GatherOnce:
    """`whole`, once for layers that follow each other and share a basis."""

    def __init__(self) -> None:
        self._tensor: torch.Tensor | None = None
        self._gathered: torch.Tensor | None = None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._gathered is None or tensor is not self._tensor:
            self._gathered = None  # before the next one is there, too
            self._tensor, self._gathered = tensor, whole(tensor)
        return self._gathered


def coefficients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of this rank's part of every X, by target: for `set_update_`."""
    return {name: local(layer.coefficients).detach().clone() for name, layer in osft_layers(model)}


@torch.no_grad()
def set_update_(model: nn.Module, coefficients: Mapping[str, torch.Tensor], scale: float) -> None:
    """Make the update of each weight `scale` times the one that had these coefficients."""
    for name, layer in osft_layers(model):
        torch.mul(coefficients[name], scale, out=local(layer.coefficients))
    recompute(model)


def merge(model: nn.Module) -> nn.Module:
    """Turn every OSFT layer back into what it was made of, in place. Returns `model`."""
    for name, layer in list(osft_layers(model)):
        if isinstance(layer, OSFTExperts):
            layer.remove()
        elif isinstance(layer, OSFTLinear):
            model.set_submodule(name, layer.merged())
    return model
