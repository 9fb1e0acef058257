"""Which weights of a model are split and trained."""

import re
from collections.abc import Sequence

from torch import nn


def transformer_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's stack of transformer blocks and its name, found by structure.

    It is the module list with the most parameters among those that are not inside another one (a list of
    experts is inside a block). Raises ValueError if the model has no module list.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, module in lists:
        if any(name.startswith(f"{outer}.") for outer, _ in lists):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if best is None or size > best[0]:
            best = (size, name, module)
    if best is None:
        raise ValueError(f"{type(model).__name__} has no stack of transformer blocks (no torch.nn.ModuleList)")
    return best[1], best[2]


def select_targets(model: nn.Module, target_patterns: Sequence[str] | None = None) -> list[str]:
    """Full names of the linear layers to train, in the model's order.

    Candidates are all linear layers of the transformer blocks. `target_patterns` are regular expressions
    searched in the full name; a layer is a target if any of them is found. Raises ValueError for a pattern
    that matches no candidate.
    """
    stack, blocks = transformer_blocks(model)
    candidates = [f"{stack}.{name}" for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    if not candidates:
        raise ValueError(f"the blocks of {type(model).__name__} hold no linear layer that could be trained")
    if not target_patterns:
        return candidates
    for pattern in target_patterns:
        if not any(re.search(pattern, name) for name in candidates):
            kinds = sorted({name.rsplit(".", 1)[-1] for name in candidates})
            raise ValueError(
                f"target_patterns: {pattern!r} matches no linear layer of the blocks. "
                f"Their names look like {candidates[0]!r} and end in: {', '.join(kinds)}"
            )
    return [name for name in candidates if any(re.search(pattern, name) for pattern in target_patterns)]


def linear_shape(model: nn.Module, name: str) -> tuple[int, int]:
    """(out_features, in_features) of a target."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear.out_features, linear.in_features
