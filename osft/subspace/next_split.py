"""The split of a weight after a round, from its split before the round: no decomposition of the whole weight.

Training adds D = U_low X V_low^T (or X V_low^T with U_high^T X = 0, of a tall weight), so that the frozen triplets stay
singular triplets of W = W0 + D, and its free part is a small matrix:

    square, "core"   U_low^T W V_low = S_low + X = P T Q^T, (r, r)     free triplets  U_low P, T, V_low Q
    tall             W V_low = P T Q^T, (m, r)                         free: T, V_low Q  (wide: the mirror image)

Old and new singular values are then sorted together, and the r smallest are free. What was free and has grown past a
frozen direction changes places with it. A tall weight's split has all its frozen directions; of the others `margin`
keeps the frozen directions next to the split.

    what is wrong                                             what happens: UnknownSplitError, and the caller decomposes
    the weight is not W0 + D (rounded when it was saved,      its residual on random directions, relative to its
    or of another model), or the split is damaged             largest singular value, is above TOLERANCE
    more directions grew than the margin has                  the frozen ones that they change places with are unknown
    the weight had a direction that is zero                   `frozen` has nothing of it
"""

import torch

from osft.subspace.decomposition import Factors, decompose, margin_rank, stacked

TOLERANCE = 5e-7
"""Of the residual, as a share of the largest singular value: some roundings of a weight in float32."""
_PROBES = 4
"""Random directions. A residual matrix E shows itself in E z of each of them by its Frobenius norm."""


class UnknownSplitError(ValueError):
    """A split does not follow from the one before; the message says why."""


def next_split(weight: torch.Tensor, before: Factors) -> Factors:
    """As `decompose(weight, ...)`, of a weight that was trained in the free directions of the split `before`.

    weight: (m, n) or (num_experts, m, n), any float dtype; the tensors of `before` on the same device. Raises
    UnknownSplitError where the table above says so.
    """
    if weight.ndim == 3:
        return stacked([next_split(expert, before.of_expert(number)) for number, expert in enumerate(weight)])
    if weight.shape[0] < weight.shape[1]:
        return next_split(weight.T, before.mirrored()).mirrored()
    weight = weight.float()
    assert before.right is not None, "of every split by singular vectors"
    through = weight @ before.right
    free = through if before.left is None else before.left.mT @ through
    _check(weight, before, through, free)
    rotated = decompose(free, free.shape[1])
    assert rotated.right is not None
    assert rotated.singular_values is not None
    right = before.right @ rotated.right
    high = _high_values(before)
    values, order = torch.cat([high, rotated.singular_values]).sort(descending=True, stable=True)
    if before.left is None:
        assert before.frozen is not None, "of a tall weight that is split on one side"
        place, grown = order.tensor_split([len(high)])
        return Factors(
            singular_values=values,
            right=torch.cat([before.frozen * high, right], dim=1).index_select(1, grown),
            frozen=torch.cat([before.frozen, right / rotated.singular_values], dim=1).index_select(1, place),
        )
    assert rotated.left is not None
    known, margin_left, margin_right = _margin(before)
    place, rank = (
        order - (len(high) - known),
        len(rotated.singular_values),
    )  # place: among the directions that are known
    if (place[len(high) :] < 0).any():
        raise UnknownSplitError(f"more directions grew past frozen ones than the {known} of the margin")
    next_to_the_split = int((place[: len(high)] >= 0).flip(0).cumprod(0).sum())
    margin = min(next_to_the_split, margin_rank(rank, len(high)))
    place = place[len(high) - margin :]
    left = torch.cat([margin_left, before.left @ rotated.left], dim=1).index_select(1, place)
    right = torch.cat([margin_right, right], dim=1).index_select(1, place)
    return Factors(
        singular_values=values,
        left=left[:, margin:].contiguous(),
        right=right[:, margin:].contiguous(),
        margin_left=left[:, :margin].contiguous(),
        margin_right=right[:, :margin].contiguous(),
    )


def _high_values(before: Factors) -> torch.Tensor:
    """S_high, descending."""
    assert before.singular_values is not None
    assert before.right is not None
    return before.singular_values[: len(before.singular_values) - before.right.shape[1]]


def _margin(before: Factors) -> tuple[int, torch.Tensor, torch.Tensor]:
    """The number of known frozen directions, and both sides of them; none of a set of an early release."""
    assert before.left is not None
    assert before.right is not None
    if before.margin_left is None or before.margin_right is None:
        return 0, before.left[:, :0], before.right[:, :0]
    return before.margin_left.shape[1], before.margin_left, before.margin_right


def _check(weight: torch.Tensor, before: Factors, through: torch.Tensor, free: torch.Tensor) -> None:
    """Raise UnknownSplitError unless the weight is block diagonal in the directions of `before`.

    weight: tall or square. through: W V_low. free: U_low^T W V_low, or W V_low of a split on one side.
    """
    high, right = _high_values(before), before.right
    assert right is not None
    largest = torch.cat([high[:1], torch.linalg.vector_norm(free).view(1)]).max()
    generator = torch.Generator().manual_seed(0)

    def directions(size: int) -> torch.Tensor:
        """Unit vectors, (_PROBES, size): as rows, which a matrix is multiplied with several times faster on a CPU."""
        drawn = torch.randn(_PROBES, size, generator=generator).to(weight)
        return drawn / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)

    def out_of_orthonormal(basis: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """(B^T B - I) z in float64."""
        exact, z = basis.double(), z.double()
        return z @ exact.mT @ exact - z

    z = directions(right.shape[1])
    found = {"the free directions are not orthonormal": out_of_orthonormal(right, z)}
    if before.left is None:
        assert before.frozen is not None
        if not (before.frozen != 0).any(dim=0).all():
            raise UnknownSplitError("the weight has directions in which it is zero")
        h = directions(len(high))
        # U_high = W `frozen`, V_high = `frozen` S_high
        into_frozen = z @ through.mT @ weight @ before.frozen
        again = (high * h) @ before.frozen.mT @ weight.mT @ weight @ before.frozen * high
        found["the free part reaches into the frozen directions"] = into_frozen / largest
        found["the frozen part is another one"] = (again - high**2 * h) / largest**2
    else:
        left = before.left
        known, margin_left, margin_right = _margin(before)
        h = directions(known)
        stretched = (high[len(high) - known :] * h) @ margin_left.mT
        energies = [  # in float32 of a row, in float64 of all rows
            torch.linalg.vector_norm(rows, dim=1).double().square().sum() for rows in (weight, high[:, None], free)
        ]
        found |= {
            "the free directions of the output are not orthonormal": out_of_orthonormal(left, z),
            "the free part reaches into the frozen outputs": (z @ through.mT - z @ free.mT @ left.mT) / largest,
            "the free part reaches into the frozen inputs": (z @ left.mT @ weight - z @ free @ right.mT) / largest,
            "the frozen directions next to the split are others": (h @ margin_right.mT @ weight.mT - stretched)
            / largest,
            "the frozen part has another size": (1 - (energies[1] + energies[2]) / energies[0]).view(1, 1),
        }
    for problem, residual in found.items():
        worst = torch.linalg.vector_norm(residual, dim=1).max().item()
        if not worst <= TOLERANCE:
            raise UnknownSplitError(f"{problem} ({worst:.1e}, at most {TOLERANCE:g})")
