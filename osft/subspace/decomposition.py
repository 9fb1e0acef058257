"""Splitting a weight into frozen and free directions.

For a weight W (m x n) with singular value decomposition W = U S V^T, the r smallest singular values are
unfrozen and the k = min(m, n) - r largest are frozen (arXiv:2504.07097, section 3). The update D of a
training run must satisfy U_high^T D = 0 and D V_high = 0.
"""

from dataclasses import dataclass

import torch

from osft.config import FreeSubspace


@dataclass(kw_only=True, slots=True)
class Factors:
    """Orthonormal bases of one weight's split, float32. What a shape does not need is None.

    The update is `D = left X right^T`, a missing basis standing for the identity; where `frozen` is given, X
    is kept orthogonal to it on its long side.

    | weight                        | left        | right       | frozen       | X       |
    |-------------------------------|-------------|-------------|--------------|---------|
    | square, or "core"             | U_low: m x r | V_low: n x r | -            | r x r   |
    | "complement", tall (m > n)    | -           | V_low: n x r | U_high: m x k | m x r   |
    | "complement", wide (m < n)    | U_low: m x r | -           | V_high: n x k | r x n   |
    """

    singular_values: torch.Tensor
    """(min(m, n),), descending."""
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    frozen: torch.Tensor | None = None


def unfrozen_rank(shape: tuple[int, int], unfreeze_rank_ratio: float) -> int:
    """Number of unfrozen singular directions, `round(ratio * min(m, n))`.

    Raises ValueError where that is 0: the weight is too small for so small a ratio.
    """
    smaller = min(shape)
    rank = round(unfreeze_rank_ratio * smaller)
    if rank == 0:
        raise ValueError(
            f"unfreeze_rank_ratio {unfreeze_rank_ratio} leaves nothing to train in a weight of shape "
            f"{tuple(shape)}; it needs more than {0.5 / smaller:.4g}"
        )
    return rank


def factor_shapes(shape: tuple[int, int], rank: int, free_subspace: FreeSubspace) -> dict[str, tuple[int, int]]:
    """Shapes of the bases and of the coefficients X for a weight of `shape` (m, n), as in the table of `Factors`."""
    m, n = shape
    frozen_rank = min(m, n) - rank
    if m == n or free_subspace == "core":
        return {"left": (m, rank), "right": (n, rank), "coefficients": (rank, rank)}
    if m > n:
        return {"right": (n, rank), "frozen": (m, frozen_rank), "coefficients": (m, rank)}
    return {"left": (m, rank), "frozen": (n, frozen_rank), "coefficients": (rank, n)}


def decompose(weight: torch.Tensor, rank: int, free_subspace: FreeSubspace = "complement") -> Factors:
    """Split `weight` ((m, n), any float dtype, any device) with `rank` unfrozen directions.

    The singular vectors of the short side are the eigenvectors of the smaller Gram matrix in float64, those of
    the long side a Householder QR of the weight times them, largest first. Double
    precision keeps the subspaces exact to float32, both sides belong together even where singular values coincide
    at the split, and a rank-deficient weight still gets complete orthonormal bases.
    """
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
    left_vectors, _ = torch.linalg.qr(exact @ right_vectors)

    frozen_rank = n - rank
    bases = {
        "left": left_vectors[:, frozen_rank:],
        "right": right_vectors[:, frozen_rank:],
        "frozen": left_vectors[:, :frozen_rank],
    }
    needed = factor_shapes((m, n), rank, free_subspace)
    return Factors(
        singular_values=singular_values.float(),
        **{name: basis.float().contiguous() for name, basis in bases.items() if name in needed},
    )
