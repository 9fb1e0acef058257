"""Splitting a weight into frozen and free directions.

For a weight W (m x n) with singular value decomposition W = U S V^T, the r smallest singular values are
unfrozen and the k = min(m, n) - r largest are frozen (arXiv:2504.07097, section 3). The update D of a
training run must satisfy U_high^T D = 0 and D V_high = 0. Of experts stacked in one tensor (num_experts, m, n), each
is a weight of its own.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from osft.config import FreeSubspace


@dataclass(kw_only=True, slots=True)
class Factors:
    """Orthonormal bases of one weight's split, float32. What a shape does not need is None.

    Of a stack of experts every tensor has the experts as its first dimension.

    The update is `D = left X right^T`, a missing basis standing for the identity; where `frozen` is given, X
    is kept orthogonal to the frozen directions of its long side. Those are `U_high = W0 V_high / S_high` of a tall
    weight, so what is kept is the short `V_high / S_high`, and of a wide one `U_high / S_high`.

    | weight                        | left        | right       | frozen                | X       |
    |-------------------------------|-------------|-------------|-----------------------|---------|
    | square, or "core"             | U_low: m x r | V_low: n x r | -                     | r x r   |
    | "complement", tall (m > n)    | -           | V_low: n x r | V_high / S_high: n x k | m x r   |
    | "complement", wide (m < n)    | U_low: m x r | -           | U_high / S_high: m x k | r x n   |

    A frozen direction whose singular value is below 1e-6 of the largest one has a column of zeros in `frozen`: the
    weight is zero there to float32, so its long side is no direction of the weight, and nothing is kept free of it.
    """

    singular_values: torch.Tensor
    """(min(m, n),), descending."""
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    frozen: torch.Tensor | None = None


def unfrozen_rank(shape: tuple[int, ...], unfreeze_rank_ratio: float) -> int:
    """Number of unfrozen singular directions, `round(ratio * min(m, n))`, of a weight (m, n) or of each in a stack.

    Raises ValueError where that is 0: the weight is too small for so small a ratio.
    """
    smaller = min(shape[-2:])
    rank = round(unfreeze_rank_ratio * smaller)
    if rank == 0:
        raise ValueError(
            f"unfreeze_rank_ratio {unfreeze_rank_ratio} leaves nothing to train in a weight of shape "
            f"{tuple(shape)}; it needs more than {0.5 / smaller:.4g}"
        )
    return rank


def factor_shapes(shape: tuple[int, ...], rank: int, free_subspace: FreeSubspace) -> dict[str, tuple[int, ...]]:
    """Shapes of the bases and of the coefficients X for a weight of `shape`, as in the table of `Factors`.

    `shape` is (m, n), or (num_experts, m, n), and then each result starts with num_experts.
    """
    *stack, m, n = shape
    frozen_rank = min(m, n) - rank
    shapes: dict[str, tuple[int, ...]]
    if m == n or free_subspace == "core":
        shapes = {"left": (m, rank), "right": (n, rank), "coefficients": (rank, rank)}
    elif m > n:
        shapes = {"right": (n, rank), "frozen": (n, frozen_rank), "coefficients": (m, rank)}
    else:
        shapes = {"left": (m, rank), "frozen": (m, frozen_rank), "coefficients": (rank, n)}
    return {name: (*stack, *shape) for name, shape in shapes.items()}


def decompose(weight: torch.Tensor, rank: int, free_subspace: FreeSubspace = "complement") -> Factors:
    """Split `weight` with `rank` unfrozen directions: (m, n) or (num_experts, m, n), any float dtype, any device.

    The singular vectors of the short side are the eigenvectors of the smaller Gram matrix in float64, those of
    the long side, where they are needed, a Householder QR of the weight times them, largest first. Double
    precision keeps the subspaces exact to float32, both sides belong together even where singular values coincide
    at the split, and a rank-deficient weight still gets complete orthonormal bases.
    """
    if weight.ndim == 3:  # one by one: the double precision that it takes is that of one expert
        splits = [asdict(decompose(expert, rank, free_subspace)) for expert in weight]
        stacked: dict[str, Any] = {
            name: None if basis is None else torch.stack([split[name] for split in splits])
            for name, basis in splits[0].items()
        }
        return Factors(**stacked)
    m, n = weight.shape
    if m < n:
        mirrored = decompose(weight.T, rank, free_subspace)
        return Factors(
            singular_values=mirrored.singular_values,
            left=mirrored.right,
            right=mirrored.left,
            frozen=mirrored.frozen,
        )
    exact = weight.to(torch.float64)
    eigenvalues, eigenvectors = torch.linalg.eigh(exact.T @ exact)
    right_vectors = eigenvectors.flip(-1)  # eigh sorts ascending, an SVD descending
    singular_values = eigenvalues.flip(-1).clamp_min(0).sqrt()
    needed = factor_shapes((m, n), rank, free_subspace)
    frozen_rank = n - rank
    bases = {"right": right_vectors[:, frozen_rank:]}
    if "left" in needed:
        bases["left"] = torch.linalg.qr(exact @ right_vectors)[0][:, frozen_rank:]
    if "frozen" in needed:
        high = singular_values[:frozen_rank]
        inverse = torch.where(high > 1e-6 * singular_values[0], 1 / high, 0)
        bases["frozen"] = right_vectors[:, :frozen_rank] * inverse
    return Factors(
        singular_values=singular_values.float(),
        **{name: basis.float().contiguous() for name, basis in bases.items() if name in needed},
    )
