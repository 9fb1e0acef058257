"""Linear layers in float32 on a CPU by oneDNN, where PyTorch's own choice is slow.

On x86 PyTorch multiplies float32 matrices with MKL, which leaves half the width of an AMD processor's AVX-512 unused:
512 x 576 times 576 x 1,536 numbers on two cores of an EPYC take 4.4 ms with MKL and 1.9 ms with oneDNN, one row 51 and
38 microseconds. Nothing is gained where MKL knows the processor. oneDNN's operation has no gradient, so that this is
for evaluation and for writing text.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn

from osft.process.private_names import onednn_linear

_CPU = Path("/proc/cpuinfo")


class _OneDNNLinear(nn.Linear):
    """As `nn.Linear`, by oneDNN where no gradient is wanted of float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        multiply = fast_linear()
        plain = type(self.weight) is nn.Parameter and input.dtype == self.weight.dtype == torch.float32
        if multiply is None or not plain or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        return multiply(input, self.weight, self.bias)


@contextmanager
def fast_linear_layers(model: nn.Module) -> Iterator[None]:
    """Compute the linear layers of a model on the CPU by oneDNN, if that is faster here.

    To others they are of another class meanwhile; afterwards they are what they were.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and not module.weight.is_meta]
    on_cpu = [layer for layer in layers if layer.weight.device.type == "cpu"] if fast_linear() else []
    try:
        for layer in on_cpu:
            layer.__class__ = _OneDNNLinear
        yield
    finally:
        for layer in on_cpu:
            layer.__class__ = nn.Linear


@cache
def fast_linear() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] | None:
    """oneDNN's linear layer on a processor of AMD with AVX-512, where it is right; else None.

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
            right = torch.allclose(multiply(x, weight, bias), nn.functional.linear(x, weight, bias), atol=1e-4)
    except Exception:  # a private operation, which another release may change
        right = False
    return multiply if right else None
