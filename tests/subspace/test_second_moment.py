"""Second moments: kept whole or in part, added up."""

import pytest
import torch

from osft.subspace.second_moment import SecondMoment, add_gram_, fill_upper_


def matrix(n=12, seed=0, vectors=40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(vectors, n, generator=generator) * torch.logspace(0, -2, n)
    return rows.T @ rows / vectors


def test_whole_moment_is_the_matrix():
    torch.testing.assert_close(SecondMoment.of(matrix()).dense(), matrix(), atol=1e-6, rtol=0)


def test_directions_are_orthonormal_and_descend():
    moment = SecondMoment.of(matrix())
    torch.testing.assert_close(moment.basis.T @ moment.basis, torch.eye(12), atol=1e-6, rtol=0)
    assert torch.equal(moment.energies, moment.energies.sort(descending=True).values)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        SecondMoment.of(matrix() * torch.nan)


def test_sum_of_whole_moments_is_exact():
    total = SecondMoment.of(matrix(seed=0)).plus(matrix(seed=1), 12)
    torch.testing.assert_close(total.dense(), matrix(seed=0) + matrix(seed=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [4, 12])
def test_experts_add_up_one_by_one(rank):
    first, second = (torch.stack([matrix(seed=seed), matrix(seed=seed + 1)]) for seed in (0, 5))
    total = SecondMoment.of(first, rank).plus(second.clone(), rank)
    for index in range(2):
        alone = SecondMoment.of(first[index], rank).plus(second[index].clone(), rank)
        torch.testing.assert_close(total.dense()[index], alone.dense(), atol=1e-6, rtol=0)
        torch.testing.assert_close(total.error_bound[index], alone.error_bound)


def test_sum_keeps_as_many_directions_as_were_known():
    assert SecondMoment.of(matrix(), 7).plus(matrix(), 5).rank == 7
    assert SecondMoment.of(matrix(), 5).plus(matrix(), 7).rank == 7


def decaying(n=160, seed=0) -> torch.Tensor:
    """Energies that fall as those of activations do."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    return (basis * (1.0 + torch.arange(n)) ** -1.5) @ basis.T


def test_few_directions_are_found_without_the_others():
    whole, few = SecondMoment.of(decaying()), SecondMoment.of(decaying(), 20)
    torch.testing.assert_close(few.energies, whole.energies[:20], rtol=1e-3, atol=0)
    torch.testing.assert_close(few.basis.T @ few.basis, torch.eye(20), atol=1e-6, rtol=0)
    torch.testing.assert_close(few.trace(), decaying().trace())


@pytest.mark.parametrize("max_rank", [20, 60, 140])
def test_error_bound_holds(max_rank):
    moment = SecondMoment.of(decaying(), max_rank)
    error = torch.linalg.matrix_norm(decaying() - moment.dense(), 2).item()
    assert 0 < error <= moment.error_bound.item() * (1 + 1e-4) + 1e-6


def test_whole_moment_has_no_error():
    assert SecondMoment.of(decaying()).error_bound == 0
    assert SecondMoment.of(decaying()).plus(decaying(seed=1), 160).error_bound == 0


@pytest.mark.parametrize("max_rank", [20, 100])
def test_sum_of_compressed_moments_stays_within_its_bound(max_rank):
    matrices = [decaying(seed=seed) for seed in range(3)]
    for order in ((0, 1, 2), (2, 0, 1)):
        total = SecondMoment.of(matrices[order[0]], max_rank)
        for index in order[1:]:
            total = total.plus(matrices[index].clone(), max_rank)
        assert total.rank == max_rank
        error = torch.linalg.matrix_norm(sum(matrices) - total.dense(), 2).item()
        assert 0 < error <= total.error_bound.item() * (1 + 1e-4)
        assert total.trace().item() == pytest.approx(sum(each.trace().item() for each in matrices), rel=1e-4)


@pytest.mark.parametrize("n", [1, 191, 192, 500])
def test_sums_of_products_are_symmetric_and_whole(n):
    rows = torch.randn(40, n)
    total = torch.zeros(n, n)
    add_gram_(total, rows)
    add_gram_(total, rows)
    fill_upper_(total)
    assert torch.equal(total, total.T)
    torch.testing.assert_close(total, 2 * rows.T @ rows, atol=1e-4, rtol=1e-5)
