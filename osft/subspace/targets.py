"""Which weights of a model are split and trained."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True)
class Target:
    """One weight that is split and trained, or one stack of experts' weights, each split by itself."""

    name: str
    """What `target_patterns` are searched in: the layer's full name, or the full name of a parameter that no plain
    linear layer holds: a stack of experts, or the weight of a layer that computes something of its own with it."""
    tensor: str
    """The weight's name in the model's state dict."""
    shape: tuple[int, ...]
    """(m, n), or (num_experts, m, n), as the model stores it: (out, in) for `nn.Linear`, (in, out) for `Conv1D`."""


def transformer_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The language model's stack of transformer blocks and its name, found by structure.

    It is the module list with the most parameters among those that are not inside another one (a list of
    experts is inside a block). Of a model that also sees or hears, only its language model is searched. Raises
    ValueError if the model has no module list.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    prefix = _language_model_name(model)
    lists = [(name, module) for name, module in lists if name.startswith(prefix)] or lists
    for name, module in lists:
        if any(name.startswith(f"{outer}.") for outer, _ in lists):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if best is None or size > best[0]:
            best = (size, name, module)
    if best is None:
        raise ValueError(f"{type(model).__name__} has no stack of transformer blocks (no torch.nn.ModuleList)")
    return best[1], best[2]


def _is_plain(module: nn.Linear | Conv1D) -> bool:
    """Whether the layer computes what its class says, and not something of its own (the router of Llama 4)."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _language_model_name(model: nn.Module) -> str:
    """What the names of the language model's modules begin with; empty for the whole model."""
    if not isinstance(model, PreTrainedModel):
        return ""
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")


def select_targets(model: nn.Module, target_patterns: Sequence[str] | None = None) -> list[Target]:
    """The weights to train, in the model's order.

    Candidates are, in the transformer blocks, the weights of all linear layers (`nn.Linear`, and `Conv1D` of
    GPT-2) and the three-dimensional parameters in which experts are stacked. A weight with a single row or column
    (the gate of a shared expert) has one direction only and is none, and routers that are not linear layers stay
    as they are. `target_patterns` are regular expressions searched in the full name; a weight is a target if any of
    them is found. Raises ValueError for a pattern that matches no candidate.
    """
    stack, blocks = transformer_blocks(model)
    candidates = []
    for name, module in blocks.named_modules(prefix=stack):
        if isinstance(module, nn.Linear | Conv1D):
            if min(module.weight.shape) > 1:
                tensor = f"{name}.weight"
                candidates.append(Target(name if _is_plain(module) else tensor, tensor, tuple(module.weight.shape)))
        elif not isinstance(module, nn.Conv1d | nn.ConvTranspose1d):  # their kernels have three dimensions, too
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and min(parameter.shape[1:]) > 1:
                    candidates.append(Target(f"{name}.{leaf}", f"{name}.{leaf}", tuple(parameter.shape)))
    if not candidates:
        raise ValueError(f"the blocks of {type(model).__name__} hold no linear layer that could be trained")
    if not target_patterns:
        return candidates
    for pattern in target_patterns:
        if not any(re.search(pattern, target.name) for target in candidates):
            kinds = sorted({target.name.rsplit(".", 1)[-1] for target in candidates})
            raise ValueError(
                f"target_patterns: {pattern!r} matches no linear layer of the blocks. "
                f"Their names look like {candidates[0].name!r} and end in: {', '.join(kinds)}"
            )
    return [target for target in candidates if any(re.search(pattern, target.name) for pattern in target_patterns)]
