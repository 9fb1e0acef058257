"""The method applied to a whole model."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from osft.config import FreeSubspace, SubspaceConfig
from osft.subspace.decomposition import decompose, unfrozen_rank
from osft.subspace.linear import OSFTLinear
from osft.subspace.targets import select_targets


def osft_layers(model: nn.Module) -> Iterator[tuple[str, OSFTLinear]]:
    """The model's OSFT layers and their full names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, OSFTLinear):
            yield name, module


def inject_empty(
    model: nn.Module,
    targets: Sequence[str],
    *,
    unfreeze_rank_ratio: float,
    free_subspace: FreeSubspace,
    base_dtype: torch.dtype | None = None,
) -> None:
    """Replace `targets` in place by empty OSFT layers on the same device, and freeze everything else."""
    model.requires_grad_(False)
    for name in targets:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = OSFTLinear(
            linear.in_features,
            linear.out_features,
            rank=unfrozen_rank((linear.out_features, linear.in_features), unfreeze_rank_ratio),
            bias=linear.bias is not None,
            free_subspace=free_subspace,
            dtype=linear.weight.dtype,
            base_dtype=base_dtype,
            device=linear.weight.device,
        )
        model.set_submodule(name, layer)


def inject(model: nn.Module, config: SubspaceConfig) -> nn.Module:
    """Split the target weights of a loaded model and make them trainable in their free subspace, in place.

    For models that fit into one process; the training worker builds the same from a factor store without ever
    holding the whole model. Returns `model`. Raises ValueError as `select_targets` and `unfrozen_rank` do.
    """
    model.requires_grad_(False)
    for name in select_targets(model, config.target_patterns):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        rank = unfrozen_rank((linear.out_features, linear.in_features), config.unfreeze_rank_ratio)
        factors = decompose(linear.weight.detach(), rank, config.free_subspace)
        layer = OSFTLinear.from_linear(linear, factors, rank=rank, free_subspace=config.free_subspace)
        model.set_submodule(name, layer)
    return model


def refresh(model: nn.Module) -> None:
    """Recompute the dense weight of every OSFT layer. Call it after each optimizer step."""
    for _, layer in osft_layers(model):
        layer.refresh_()


def merge(model: nn.Module) -> nn.Module:
    """Turn every OSFT layer back into a plain linear layer, in place. Returns `model`."""
    for name, layer in list(osft_layers(model)):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = layer.weight
        if layer.bias is not None:
            linear.bias = layer.bias
        model.set_submodule(name, linear)
    return model
