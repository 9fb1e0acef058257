"""Products with frozen float32 matrices on a CPU by oneDNN, where PyTorch's own choice is slow.

On x86 PyTorch multiplies float32 matrices with MKL, which does not know AMD's processors, and leaves half the width of
the newer ones unused. 512 x 576 times 576 x 1,536 numbers take two cores

    AMD EPYC             MKL       oneDNN      one row:   MKL      oneDNN
    Zen 4              4.9 ms      4.2 ms               71 us       43 us
    its successor      4.4 ms      1.9 ms               51 us       38 us

Nothing is gained on Intel's, nor by the product of two matrices that are both as long as the text, such as a weight's
gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from osft.process.private_names import onednn_linear

_CPU = Path("/proc/cpuinfo")
_PLAIN = (torch.Tensor, nn.Parameter)
"""Classes of tensors that are nothing else, such as shards of a larger one."""


def fast_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x W^T + b` as `F.linear`, (..., in) times (out, in), of any strides, by oneDNN where that is faster.

    With a weight that learns, and in autocast, it is `F.linear` itself.
    """
    if torch.compiler.is_compiling() or not _is_for_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _multiply(x, weight, bias)
    product: torch.Tensor = _FrozenLinear.apply(x, weight, bias)
    return product


def _is_for_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    if onednn_operation() is None or torch.is_autocast_enabled("cpu") or not x.numel():
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if any(type(t) not in _PLAIN or t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors[1:]))


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    multiply = onednn_operation()
    assert multiply is not None
    with torch.no_grad():
        return multiply(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """`x W^T + b` with a gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return fast_linear(grad_outputs[0], weight.T), None, None


class _OneDNNLinear(nn.Linear):
    """As `nn.Linear`, by `fast_linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        return fast_linear(input, self.weight, self.bias)


@contextmanager
def fast_linear_layers(model: nn.Module) -> Iterator[None]:
    """Compute the linear layers of a model on the CPU by oneDNN, if that is faster here.

    To others they are of another class meanwhile; afterwards they are what they were.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and not module.weight.is_meta]
    on_cpu = [layer for layer in layers if layer.weight.device.type == "cpu"] if onednn_operation() else []
    try:
        for layer in on_cpu:
            layer.__class__ = _OneDNNLinear
        yield
    finally:
        for layer in on_cpu:
            layer.__class__ = nn.Linear


@cache
def onednn_operation() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] | None:
    """oneDNN's linear layer on a processor of AMD with AVX-512, where it is right; else None. It has no gradient.

    The processor decides, not a measurement: two runs on one machine compute the same.
    """
    about = _CPU.read_text(encoding="utf-8", errors="replace") if _CPU.is_file() else ""
    multiply = onednn_linear() if "AuthenticAMD" in about and "avx512f" in about else None
    if multiply is None:
        return None
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 40, 33), (50, 33), (50,)))
    try:
        with torch.no_grad():
            columns = weight.T.contiguous().T
            right = F.linear(x, weight, bias)
            agrees = all(torch.allclose(multiply(x, each, bias), right, atol=1e-4) for each in (weight, columns))
    except Exception:  # a private operation, which another release may change
        agrees = False
    return multiply if agrees else None
