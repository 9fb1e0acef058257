"""The second moments of what layers are fed: `C = E[x x^T]`.

To first order an error E of a weight changes what its layer computes by E x, whose mean square is tr(E C E^T).
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def input_moments(layers: Mapping[str, nn.Module], forward: Callable[[], object]) -> dict[str, torch.Tensor]:
    """The mean of x x^T over all inputs x that reach each of `layers` while `forward` runs: (n, n), float32.

    layers: by name, modules whose first argument is (..., n). They cost n^2 numbers each, so of a large model name the
    layers of one block at a time. On several processes each gives `forward` its share, and all get the mean over all.
    Raises ValueError, on all processes, for a layer that on one of them got no input, such as an expert to which no
    token was sent.
    """
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def add(name: str, inputs: tuple[Any, ...]) -> None:
        flat = inputs[0].detach().flatten(0, -2).float()
        if name not in sums:
            sums[name] = torch.zeros(flat.shape[1], flat.shape[1], device=flat.device)
        sums[name].addmm_(flat.T, flat)
        counts[name] += len(flat)

    with ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs))
            hooks.callback(handle.remove)
        forward()
    distributed = torch.distributed.is_initialized()
    device = next((tensor.device for tensor in sums.values()), torch.device("cpu"))
    fewest, total = (torch.tensor(list(counts.values()), device=device) for _ in range(2))
    if distributed:
        torch.distributed.all_reduce(fewest, op=torch.distributed.ReduceOp.MIN)
        torch.distributed.all_reduce(total)
    for name, count in zip(layers, fewest.tolist(), strict=True):
        if not count:
            raise ValueError(f"no input reached {name}, so that it has no moments")
    for tensor, count in zip((sums[name] for name in layers), total.tolist(), strict=True):
        if distributed:
            torch.distributed.all_reduce(tensor)
        tensor /= count
    return sums
