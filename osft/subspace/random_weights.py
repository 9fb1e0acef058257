"""A model of any size with random weights, cheap enough to run a few tokens through on a laptop.

Large weights are windows into one row of random numbers, `W[i, j] = row[i + j]`: as good as random for what depends on
the code alone, and of no size. A matrix product would copy such a window each time, so those that are not the largest
are copied once for all weights of a shape. Embeddings and the head are cut to the few tokens and positions that are
tried. Of blocks that are alike, one is computed and the others hand on what they get.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from osft.process.private_names import initialize
from osft.subspace.targets import transformer_blocks
from osft.subspace.weight import OSFTWeight

ROWS = 256
"""Of an embedding: token ids and positions must stay below."""
_LARGE = 2**14
"""Elements from which a weight is a window."""
_COPIED = 2**26
"""Elements of the largest window that is copied: 256 MiB in float32."""


@torch.no_grad()
def fill_at_random(model: PreTrainedModel) -> None:
    """Give the parameters of an empty model random values on the CPU, the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        window = _windows(torch.randn(2 * max(sum(parameter.shape) for parameter in model.parameters())))
        head = model.get_output_embeddings()
        filled: dict[int, nn.Parameter] = {}  # tied parameters stay one
        for module in model.modules():
            for name, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
                if id(parameter) not in filled:
                    cut = module is head or isinstance(module, nn.Embedding)
                    value = _random(module, name, parameter[:ROWS] if cut else parameter, window)
                    filled[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
                module.register_parameter(name, filled[id(parameter)])
            if isinstance(module, nn.Embedding):
                module.padding_idx = None
        for submodel, module in _with_submodel(model):
            if _is_special(module):
                initialize(submodel, module)
        for parameter in model.parameters():  # what begins as zero would hide what it multiplies
            if parameter.numel() < _LARGE and not parameter.any():
                parameter.normal_(std=0.02)


_Windows = Callable[[tuple[int, ...], float, torch.dtype], torch.Tensor]
"""A large weight's values, from its shape, standard deviation and dtype."""


def _windows(row: torch.Tensor) -> _Windows:
    """Windows into `row`; weights that ask for the same one share it."""

    @cache
    def window(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> torch.Tensor:
        values = (row[: sum(shape)] * scale).to(dtype).as_strided(shape, [1] * len(shape))
        return values.contiguous() if len(shape) == 2 and values.numel() <= _COPIED else values

    return window


def _random(module: nn.Module, name: str, parameter: torch.Tensor, window: _Windows) -> torch.Tensor:
    """Values for a parameter; those of a large one are a window."""
    shape = tuple(parameter.shape)
    if len(shape) < 2:
        return (torch.ones if name == "weight" else torch.zeros)(shape, dtype=parameter.dtype)
    if parameter.numel() < _LARGE:
        return torch.randn(shape, dtype=parameter.dtype) * _scale(module, shape)
    return window(shape, _scale(module, shape), parameter.dtype)


def _scale(module: nn.Module, shape: tuple[int, ...]) -> float:
    """Standard deviation that keeps the size of what a linear layer computes."""
    if isinstance(module, nn.Embedding):
        return 1.0
    transposed = isinstance(module, Conv1D) or getattr(module, "transposed", False)
    inputs = shape[0] if transposed else min(shape[-2:]) if len(shape) == 3 else shape[-1]
    return float(inputs**-0.5)


def _with_submodel(model: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, nn.Module]]:
    """Every module, with the innermost model that it belongs to, which knows how to initialize it."""
    owners: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        parent = owners.get(name.rpartition(".")[0], model)
        owners[name] = module if isinstance(module, PreTrainedModel) else parent
        yield owners[name], module


def _is_special(module: nn.Module) -> bool:
    """Whether it has parameters that an architecture gives values of its own: decays, time steps."""
    own = list(module.parameters(recurse=False))
    large = any(parameter.numel() >= _LARGE and parameter.ndim > 1 for parameter in own)
    ordinary = isinstance(module, nn.Linear | Conv1D | nn.Embedding | OSFTWeight)
    return bool(own) and not ordinary and not large


def compute_one_block_of_each_kind(model: PreTrainedModel) -> None:
    """Let every transformer block that is like an earlier one return the hidden states that it gets."""
    computed: dict[Any, list[Any]] = {}
    for block in transformer_blocks(model)[1]:
        kind = _kind(block)
        if kind not in computed:
            outputs: list[Any] = []
            computed[kind] = outputs
            block.register_forward_hook(lambda _block, _inputs, output, seen=outputs: seen.append(output))
        else:
            _hand_on(block, computed[kind])


def _hand_on(block: nn.Module, outputs: list[Any]) -> None:
    """Make `block` return its first argument, in the form of what the block like it has returned last."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        last = outputs[-1]
        return type(last)((hidden_states, *last[1:])) if isinstance(last, tuple | list) else hidden_states

    block.forward = forward


def _kind(block: nn.Module) -> Any:
    """What is equal for two blocks that compute alike: modules, shapes and settings, without their numbers."""
    return tuple(
        (
            name,
            type(module),
            tuple((leaf, tuple(p.shape)) for leaf, p in module.named_parameters(recurse=False)),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, bool | str | int) and "idx" not in key and "layer_id" not in key
            ),
        )
        for name, module in block.named_modules()
    )
