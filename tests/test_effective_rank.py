import math

import pytest
import torch

from osft.models.low_rank import effective_rank


def with_singular_values(values: list[float], shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, len(values), generator=generator)).Q for n in shape)
    return left @ torch.diag(torch.tensor(values)) @ right.T


@pytest.mark.parametrize("shape", [(6, 6), (40, 6), (6, 40)])
@pytest.mark.parametrize("used", [1, 3, 6])
def test_equal_singular_values_count_one_each(shape: tuple[int, int], used: int):
    assert effective_rank(with_singular_values([0.3] * used, shape)) == pytest.approx(used, rel=1e-3)


def test_directions_count_by_their_share_of_the_squared_norm():
    shares = (9 / 10, 1 / 10)
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(with_singular_values([3.0, 1.0], (8, 5))) == pytest.approx(expected, rel=1e-3)


def test_stack_of_experts_is_their_mean_and_an_idle_one_counts_nothing():
    stack = torch.stack([with_singular_values([1.0] * 4, (9, 5)), torch.zeros(9, 5)])
    assert effective_rank(stack) == pytest.approx(2, rel=1e-3)


def test_update_that_is_not_finite_has_no_effective_rank():
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.inf], [0.0, 1.0]])))
