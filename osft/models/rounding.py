"""Rounding of an exact weight to the dtype in which it is served.

A training at a low learning rate moves most entries of a bfloat16 weight by less than half the distance to the next
number, so that rounding to the nearest one gives back the base's entry and loses what was learned.

    nearest       to the nearest number; ties to even
    stochastic    to one of the two neighbours, to the nearer one with the larger probability, so that the expected
                  value is the exact one (Gupta et al., "Deep Learning with Limited Numerical Precision",
                  arXiv:1502.02551, section 3)
    compensated   column by column, each error passed on to the columns that follow, so that what the layer computes
                  of its usual inputs changes least (GPTQ, Frantar et al., arXiv:2210.17323; in the form of LDLQ, Chee
                  et al., arXiv:2307.13304, section 3)

What rounding took is kept, so that the exact weight can be had again in float32. A model that is served in bfloat16 has
8 significant bits, and what a short training learns is mostly smaller than the last of them. So beside the rounded
weight W' a checkpoint keeps the residual W - W' as 16-bit integers, in units of a power of two for each row:

    W = W' + q 2^e,    q in [-32767, 32767],    2^e the smallest power of two that covers the row's largest residual

Why not the coefficients of the update and the key of their factors: those are smaller for one round, but every round
adds its own, all factor sets of a lineage would have to be kept, and what a next round needs is the weight itself. The
residual costs 2 bytes for each entry of a trained weight whatever the number of rounds and the way of rounding, needs
nothing but its own folder, and is exact to float32: the error is at most 2^(e-1), half a unit in the last place of the
row's largest weight where W' is the nearest bfloat16 number.
"""

import hashlib
import math
from dataclasses import dataclass

import torch

from osft.models.origin import RoundingLoss
from osft.settings.run import Rounding

BLOCK_COLUMNS = 128
"""Columns between which errors are passed on one by one; to the columns after them it is one matrix product."""
_LARGEST_RESIDUAL = 32767
"""Of an entry, in its row's unit."""
DAMPING = 0.01
"""Share of the moments' mean diagonal that is added to the diagonal, as in GPTQ."""


def round_weight(
    exact: torch.Tensor,
    base: torch.Tensor,
    dtype: torch.dtype,
    method: Rounding,
    *,
    moments: torch.Tensor | None = None,
    transposed: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The weight in `dtype`. Entries that are the base's are rounded to the nearest number, whatever the method.

    So a weight that was not trained, of a base in `dtype`, keeps its bytes. Under "compensated" this holds for rows
    that were not trained: within a row, errors move.

    exact: (m, n), or (num_experts, m, n) for a stack of experts, each rounded by itself; float32. base: the weight
    before it was trained, of the same shape, any float dtype. moments: of the inputs, C = E[x x^T], (n, n), or
    (num_experts, n, n), for "compensated". transposed: the inputs are the rows, as in `Conv1D`; the moments are then
    (m, m). generator: for "stochastic", as from `generator_of`.

    Raises ValueError for NaN and infinity, for numbers that `dtype` cannot hold, and where a method lacks its moments
    or its generator.
    """
    if not exact.isfinite().all():
        raise ValueError("the weight holds NaN or infinity: the training diverged. Use a lower learning_rate")
    if dtype == torch.float32:
        return exact
    nearest, unchanged = exact.to(dtype), exact == base
    if method == "nearest":
        rounded = nearest
    elif method == "stochastic":
        if generator is None:
            raise ValueError("stochastic rounding needs a generator, so that a repeated save gives the same bytes")
        rounded = torch.where(unchanged, nearest, _stochastic(exact, nearest, generator))
    else:
        if moments is None:
            raise ValueError("compensated rounding needs the second moments of the layer's inputs")
        unchanged = unchanged.all(dim=-2 if transposed else -1, keepdim=True)
        rounded = torch.where(unchanged, nearest, _compensated_weight(exact, dtype, moments, transposed=transposed))
    if not rounded.isfinite().all():
        raise ValueError(
            f"{str(dtype).removeprefix('torch.')} cannot hold the weight, whose largest entry is "
            f"{exact.abs().max().item():.4g}. Set save_dtype to float32"
        )
    return rounded


def generator_of(name: str, seed: int = 0) -> torch.Generator:
    """A generator of random numbers that depends on a tensor's name and on a seed only, on the CPU."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _stochastic(exact: torch.Tensor, nearest: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """With the probability |x - near| / |other - near| the other neighbour of x, else the nearer one.

    The differences are exact in float32, so the expected value is x. Beyond the dtype's largest number, which has no
    other neighbour, the nearer one.
    """
    error = exact - nearest.float()
    other = _neighbour(nearest, error > 0)
    gap = (other.float() - nearest.float()).abs()
    # On the generator's device, for the same numbers wherever the weight is.
    uniform = torch.rand(exact.shape, generator=generator, device=generator.device).to(exact.device)
    return torch.where((uniform * gap < error.abs()) & other.isfinite(), other, nearest)


def _neighbour(value: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The next larger number of the dtype, bfloat16 or float16, where `up` is true, else the next smaller one."""
    bits = value.view(torch.int16)  # a sign, and an integer that grows with the number's size
    stepped = torch.where(up == (bits >= 0), bits + 1, bits - 1)
    smallest = torch.where(up, 1, -0x7FFF).to(torch.int16)  # one step from zero, with the sign of the direction
    return torch.where(value == 0, smallest, stepped).view(value.dtype)


def _compensated_weight(
    exact: torch.Tensor, dtype: torch.dtype, moments: torch.Tensor, *, transposed: bool
) -> torch.Tensor:
    """`_compensated` of a weight or of each expert, the inputs' dimension last or, transposed, first."""
    if exact.ndim == 3:
        each = moments if moments.ndim == 3 else [moments] * len(exact)
        pairs = zip(exact, each, strict=True)
        return torch.stack([_compensated_weight(e, dtype, c, transposed=transposed) for e, c in pairs])
    if transposed:
        return _compensated(exact.T, dtype, moments).T.contiguous()
    return _compensated(exact, dtype, moments)


def _compensated(exact: torch.Tensor, dtype: torch.dtype, moments: torch.Tensor) -> torch.Tensor:
    """Round the columns of `exact` (m, n) in turn, each after the errors of those before it were added to it.

    With C = U diag(d) U^T, U upper triangular with ones on its diagonal, and E = exact - rounded, column k becomes
    nearest(exact_k + sum_{j<k} E_j U_jk). Then E U = N, the errors of the single roundings, at most half a step each,
    and tr(E C E^T) = sum_k d_k |N_k|^2, where d_k is the part of input k's energy that the inputs after it do not
    explain. Costs n^3 / 3 + m n^2 multiplications.
    """
    # Inputs with the most energy first: most others come after them, so that the least of it is left unexplained.
    order = moments.diagonal().argsort(descending=True)
    unit_upper = _unit_upper(moments[order][:, order])
    weight = exact[:, order]
    rounded = torch.empty_like(weight, dtype=dtype)
    errors = torch.zeros_like(weight)
    size = weight.shape[1]
    for start in range(0, size, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, size)
        block = weight[:, start:stop] + errors[:, :start] @ unit_upper[:start, start:stop]
        inner = unit_upper[start:stop, start:stop]
        block_errors = torch.zeros_like(block)
        for k in range(stop - start):
            column = block[:, k] + block_errors[:, :k] @ inner[:k, k]
            rounded[:, start + k] = column.to(dtype)
            block_errors[:, k] = weight[:, start + k] - rounded[:, start + k].float()
        errors[:, start:stop] = block_errors
    return rounded[:, order.argsort()]


def _unit_upper(moments: torch.Tensor) -> torch.Tensor:
    """U of C + damping = U diag(d) U^T, (n, n) float32: a Cholesky decomposition from the last input to the first."""
    damped = moments.float().clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    if not mean.isfinite() or mean <= 0:
        raise ValueError("the second moments of the inputs hold NaN, or are zero")
    diagonal += DAMPING * mean
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    return (lower / lower.diagonal()).flip(0, 1)


def encode_residual(exact: torch.Tensor, rounded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual of a weight: `q`, int16, of its shape, and the rows' units `2^e`, float32, (..., 1).

    exact: (..., n), float32; rounded: the same shape, a dtype of less precision. A tensor without dimensions is a row.
    """
    difference = torch.atleast_1d(exact.float() - rounded.float())
    largest = difference.abs().amax(-1, keepdim=True)
    _, exponent = torch.frexp(largest / _LARGEST_RESIDUAL)  # largest / _LARGEST_RESIDUAL < 2^exponent
    units = torch.ldexp(torch.ones_like(largest), exponent.clamp_min(-126))
    q = torch.round(difference / units).clamp_(-_LARGEST_RESIDUAL, _LARGEST_RESIDUAL).to(torch.int16)
    return q.view(exact.shape), units


def decode_residual(rounded: torch.Tensor, q: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """W' + q 2^e, float32, of a rounded weight and its residual as `encode_residual` gave it, or of some rows."""
    return torch.addcmul(torch.atleast_1d(rounded.float()), torch.atleast_1d(q.float()), units).view(rounded.shape)


@dataclass(slots=True)
class UpdateSums:
    """Squared norms and products of updates D and of the served ones D' = W' - W0, which add up over weights."""

    update: float = 0.0
    """|D|^2."""
    served: float = 0.0
    """|D'|^2."""
    product: float = 0.0
    """<D', D>."""
    difference: float = 0.0
    """|D' - D|^2."""
    outside: float = 0.0
    """|D' - P D'|^2, P projecting on what training can reach."""

    @classmethod
    def of(cls, update: torch.Tensor, served: torch.Tensor, outside: torch.Tensor | None = None) -> "UpdateSums":
        """Those of one weight: D, D' and, where P is known, D' - P D'."""
        return cls(
            update=square(update),
            served=square(served),
            product=torch.sum(served * update, dtype=torch.float64).item(),
            difference=square(served - update),
            outside=0.0 if outside is None else square(outside),
        )

    def add(self, other: "UpdateSums") -> None:
        """Add those of another weight."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def loss(self) -> RoundingLoss:
        """The shares."""
        if not self.update:
            return RoundingLoss(update_lost=None, rounding_error=None, frozen_share=None)
        return RoundingLoss(
            update_lost=1 - self.product / self.update,
            rounding_error=math.sqrt(self.difference / self.update),
            frozen_share=math.sqrt(self.outside / self.served) if self.served else None,
        )


def square(tensor: torch.Tensor) -> float:
    """The sum of the squares of all entries, added up in float64."""
    return torch.sum(tensor.square(), dtype=torch.float64).item()
