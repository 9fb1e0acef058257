"""The first call of each function of MKL's vector library, by one thread.

PyTorch computes cosines, exponentials and the like of float32 and float64 on x86 by MKL, which finds out with a
function's first call how to compute it. If several threads make that call at once, one of them may compute its share of
that one tensor with the least accuracy (pytorch/pytorch#188792, torch 2.13): in one process of four on a Xeon the
cosines of the first forward pass were off by 1.5e-4, and so the loss of the first step by 8e-5 of itself.
"""

from functools import cache

import torch

_FUNCTIONS = (
    *("acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "exp2"),
    *("expm1", "floor", "lgamma", "log", "log10", "log1p", "log2", "round", "rsqrt", "sigmoid", "sin", "sinh", "sqrt"),
    *("tan", "tanh", "trunc"),
)


@cache
def settle_vector_math() -> None:
    """Make these calls. Modules that lead to a model's computation call it when they are imported."""
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype, device="cpu")  # one element: no thread beside this one
        for name in _FUNCTIONS:
            getattr(torch, name)(number)
