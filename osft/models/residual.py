"""What rounding took from a weight, so that it can be had again in float32.

A model that is served in bfloat16 has 8 significant bits, and what a short training learns is mostly smaller than the
last of them. So beside the rounded weight W' a checkpoint keeps the residual W - W' as 16-bit integers, in units of a
power of two for each row:

    W = W' + q 2^e,    q in [-32767, 32767],    2^e the smallest power of two that covers the row's largest residual

Why not the coefficients of the update and the key of their factors: those are smaller for one round, but every round
adds its own, all factor sets of a lineage would have to be kept, and what a next round needs is the weight itself. The
residual costs 2 bytes for each entry of a trained weight whatever the number of rounds and the way of rounding, needs
nothing but its own folder, and is exact to float32: the error is at most 2^(e-1), half a unit in the last place of the
row's largest weight where W' is the nearest bfloat16 number.
"""

import torch

_LARGEST = 32767


def encode(exact: torch.Tensor, rounded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual of a weight: `q`, int16, of its shape, and the rows' units `2^e`, float32, (..., 1).

    exact: (..., n), float32; rounded: the same shape, a dtype of less precision. A tensor without dimensions is a row.
    """
    difference = torch.atleast_1d(exact.float() - rounded.float())
    largest = difference.abs().amax(-1, keepdim=True)
    _, exponent = torch.frexp(largest / _LARGEST)  # largest / _LARGEST < 2^exponent
    units = torch.ldexp(torch.ones_like(largest), exponent.clamp_min(-126))
    q = torch.round(difference / units).clamp_(-_LARGEST, _LARGEST).to(torch.int16)
    return q.view(exact.shape), units


def decode(rounded: torch.Tensor, q: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """W' + q 2^e, float32, of a rounded weight and the residual that `encode` gave, or of some of their rows."""
    return torch.addcmul(torch.atleast_1d(rounded.float()), torch.atleast_1d(q.float()), units).view(rounded.shape)
