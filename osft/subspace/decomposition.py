"""Splitting a weight into frozen and free directions.

protect="weights": for a weight W (m x n) with singular value decomposition W = U S V^T, the r smallest singular values
are unfrozen and the k = min(m, n) - r largest are frozen (arXiv:2504.07097, section 3). The update D of a training run
must satisfy U_high^T D = 0 and D V_high = 0. Of experts stacked in one tensor (num_experts, m, n), each is a weight of
its own.

protect="activations": for the inputs x (n,) of a layer y = W x with second moment C = E[x x^T] = Q diag(c) Q^T, the r
directions R with the least energy c_j are free, D = X R^T. What the frozen directions carry passes as before: D x = 0
for each x in their span (gradient projection memory, Saha et al. 2021, arXiv:2103.09762; the null space of inputs,
Tang et al. 2025, arXiv:2503.02659).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch

from osft.subspace.second_moment import SecondMoment, add_gram_, orthonormalized

SplitKind = Literal["complement", "core", "right", "left"]
"""How a weight is split. "complement" and "core": by its singular vectors, as `FreeSubspace` says. "right" and "left":
by the inputs of its layer, which a weight stored (out, in) is multiplied with from the right, and one stored (in, out),
such as that of a `Conv1D`, from the left."""


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
    | "right"                       | -           | R: n x r    | -                     | m x r   |
    | "left"                        | R: m x r    | -           | -                     | r x n   |

    A frozen direction whose singular value is below 1e-6 of the largest one has a column of zeros in `frozen`: the
    weight is zero there to float32, so its long side is no direction of the weight, and nothing is kept free of it.
    """

    singular_values: torch.Tensor | None = None
    """(min(m, n),), descending; of a split by singular vectors."""
    energies: torch.Tensor | None = None
    """(in_features,), descending, the eigenvalues of C; of a split by inputs, the last r are those of R."""
    curvature: torch.Tensor | None = None
    """Of a split by inputs, s c_j of each free direction, (1, r) or (r, 1) as it is multiplied with X."""
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    frozen: torch.Tensor | None = None
    margin_left: torch.Tensor | None = None
    """Of a square weight, or "core": the frozen singular vectors next to the split, U (m, `margin_rank`), the largest
    first. Training needs none; after it, some of them may be free (`osft.subspace.next_split`)."""
    margin_right: torch.Tensor | None = None
    """Of the same singular values, V (n, `margin_rank`)."""

    def mirrored(self) -> "Factors":
        """Those of the transposed weight, of a split by singular vectors."""
        return replace(
            self,
            left=self.right,
            right=self.left,
            margin_left=self.margin_right,
            margin_right=self.margin_left,
        )

    def of_expert(self, number: int) -> "Factors":
        """Those of one weight in a stack."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return Factors(**{name: None if tensor is None else tensor[number] for name, tensor in found.items()})


def stacked(splits: Sequence[Factors]) -> Factors:
    """Those of a stack of experts, each split by itself; the margin is the smallest of theirs."""

    def stack(name: str) -> torch.Tensor | None:
        tensors = [tensor for split in splits if (tensor := getattr(split, name)) is not None]
        if not tensors:
            return None
        size = min(tensor.shape[-1] for tensor in tensors)  # of a margin, the columns next to the split
        return torch.stack([tensor[..., tensor.shape[-1] - size :] for tensor in tensors])

    return Factors(**{field.name: stack(field.name) for field in fields(Factors)})


def margin_rank(rank: int, frozen_rank: int) -> int:
    """How many frozen directions next to the split are kept of a square weight or "core": a quarter of the free ones.

    An update that moves more than that past frozen directions is followed by a decomposition of the whole weight.
    """
    return min(frozen_rank, max(8, math.ceil(rank / 4)))


def split_of_inputs(*, transposed: bool) -> SplitKind:
    """The split by inputs of a weight, stored (in, out) if `transposed`."""
    return "left" if transposed else "right"


def num_directions(shape: tuple[int, ...], split: SplitKind) -> int:
    """The directions, frozen and free, of a weight (m, n), or of each in a stack."""
    *_, m, n = shape
    return {"right": n, "left": m}.get(split, min(m, n))


def unfrozen_rank(shape: tuple[int, ...], unfreeze_rank_ratio: float, split: SplitKind = "complement") -> int:
    """Number of unfrozen directions of a weight (m, n), or of each in a stack: the ratio of all of them, rounded.

    All are min(m, n) of a split by singular vectors, and the number of the layer's inputs of one by inputs.

    Raises ValueError where that is 0: the weight is too small for so small a ratio.
    """
    size = num_directions(shape, split)
    rank = round(unfreeze_rank_ratio * size)
    if rank == 0:
        raise ValueError(
            f"unfreeze_rank_ratio {unfreeze_rank_ratio} leaves nothing to train in a weight of shape "
            f"{tuple(shape)}; it needs more than {0.5 / size:.4g}"
        )
    return rank


def factor_shapes(shape: tuple[int, ...], rank: int, split: SplitKind) -> dict[str, tuple[int, ...]]:
    """Shapes of the bases, of the coefficients X and of their curvature for a weight of `shape`, as `Factors` has them.

    `shape` is (m, n), or (num_experts, m, n), and then each result starts with num_experts.
    """
    *stack, m, n = shape
    frozen_rank = min(m, n) - rank
    shapes: dict[str, tuple[int, ...]]
    if split == "right":
        shapes = {"right": (n, rank), "coefficients": (m, rank), "curvature": (1, rank)}
    elif split == "left":
        shapes = {"left": (m, rank), "coefficients": (rank, n), "curvature": (rank, 1)}
    elif m == n or split == "core":
        shapes = {"left": (m, rank), "right": (n, rank), "coefficients": (rank, rank)}
    elif m > n:
        shapes = {"right": (n, rank), "frozen": (n, frozen_rank), "coefficients": (m, rank)}
    else:
        shapes = {"left": (m, rank), "frozen": (m, frozen_rank), "coefficients": (rank, n)}
    return {name: (*stack, *shape) for name, shape in shapes.items()}


def split_by_inputs(
    moment: SecondMoment, rank: int, split: SplitKind, *, gradient_energy: torch.Tensor, unit: float
) -> Factors:
    """The `rank` directions of least energy of a layer's inputs, on the side that `split` ("right" or "left") says.

    moment: C, its basis orthonormal at least to float16. gradient_energy: s, the mean over the layer's outputs of the
    energy of their gradient, () or (num_experts,). unit: what s c_j is divided by, so that `stiffness` has none
    (`Statistics.unit`).

    Where only leading directions were kept, the others have equal energy and any orthonormal basis of them will do.
    Everything is on the moment's device; of experts stacked.
    """
    basis, energies = _all_directions(moment)
    bases: dict[str, torch.Tensor] = {split: orthonormalized(basis, rank)}
    return Factors(
        energies=energies,
        curvature=curvature(energies, rank, split, gradient_energy=gradient_energy, unit=unit),
        **bases,
    )


def _all_directions(moment: SecondMoment) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole orthonormal basis (n, n) in which the moment is diagonal, and the energies (n,), descending."""
    known = moment.rank
    if known == moment.size:
        return moment.basis, moment.energies
    others = torch.linalg.qr(moment.basis, mode="complete")[0][..., known:]
    energies = torch.cat([moment.energies, moment.rest[..., None].expand_as(others[..., 0, :])], dim=-1)
    # What is left over may carry more than the last directions that are known, as after an addition.
    energies, order = energies.sort(dim=-1, descending=True, stable=True)
    basis = torch.cat([moment.basis, others], dim=-1)
    return basis.gather(-1, order[..., None, :].expand_as(basis)), energies


def curvature(
    energies: torch.Tensor, rank: int, split: SplitKind, *, gradient_energy: torch.Tensor, unit: float
) -> torch.Tensor:
    """s c_j / unit of the `rank` directions of least energy, shaped to be multiplied with X."""
    free = energies[..., energies.shape[-1] - rank :] * gradient_energy[..., None] / unit
    return free[..., None, :] if split == "right" else free[..., None]


def decompose(weight: torch.Tensor, rank: int, split: SplitKind = "complement") -> Factors:
    """Split `weight` with `rank` unfrozen directions: (m, n) or (num_experts, m, n), any float dtype, any device.

    The singular vectors of the short side are the eigenvectors of the smaller Gram matrix in float64, those of
    the long side, where they are needed, a Householder QR of the weight times them, largest first (of a weight that is
    well conditioned, only of those that are kept). Double precision keeps the subspaces exact to float32, both sides
    belong together even where singular values coincide at the split, and a rank-deficient weight still gets complete
    orthonormal bases.
    """
    if weight.ndim == 3:  # one by one: the double precision that it takes is that of one expert
        return stacked([decompose(expert, rank, split) for expert in weight])
    m, n = weight.shape
    if m < n:
        return decompose(weight.T, rank, split).mirrored()
    exact = weight.to(torch.float64)
    eigenvalues, eigenvectors = torch.linalg.eigh(_gram(exact))
    right_vectors = eigenvectors.flip(-1)  # eigh sorts ascending, an SVD descending
    singular_values = eigenvalues.flip(-1).clamp_min(0).sqrt()
    needed = factor_shapes((m, n), rank, split)
    frozen_rank = n - rank
    bases = {"right": right_vectors[:, frozen_rank:]}
    if "left" in needed:
        first = frozen_rank - margin_rank(rank, frozen_rank)
        # W v of the directions before are orthogonal to those of the others up to 1e-16 s_1^2 / (s_before s_other).
        if first and singular_values[first - 1] * singular_values[-1] < 1e-9 * singular_values[0] ** 2:
            first = 0
        left_vectors, triangle = torch.linalg.qr(exact @ right_vectors[:, first:])
        left_vectors *= torch.where(triangle.diagonal() < 0, -1, 1)  # W v = s u, with a positive s
        margin = slice(frozen_rank - margin_rank(rank, frozen_rank), frozen_rank)
        bases |= {
            "left": left_vectors[:, frozen_rank - first :],
            "margin_left": left_vectors[:, margin.start - first : margin.stop - first],
            "margin_right": right_vectors[:, margin],
        }
    if "frozen" in needed:
        high = singular_values[:frozen_rank]
        inverse = torch.where(high > 1e-6 * singular_values[0], 1 / high, 0)
        bases["frozen"] = right_vectors[:, :frozen_rank] * inverse
    return Factors(
        singular_values=singular_values.float(),
        **{name: basis.float().contiguous() for name, basis in bases.items()},
    )


def _gram(weight: torch.Tensor) -> torch.Tensor:
    """W^T W, (n, n), as `eigh` reads it: the lower triangle."""
    gram = weight.new_zeros(weight.shape[1], weight.shape[1])
    add_gram_(gram, weight)
    return gram
