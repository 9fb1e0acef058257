"""Rounding of exact weights: what each method promises, in numbers."""

import pytest
import torch

from osft.models.rounding import BLOCK_COLUMNS, generator_of, round_weight

DTYPES = [torch.bfloat16, torch.float16]
METHODS = ["nearest", "stochastic", "compensated"]


def weights(m: int = 48, n: int = 300, *, step: float = 1e-5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A bfloat16 base, the base plus an update far below its steps, and moments of correlated inputs."""
    generator = torch.Generator().manual_seed(3)
    base = (0.02 * torch.randn(m, n, generator=generator)).bfloat16()
    exact = base.float() + step * torch.randn(m, n, generator=generator)
    inputs = torch.randn(4 * n, n, generator=generator) * torch.logspace(0, -2, n)
    inputs = inputs @ torch.randn(n, n, generator=generator)
    return base, exact, inputs.T @ inputs / len(inputs)


def rounded(
    exact: torch.Tensor, base: torch.Tensor, method: str, dtype=torch.bfloat16, moments=None, **options
) -> torch.Tensor:
    if moments is None:
        moments = torch.eye(exact.shape[-2 if options.get("transposed") else -1])
    return round_weight(exact, base, dtype, method, moments=moments, generator=generator_of("w"), **options)


def lost_output(exact: torch.Tensor, served: torch.Tensor, moments: torch.Tensor) -> float:
    error = exact.double() - served.double()
    return ((error @ moments.double()) * error).sum().item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_is_the_conversion_of_torch(dtype):
    base, exact, _ = weights(step=1e-2)
    assert torch.equal(rounded(exact, base, "nearest", dtype), exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-3, 3e-8, -3.0, -2e-7])  # of float16, subnormal numbers too
def test_stochastic_rounding_gives_both_neighbours_with_the_exact_mean(dtype, size):
    exact = torch.full((400, 500), size * 1.0003)
    served = rounded(exact, torch.zeros_like(exact), "stochastic", dtype).float()
    near = exact.to(dtype)
    low, high = served.min(), served.max()
    share = (exact[0, 0] - low) / (high - low)
    assert near[0, 0].float() in (low, high)
    assert low < exact[0, 0] < high
    assert len(served.unique()) == 2
    assert ((served == high).float().mean() - share).abs() < 4 * (share * (1 - share) / exact.numel()) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_rounding_stays_within_one_step_and_keeps_what_the_dtype_holds(dtype):
    base, exact, _ = weights(step=1e-2)
    served = rounded(exact, base, "stochastic", dtype)
    steps = served.view(torch.int16).int() - exact.to(dtype).view(torch.int16).int()
    assert steps.abs().max() == 1
    held = exact.to(dtype).float()
    assert torch.equal(rounded(held, base, "stochastic", dtype).float(), held)


def test_stochastic_rounding_crosses_zero_to_the_smallest_number_of_the_right_sign():
    exact = torch.tensor([[1e-41, -1e-41] * 500])  # a tenth of bfloat16's smallest number
    served = rounded(exact, torch.ones_like(exact), "stochastic").float()
    smallest = torch.tensor([1], dtype=torch.int16).view(torch.bfloat16).float()
    assert set(served[0, ::2].tolist()) == {0.0, smallest.item()}
    assert set(served[0, 1::2].tolist()) == {0.0, -smallest.item()}


def test_stochastic_rounding_repeats_its_bytes_and_differs_between_names():
    base, exact, _ = weights()
    once, again, other = (
        round_weight(exact, base, torch.bfloat16, "stochastic", generator=generator_of(name))
        for name in ("a", "a", "b")
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


@pytest.mark.parametrize(("method", "kept"), [("nearest", 0.0), ("stochastic", 1.0)])
def test_an_update_of_a_sixtieth_of_a_step_survives_stochastic_and_not_nearest_rounding(method, kept):
    base, _, _ = weights(m=400)
    update = base.sign().float() * 1e-6
    served = rounded(base.float() + update, base, method).float() - base.float()
    assert (served * update).sum() / update.square().sum() == pytest.approx(kept, abs=0.15)


def test_compensated_rounding_loses_a_small_part_of_what_nearest_loses_of_the_outputs():
    base, exact, moments = weights(step=1e-3)
    nearest = lost_output(exact, rounded(exact, base, "nearest"), moments)
    compensated = lost_output(exact, rounded(exact, base, "compensated", moments=moments), moments)
    assert compensated < 0.25 * nearest


def test_compensated_rounding_leaves_half_a_step_of_each_column_to_the_inputs_before_it():
    """With C = U d U^T in the inputs' order, the errors E have |E U| <= half a step: the definition of LDLQ."""
    base, exact, moments = weights(n=BLOCK_COLUMNS + 40, step=1e-3)
    served = rounded(exact, base, "compensated", moments=moments)
    order = moments.diagonal().argsort(descending=True)
    damped = (moments + 0.01 * moments.diagonal().mean() * torch.eye(len(moments)))[order][:, order].double()
    upper = torch.linalg.inv(torch.linalg.cholesky(torch.linalg.inv(damped)).T)  # another way to the same factor
    single = (exact.double() - served.double())[:, order] @ (upper / upper.diagonal())
    step = (served.abs().view(torch.int16) + 1).view(torch.bfloat16).double() - served.abs().double()
    assert (single.abs() / step[:, order]).max() == pytest.approx(0.5, abs=0.02)


def test_compensated_rounding_of_a_transposed_weight_and_of_a_stack_is_that_of_each():
    base, exact, moments = weights(m=20, n=40)
    alone = rounded(exact, base, "compensated", moments=moments)
    assert torch.equal(rounded(exact.T, base.T, "compensated", moments=moments, transposed=True), alone.T)
    other = 2 * exact.flip(0)
    stack = rounded(torch.stack([exact, other]), torch.stack([base, base]), "compensated", moments=moments)
    assert torch.equal(stack[0], alone)
    assert torch.equal(stack[1], rounded(other, base, "compensated", moments=moments))


@pytest.mark.parametrize("method", METHODS)
def test_what_was_not_trained_keeps_the_bytes_of_the_base(method):
    base, exact, moments = weights()
    base[0, :3] = torch.tensor([0.0, -0.0, 1e-40])
    exact[:8] = base[:8].float()
    served = rounded(exact, base, method, moments=moments)
    assert torch.equal(served[:8].view(torch.int16), base[:8].view(torch.int16))
    assert not torch.equal(served[8:], base[8:])


@pytest.mark.parametrize("method", METHODS)
def test_an_entry_of_a_float32_base_that_was_not_trained_is_rounded_to_the_nearest(method):
    _, exact, moments = weights()
    base = exact.clone()
    exact[10:] += 1e-4
    assert torch.equal(rounded(exact, base, method, moments=moments)[:10], base[:10].bfloat16())


@pytest.mark.parametrize("method", METHODS)
def test_float32_is_not_rounded(method):
    base, exact, moments = weights()
    assert torch.equal(rounded(exact, base, method, torch.float32, moments), exact)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(method, value):
    base, exact, moments = weights()
    exact[3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        rounded(exact, base, method, moments=moments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 7e4), (torch.bfloat16, -3.4e38)])
def test_a_number_that_the_dtype_cannot_hold_is_refused(method, dtype, value):
    exact = torch.full((4, 8), value)
    with pytest.raises(ValueError, match=r"float16 cannot hold .* save_dtype to float32"):
        rounded(exact, torch.zeros_like(exact), method, dtype)


@pytest.mark.parametrize(("method", "missing"), [("stochastic", "generator"), ("compensated", "second moments")])
def test_a_method_without_what_it_needs_is_refused(method, missing):
    base, exact, _ = weights()
    with pytest.raises(ValueError, match=missing):
        round_weight(exact, base, torch.bfloat16, method)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_moments_of_no_inputs_are_refused(value):
    base, exact, moments = weights()
    with pytest.raises(ValueError, match="second moments"):
        rounded(exact, base, "compensated", moments=torch.full_like(moments, value))
