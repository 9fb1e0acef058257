"""The split after a round, from the one before it: that of the new weight, or a refusal."""

from dataclasses import replace

import pytest
import torch

from osft.models.rounding import decode_residual, encode_residual
from osft.subspace import decompose
from osft.subspace.decomposition import Factors, stacked
from osft.subspace.next_split import UnknownSplitError, next_split

RANK = 12
SHAPES = [(48, 48), (80, 48), (48, 80)]


def a_weight(shape: tuple[int, ...]) -> torch.Tensor:
    """Singular values from 3 to 0.03."""
    torch.manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(size, 48, dtype=torch.float64))[0] for size in shape)
    return ((left * torch.logspace(0.5, -1.5, 48)) @ right.T).float()


def trained(weight: torch.Tensor, factors: Factors, size: float) -> torch.Tensor:
    """The weight after a round whose update has this norm, as a model's folder keeps it."""
    left, right = factors.left, factors.right
    update = torch.randn(weight.shape)
    update = update if left is None else left @ (left.T @ update)
    update = update if right is None else update @ right @ right.T
    if factors.frozen is not None:
        tall = weight.shape[0] > weight.shape[1]
        high = (weight if tall else weight.T) @ factors.frozen
        update = update - (high @ (high.T @ update) if tall else update @ high @ high.T)
    exact = weight + size * update / update.norm()
    served = exact.bfloat16()
    return decode_residual(served, *encode_residual(exact, served))


def span(basis: torch.Tensor) -> torch.Tensor:
    return basis.double() @ basis.double().T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("free_subspace", ["complement", "core"])
def test_four_rounds_follow_from_one_decomposition(shape, free_subspace):
    weight = a_weight(shape)
    factors = decompose(weight, RANK, free_subspace)
    for _ in range(4):
        weight = trained(weight, factors, 0.25)  # above the largest free singular value: directions change places
        before, factors, anew = factors, next_split(weight, factors), decompose(weight, RANK, free_subspace)
        assert (span(before.right if before.left is None else before.left)).sub(
            span(anew.right if anew.left is None else anew.left)
        ).norm() > 0.1
        torch.testing.assert_close(factors.singular_values, anew.singular_values, rtol=1e-5, atol=1e-6)
        for name in ("left", "right"):
            basis, expected = getattr(factors, name), getattr(anew, name)
            assert (basis is None) == (expected is None)
            if basis is not None:
                torch.testing.assert_close(basis.T @ basis, torch.eye(RANK), rtol=0, atol=1e-6)
                # The same singular vectors, whose signs are free. What float32 keeps of a weight turns those of nearly
                # equal singular values.
                torch.testing.assert_close((basis * expected).sum(0).abs(), torch.ones(RANK), rtol=0, atol=1e-4)
                assert (span(basis) - span(expected)).norm() < 1e-3
        if anew.frozen is not None:
            tall = weight.shape[0] > weight.shape[1]
            found, expected = ((weight if tall else weight.T).double() @ f.frozen.double() for f in (factors, anew))
            assert (span(found) - span(expected)).norm() < 1e-3


def test_experts_are_split_one_by_one():
    experts = torch.stack([a_weight((80, 48)), 2 * a_weight((80, 48)).roll(1, 0)])
    before = decompose(experts, RANK)
    after = torch.stack([trained(expert, before.of_expert(number), 0.1) for number, expert in enumerate(experts)])
    found = next_split(after, before)
    for number, expert in enumerate(after):
        alone = next_split(expert, before.of_expert(number))
        for name in ("singular_values", "right", "frozen"):
            torch.testing.assert_close(getattr(found, name)[number], getattr(alone, name), rtol=0, atol=0)


def test_margins_of_experts_are_cut_to_the_shortest():
    splits = [decompose(a_weight((48, 48)), RANK) for _ in range(2)]
    splits[1] = replace(splits[1], margin_left=splits[1].margin_left[:, 3:], margin_right=splits[1].margin_right[:, 3:])
    both = stacked(splits)
    assert both.margin_left.shape == (2, 48, 5)
    torch.testing.assert_close(both.margin_left[0], splits[0].margin_left[:, 3:], rtol=0, atol=0)


def damaged(basis: torch.Tensor) -> torch.Tensor:
    """One entry is another one."""
    changed = basis.clone()
    changed[0, -1] += 1e-3
    return changed


@pytest.mark.parametrize(("shape", "free_subspace"), [*((s, "complement") for s in SHAPES), ((80, 48), "core")])
def test_what_does_not_follow_is_refused(shape, free_subspace):
    weight = a_weight(shape)
    before = decompose(weight, RANK, free_subspace)
    after = trained(weight, before, 0.1)
    next_split(after, before)
    for other in (after.bfloat16(), after.roll((1, 1), (0, 1)), 1.0001 * after, torch.zeros(shape), damaged(after)):
        with pytest.raises(UnknownSplitError):
            next_split(other, before)
    for name in ("left", "right", "frozen", "margin_left", "margin_right"):
        basis = getattr(before, name)
        if basis is not None:
            with pytest.raises(UnknownSplitError):
                next_split(after, replace(before, **{name: damaged(basis)}))


def test_more_growth_than_the_margin_has_is_refused():
    weight = a_weight((48, 48))
    before = decompose(weight, RANK)
    above = before.left @ (2.0 * torch.eye(RANK)) @ before.right.T  # all of them past 36 frozen ones of at most 3
    with pytest.raises(UnknownSplitError, match="more directions grew past frozen ones than the 8 of the margin"):
        next_split(weight + above, before)
    early = replace(before, margin_left=None, margin_right=None)
    with pytest.raises(UnknownSplitError, match="than the 0 of the margin"):
        next_split(trained(weight, before, 0.25), early)
    unmoved = next_split(trained(weight, before, 1e-4), early)
    torch.testing.assert_close(span(unmoved.left), span(before.left), rtol=0, atol=1e-4)
