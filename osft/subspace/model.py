"""The method applied to a whole model."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from osft.config import FreeSubspace, SubspaceConfig
from osft.subspace.decomposition import decompose
from osft.subspace.experts import OSFTExperts
from osft.subspace.linear import OSFTLinear
from osft.subspace.rank_allocation import allocate_ranks
from osft.subspace.targets import Target, select_targets, transformer_blocks
from osft.subspace.weight import OSFTWeight


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
    free_subspace: FreeSubspace,
    base_dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Make `targets` trainable in place, on their device, with `ranks[target.name]` unfrozen directions each.

    The bases are left empty and everything else is frozen. `base_dtypes` (by target) is the dtype in which a base
    weight is kept, by default that of the weight.
    """
    model.requires_grad_(False)
    stack, blocks = transformer_blocks(model)
    for target in targets:
        owner, _, leaf = target.name.rpartition(".")
        rank, base_dtype = ranks[target.name], (base_dtypes or {}).get(target.name)
        if target.name == target.tensor:
            OSFTExperts(model.get_submodule(owner), leaf, rank=rank, free_subspace=free_subspace, base_dtype=base_dtype)
        else:
            linear = model.get_submodule(target.name)
            assert isinstance(linear, nn.Linear | Conv1D)
            layer = OSFTLinear(linear, rank=rank, free_subspace=free_subspace, base_dtype=base_dtype)
            number = target.name.removeprefix(f"{stack}.").partition(".")[0]
            layer.read_by(blocks.get_submodule(number))
            model.set_submodule(target.name, layer)


def inject(model: nn.Module, config: SubspaceConfig, *, importance: Mapping[str, float] | None = None) -> nn.Module:
    """Split the target weights of a loaded model and make them trainable in their free subspace, in place.

    For models that fit into one process; the training worker builds the same from a factor store without ever
    holding the whole model. Returns `model`. `importance` is that of `measure_importance`, for the adaptive rank
    allocation. Raises ValueError as `select_targets` and `allocate_ranks` do.
    """
    targets = select_targets(model, config.target_patterns)
    ranks = allocate_ranks(targets, config, importance)
    inject_empty(model, targets, ranks, free_subspace=config.free_subspace)
    for _, layer in osft_layers(model):
        layer.fill_(decompose(layer.dense_weight().detach(), layer.rank, layer.free_subspace))
    return model


def refresh(model: nn.Module) -> None:
    """Recompute the dense weight of every OSFT layer. Call it after each optimizer step."""
    for _, layer in osft_layers(model):
        layer.refresh_()


def merge(model: nn.Module) -> nn.Module:
    """Turn every OSFT layer back into what it was made of, in place. Returns `model`."""
    for name, layer in list(osft_layers(model)):
        if isinstance(layer, OSFTExperts):
            layer.remove()
        elif isinstance(layer, OSFTLinear):
            model.set_submodule(name, layer.merged())
    return model
