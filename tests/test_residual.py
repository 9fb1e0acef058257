"""A rounded weight and its residual are the weight again, to float32."""

import pytest
import torch

from osft.models.rounding import decode_residual, encode_residual


def weights(kind: str) -> torch.Tensor:
    torch.manual_seed(0)
    normal = torch.randn(64, 96)
    return {
        "normal": normal,
        "small": 1e-6 * normal,
        "large": 1e6 * normal,
        "rows of different sizes": normal * 10.0 ** torch.arange(-32, 32)[:, None].clamp(-30, 30),
        "a row of zeros": normal * (torch.arange(64) % 2)[:, None],
        "subnormal": 1e-40 * normal,
        "representable": normal.bfloat16().float(),
        "a vector": normal[0],
        "a scalar": normal[0, 0],
        "experts": torch.randn(3, 32, 48),
        "no rows": normal[:0],
    }[kind]


KINDS = (
    *("normal", "small", "large", "rows of different sizes", "a row of zeros", "subnormal", "representable"),
    *("a vector", "a scalar", "experts", "no rows"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_at_most_half_a_float32_unit_of_the_rows_largest_weight(kind):
    exact = weights(kind)
    rounded = exact.bfloat16()
    q, units = encode_residual(exact, rounded)
    assert (q.shape, q.dtype) == (exact.shape, torch.int16)
    found = decode_residual(rounded, q, units)
    assert (found.shape, found.dtype) == (exact.shape, torch.float32)
    if exact.numel():
        largest = torch.atleast_1d(exact.abs()).amax(-1, keepdim=True).double()
        unit = 2.0 ** torch.floor(torch.log2(largest.clamp_min(1e-45))) * 2.0**-23  # spacing of float32 there
        error = torch.atleast_1d((found.double() - exact.double()).abs())
        assert (error <= (0.5 * unit).clamp_min(2.0**-127)).all()


@pytest.mark.parametrize("rounding", ["up", "down", "two units away", "to zero"])
def test_any_way_of_rounding_is_undone(rounding):
    exact = weights("normal")
    nearest = exact.bfloat16().float()
    unit = nearest.abs() * 2.0**-7
    rounded = {
        "up": nearest + unit,
        "down": nearest - unit,
        "two units away": nearest + 2 * unit,
        "to zero": torch.zeros_like(exact),
    }[rounding].bfloat16()
    q, units = encode_residual(exact, rounded)
    error = (decode_residual(rounded, q, units) - exact).abs()
    residual = (exact - rounded.float()).abs().amax(-1, keepdim=True)
    assert (error <= residual * 2.0**-15 + exact.abs() * 2.0**-23).all()


def test_float16_weights_are_exact_again():
    exact = weights("normal")
    rounded = exact.half()
    error = decode_residual(rounded, *encode_residual(exact, rounded)) - exact
    assert error.abs().max() <= 2.0**-24 * exact.abs().max() * 2


def test_rows_are_decoded_alone():
    exact = weights("experts")
    rounded = exact.bfloat16()
    q, units = encode_residual(exact, rounded)
    assert torch.equal(decode_residual(rounded[1:2], q[1:2], units[1:2]), decode_residual(rounded, q, units)[1:2])


def test_nothing_is_kept_of_what_is_representable():
    q, _ = encode_residual(weights("representable"), weights("representable").bfloat16())
    assert not q.any()
