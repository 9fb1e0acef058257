"""The split: the directions of an SVD, orthonormal whatever the weight looks like."""

import pytest
import torch

from osft.subspace.decomposition import decompose, factor_shapes, unfrozen_rank


def spectrum(shape: tuple[int, int], values: torch.Tensor) -> torch.Tensor:
    """A random weight with these singular values."""
    torch.manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(shape[0], len(values), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], len(values), dtype=torch.float64))
    return (left * values.double()) @ right.T


def long_side(weight: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
    """The frozen directions of the long side, as columns: W0 B of a tall weight, W0^T B of a wide one."""
    tall = weight.shape[0] > weight.shape[1]
    return (weight.double() if tall else weight.double().T) @ frozen.double()


SHAPES = [(30, 30), (50, 30), (30, 50)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("free_subspace", ["complement", "core"])
def test_bases_span_the_singular_subspaces(shape, free_subspace):
    weight = spectrum(shape, torch.logspace(1, -3, 30))
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    factors = decompose(weight.float(), 8, free_subspace)
    torch.testing.assert_close(factors.singular_values.double(), values, rtol=1e-5, atol=1e-6)
    high_left, high_right = left[:, :22], right[:22].T
    if factors.left is not None:
        assert (high_left.T @ factors.left.double()).norm() < 1e-5
    if factors.right is not None:
        assert (high_right.T @ factors.right.double()).norm() < 1e-5
    if factors.frozen is not None:
        frozen = high_left if shape[0] > shape[1] else high_right
        found = long_side(weight, factors.frozen)
        assert (frozen @ frozen.T - found @ found.T).norm() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("free_subspace", ["complement", "core"])
@pytest.mark.parametrize("rank", [1, 8, 30])
def test_shapes_are_those_of_the_table(shape, free_subspace, rank):
    factors = decompose(torch.randn(shape), rank, free_subspace)
    expected = factor_shapes(shape, rank, free_subspace)
    for name in ("left", "right", "frozen"):
        basis = getattr(factors, name)
        assert (None if basis is None else tuple(basis.shape)) == expected.get(name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "values",
    [torch.zeros(30), torch.ones(30), torch.cat([torch.ones(5), torch.zeros(25)]), torch.logspace(6, -6, 30)],
    ids=["zero", "all-equal", "rank-5", "ill-conditioned"],
)
@pytest.mark.parametrize("free_subspace", ["complement", "core"])
def test_bases_are_orthonormal_for_degenerate_weights(shape, values, free_subspace):
    factors = decompose(spectrum(shape, values).float(), 8, free_subspace)
    for basis in (factors.left, factors.right):
        if basis is not None:
            assert basis.isfinite().all()
            torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(50, 30), (30, 50)])
@pytest.mark.parametrize(
    ("values", "kept"),
    [
        (torch.zeros(30), 0),
        (torch.ones(30), 22),
        (torch.cat([torch.ones(5), torch.zeros(25)]), 5),
        (torch.logspace(0, -29, 30), 7),  # 1 to 1e-6
    ],
    ids=["zero", "all-equal", "rank-5", "ill-conditioned"],
)
def test_frozen_directions_of_the_long_side_are_those_in_which_the_weight_is_not_zero(shape, values, kept):
    values = values.double()
    weight = spectrum(shape, values)
    frozen = decompose(weight, 8).frozen
    assert frozen.isfinite().all()
    columns = long_side(weight, frozen)
    assert int((columns.norm(dim=0) > 0.5).sum()) == pytest.approx(kept, abs=1)
    assert (columns.norm(dim=0)[kept + 1 :] < 1e-6).all()
    # What float32 loses of a column grows with the ratio of the largest singular value to its own.
    well_conditioned = columns[:, : int((values > 1e-3).sum().clamp(max=22))]
    identity = torch.eye(well_conditioned.shape[1], dtype=torch.float64)
    torch.testing.assert_close(well_conditioned.T @ well_conditioned, identity, rtol=0, atol=2e-4)


def test_both_sides_belong_together_where_singular_values_coincide():
    # Every choice of the split is arbitrary here, but U_low^T W V_high must still vanish.
    weight = spectrum((30, 30), torch.ones(30)).float()
    factors = decompose(weight, 8)
    through = factors.left.T @ weight @ factors.right
    torch.testing.assert_close(through @ through.T, torch.eye(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ratio", "rank"), [(0.25, 16), (1.0, 64), (0.01, 1), (0.5, 32)])
def test_unfrozen_rank_rounds_share_of_the_smaller_side(ratio, rank):
    assert unfrozen_rank((64, 200), ratio) == unfrozen_rank((200, 64), ratio) == rank


def test_ratio_too_small_for_the_weight_is_refused():
    with pytest.raises(ValueError, match=r"leaves nothing to train in a weight of shape \(8, 200\)"):
        unfrozen_rank((8, 200), 0.01)
