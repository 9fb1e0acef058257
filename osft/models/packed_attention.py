"""Attention of samples that lie head to tail in one row, by where each begins instead of a mask.

A mask of a row of T tokens has T x T numbers, most of which say that two samples do not see each other. Kernels for
sequences of several lengths take the samples' boundaries and compute what is left. Here they are attention functions of
`transformers`. The boundaries travel in the place of the mask, which models hand to their attention as it is if it has
four dimensions, so that nobody has to ask a GPU how long a sample is. Whatever else the attention is given, a mask
(answers that share their prompt, padded prompts of a generation) or none, is computed by PyTorch's SDPA.

    kernel                        where                                      computes
    flash_attn                    the package flash-attn is installed        bfloat16 and float16, heads of up to 256
    torch.nn.attention.varlen     GPUs of the Ampere generation and newer    the same
    SDPA of each sample           CPUs                                       everything
    SDPA, which makes the mask    everywhere                                 everything

Which models' code hands boundaries on unharmed is tried on a CPU (`osft.subspace.preflight`). Whether a kernel computes
the right thing on the device at hand is tried before it is used. Those of GPUs have not yet run on one.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from osft.process.private_names import attention_of, set_attention

logger = logging.getLogger(__name__)

LARGEST_HEAD = 256
"""Of the kernels."""
_HALF = (torch.bfloat16, torch.float16)
"""What the kernels compute in."""
_LENGTHS = (1, 7, 64, 129, 200)
"""Tokens of the samples on which a kernel is tried: shorter than a tile of it, as long, and longer."""
TOLERANCE = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 256}
"""Of a kernel's differences, in units of the dtype's eps; SDPA's own are up to 4, on a CPU in float32 up to 60."""
_NOT_BY_KERNELS = ("softcap", "s_aux", "position_bias", "indices")
"""Arguments of attention functions: capped scores, sinks, biases, sparse attention."""


@dataclass(frozen=True, order=True, slots=True)
class AttentionShape:
    """What a layer of a model asks of its attention."""

    heads: int
    key_value_heads: int
    head_size: int
    """Of queries and keys."""
    value_size: int
    """Of values."""
    scale: float
    """Of the scores."""
    window: int
    """Tokens that one sees, itself included. 0: itself and all before it."""


class Packed(NamedTuple):
    """How samples lie in a row, and what their tokens see."""

    boundaries: torch.Tensor
    """(samples + 1,), int32: where each sample begins, and where the last one ends."""
    longest: int
    """Tokens of a sample."""
    scale: float
    window: int
    """As of an `AttentionShape`."""


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packed], torch.Tensor]
"""Causal attention within samples: queries (T, heads, head_size), keys (T, key_value_heads, head_size) and values
(T, key_value_heads, value_size) -> (T, heads, value_size)."""


def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Packed) -> torch.Tensor:
    """A `Kernel` of any dtype on any device: SDPA with the mask."""
    place = torch.arange(len(query), device=query.device, dtype=torch.int32)
    sample = torch.bucketize(place, packed.boundaries, right=True)
    distance = place[:, None] - place
    visible = (sample[:, None] == sample) & (distance >= 0)
    if packed.window:
        visible &= distance < packed.window
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=packed.scale)[0].transpose(0, 1)


def _torch_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Packed) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query,
        key,
        _widened(value, query.shape[-1]),
        packed.boundaries,
        packed.boundaries,
        packed.longest,
        packed.longest,
        scale=packed.scale,
        window_size=(packed.window - 1, 0),  # -1: all before it
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)  # nothing beside it is asked for
    return output[..., : value.shape[-1]]


def _flash_attn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Packed) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    output: torch.Tensor = flash_attn_varlen_func(
        query,
        key,
        _widened(value, query.shape[-1]),
        packed.boundaries,
        packed.boundaries,
        packed.longest,
        packed.longest,
        softmax_scale=packed.scale,
        causal=True,
        window_size=(packed.window - 1, 0),  # -1: all before it
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output[..., : value.shape[-1]]


def _each_sample(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Sixteen samples of 60 tokens take a CPU a sixth of the time that the row and its mask take."""
    boundaries = packed.boundaries.tolist()
    lengths = [stop - start for start, stop in pairwise(boundaries)]
    outputs = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        if packed.window and len(q) > packed.window:
            alone = Packed(torch.tensor([0, len(q)], dtype=torch.int32), len(q), packed.scale, packed.window)
            outputs.append(masked(q, k, v, alone))
            continue
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
        grouped = query.shape[1] != key.shape[1]
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=packed.scale, enable_gqa=grouped)
        outputs.append(found[0].transpose(0, 1))
    return torch.cat(outputs)


def _widened(value: torch.Tensor, size: int) -> torch.Tensor:
    """Filled up with zeros to heads of `size`, as kernels want values to be as wide as queries."""
    return F.pad(value, (0, size - value.shape[-1])) if value.shape[-1] < size else value


@dataclass(frozen=True, slots=True)
class _Implementation:
    name: str
    """By which transformers knows it. One with "flash" in it would get flash attention's own treatment."""
    package: str
    kernel: Kernel
    device: str = "cuda"
    """The kind that it is for."""


KERNELS = (
    _Implementation("osft_fa", "flash_attn", _flash_attn),
    _Implementation("osft_varlen", "torch.nn.attention.varlen", _torch_varlen),
    _Implementation("osft_each", "torch", _each_sample, device="cpu"),
)
"""The first that is there and right is used."""
_registered: set[str] = set()


def register(name: str, kernel: Kernel, *, dtypes: Sequence[torch.dtype] | None = None) -> None:
    """Make an attention function of transformers of a kernel. Other dtypes than `dtypes` get the mask."""
    AttentionInterface.register(name, partial(_attention, kernel=kernel, dtypes=dtypes))
    AttentionMaskInterface.register(name, sdpa_mask)
    _registered.add(name)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kernel: Kernel,
    dtypes: Sequence[torch.dtype] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """(1, heads, T, head_size), … -> (1, T, heads, value_size)."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings
        )
    asked_for = [name for name in _NOT_BY_KERNELS if settings.get(name) is not None] + ["dropout"] * bool(dropout)
    if asked_for:
        raise ValueError(f"the attention of packed samples has no {', '.join(asked_for)}")
    function = kernel if dtypes is None or query.dtype in dtypes else masked
    packed = Packed(
        attention_mask[0, 0, 0],
        attention_mask.shape[2],
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window or 0,
    )
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    return function(query, key, value, packed)[None], None


def in_place_of_mask(boundaries: torch.Tensor, longest: int) -> torch.Tensor:
    """(1, 1, longest, samples + 1), int32, of the memory of `boundaries`: what a model's forward pass is given."""
    return boundaries.expand(1, 1, longest, -1)


def takes_boundaries(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration is to be given the samples' boundaries in the place of a mask."""
    return attention_of(config) in _registered


def has_kernel(shapes: Iterable[AttentionShape], dtype: torch.dtype, device: str = "cuda") -> bool:
    """Whether a CPU, or a GPU that the kernels support, needs no mask for layers of these shapes; none: no model."""
    sizes = [shape.head_size for shape in shapes]
    if device == "cpu":
        return dtype in TOLERANCE and bool(sizes)
    return dtype in _HALF and bool(sizes) and all(size <= LARGEST_HEAD and size % 8 == 0 for size in sizes)


def use_kernel(
    model: PreTrainedModel,
    shapes: Sequence[AttentionShape],
    device: torch.device,
    *,
    kernels: Sequence[_Implementation] = KERNELS,
) -> str | None:
    """Let `model` compute packed samples by their boundaries. Returns the package that does it.

    shapes: those of the model's layers (`osft.subspace.preflight.Preflight.attention`). Call it where no attention was
    asked for. Each kernel is tried first. None, and the model is left as it is, for a model with another attention than
    SDPA or one that computes in float32 on a GPU, and where no kernel is right, which is logged.
    """
    if attention_of(model.config) != "sdpa" or not has_kernel(shapes, model.dtype, device.type):
        return None
    for each in kernels:
        if each.device != device.type or importlib.util.find_spec(each.package.partition(".")[0]) is None:
            continue
        problem = disagreement(each.kernel, shapes, dtype=model.dtype, device=device)
        if not problem:
            register(each.name, each.kernel, dtypes=_HALF if each.device == "cuda" else None)
            set_attention(model.config, each.name)
            logger.log(
                logging.INFO if each.device == "cuda" else logging.DEBUG,
                f"attention: packed samples by {each.package}, without a mask",
            )
            return each.package
        logger.warning(f"attention: {each.package} is not used: {problem}")
    logger.warning("attention: packed samples by SDPA with a mask, whose time and memory grow with the tokens' square")
    return None


def disagreement(kernel: Kernel, shapes: Iterable[AttentionShape], *, dtype: torch.dtype, device: torch.device) -> str:
    """How `kernel` differs from SDPA with a mask on random numbers, forward or backward, in words. "": it does not."""
    for shape in shapes:
        try:
            differences = _differences(kernel, shape, dtype, device)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        for what, difference in differences.items():
            if not difference <= TOLERANCE[dtype] * torch.finfo(dtype).eps:
                return f"its {what} differs from SDPA's by {difference:.2g} for {shape}"
    return ""


@torch.enable_grad()  # whoever loads a model may want none
def _differences(kernel: Kernel, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Of the output and the three gradients: the largest error of a token's head, as a share of its norm and the mean.

    Measured by SDPA on the same numbers in float32, or of float32 in float64.
    """
    reference = torch.float64 if dtype == torch.float32 else torch.float32
    generator = torch.Generator().manual_seed(0)
    boundaries = torch.tensor([*accumulate(_LENGTHS, initial=0)], dtype=torch.int32, device=device)
    packed = Packed(boundaries, max(_LENGTHS), shape.scale, shape.window)

    def random(heads: int, size: int, deviation: float = 1.0) -> torch.Tensor:
        numbers = deviation * torch.randn(sum(_LENGTHS), heads, size, generator=generator)
        return numbers.to(device=device, dtype=dtype)

    inputs = (
        random(shape.heads, shape.head_size, shape.head_size**-0.5 / shape.scale),  # scores of deviation 1
        random(shape.key_value_heads, shape.head_size),
        random(shape.key_value_heads, shape.value_size),
    )
    gradient = random(shape.heads, shape.value_size)

    def computed(function: Kernel, exact: bool) -> list[torch.Tensor]:
        leaves = [(each.to(reference) if exact else each).clone().requires_grad_() for each in inputs]
        query, key, value = leaves
        output = function(query, key, value, packed)
        return [output, *torch.autograd.grad(output, leaves, gradient.to(output.dtype))]

    found, expected = computed(kernel, exact=False), computed(masked, exact=True)
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    return {name: _largest_error(*pair) for name, *pair in zip(names, found, expected, strict=True)}


def _largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    errors, norms = (found.to(expected) - expected).norm(dim=-1), expected.norm(dim=-1)
    return (errors / (norms + norms.mean())).max().item()
