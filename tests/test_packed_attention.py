"""Packed samples by their boundaries: the numbers of a mask, and only by a kernel that was seen to give them."""

import logging
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from osft.data.chat import Sample
from osft.data.packing import Batching, collate
from osft.models import packed_attention
from osft.models.likelihood import token_nll
from osft.models.packed_attention import (
    KERNELS,
    AttentionShape,
    Packed,
    disagreement,
    masked,
    register,
    use_kernel,
)
from osft.process.private_names import attention_of, set_attention
from tests.conftest import tiny_llama

CPU = torch.device("cpu")
GROUPED = AttentionShape(heads=4, key_value_heads=2, head_size=8, value_size=8, scale=0.3, window=0)
LARGE = AttentionShape(heads=32, key_value_heads=8, head_size=128, value_size=128, scale=128**-0.5, window=0)
SHAPES = {
    "grouped": GROUPED,
    "window": AttentionShape(heads=2, key_value_heads=2, head_size=16, value_size=16, scale=0.25, window=4),
    "narrow-values": AttentionShape(heads=2, key_value_heads=2, head_size=16, value_size=8, scale=0.25, window=0),
}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4, "head_dim": 8},
}


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 64, (length,), generator=generator).tolist() for length in (9, 1, 14, 11)]
    return [Sample(row, row) for row in rows]


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SMALL, **MODELS[request.param])
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def losses_and_gradients(model: nn.Module, batching: Batching) -> list[torch.Tensor]:
    model.zero_grad()
    losses = token_nll(model, collate(samples(), batching))
    losses.sum().backward()
    return [losses.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_boundaries_give_the_losses_and_gradients_of_a_mask(model, gradient_checkpointing):
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = losses_and_gradients(model, Batching.PACKED)
    seen = []

    def kernel(query, key, value, packed):
        seen.append((packed.boundaries.tolist(), packed.longest))
        return masked(query, key, value, packed)

    register("osft_test", kernel)
    set_attention(model.config, "osft_test")
    for found, other in zip(losses_and_gradients(model, Batching.PACKED), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
    assert seen == [([0, 9, 10, 24, 35], 14)] * (4 if gradient_checkpointing else 2)


def test_what_is_not_packed_is_computed_as_without_the_kernel(model):
    model.eval()

    def found():
        prompts = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
        options = {"attention_mask": (prompts > 0).long(), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        written = model.generate(prompts, **options)
        return [written, *losses_and_gradients(model, Batching.PADDED), *losses_and_gradients(model, Batching.BRANCHED)]

    def kernel(*_):
        raise AssertionError

    expected = found()
    register("osft_test", kernel)
    set_attention(model.config, "osft_test")
    for mine, other in zip(found(), expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("asked_for", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}])
def test_what_the_kernels_cannot_is_refused_rather_than_left_out(asked_for):
    register("osft_test", masked)
    function = packed_attention.AttentionInterface()["osft_test"]
    query, boundaries = torch.zeros(1, 4, 3, 8), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="has no"):
        function(nn.Module(), query, query, query, packed_attention.in_place_of_mask(boundaries, 3), **asked_for)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_samples_do_not_see_each_other(shape):
    torch.manual_seed(0)
    query, key = torch.randn(12, shape.heads, shape.head_size), torch.randn(12, shape.key_value_heads, shape.head_size)
    value = torch.randn(12, shape.key_value_heads, shape.value_size)
    bounds = [0, 5, 6, 12]
    together = masked(query, key, value, Packed(torch.tensor(bounds), 6, shape.scale, shape.window))
    for start, stop in pairwise(bounds):
        for place in range(start, stop):  # one query after another, by the definition
            first = max(start, place - shape.window + 1) if shape.window else start
            keys, values = (
                each[first : place + 1].repeat_interleave(shape.heads // shape.key_value_heads, 1)
                for each in (key, value)
            )
            scores = torch.einsum("hd,thd->ht", query[place], keys) * shape.scale
            expected = torch.einsum("ht,thd->hd", scores.softmax(-1), values)
            torch.testing.assert_close(together[place], expected)


def documented_kernel(query, key, value, boundaries, others, longest, other, *, scale, window):
    """What flash attention's documentation says, (left, right) tokens beside the own one being seen."""
    assert boundaries is others
    assert longest == other == boundaries.diff().max()
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    left, right = window
    assert right == 0
    return masked(query, key, value, Packed(boundaries, longest, scale, left + 1 if left >= 0 else 0))


@pytest.fixture
def documented(monkeypatch) -> None:
    """The two packages as they are documented, on a CPU."""
    from torch.nn.attention import varlen

    def varlen_attn(*tensors, scale, window_size, enable_gqa):
        assert enable_gqa == (tensors[0].shape[1] != tensors[1].shape[1])
        return documented_kernel(*tensors, scale=scale, window=window_size)

    def flash_attn_varlen_func(*tensors, softmax_scale, causal, window_size, deterministic):
        assert causal
        return documented_kernel(*tensors, scale=softmax_scale, window=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", KERNELS, ids=lambda each: each.package)
def test_kernels_are_called_as_documented_and_rounding_is_no_disagreement(documented, implementation, dtype):
    assert disagreement(implementation.kernel, SHAPES.values(), dtype=dtype, device=CPU) == ""


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_arguments_of_the_varlen_kernel_are_those_of_the_installed_torch(shape):
    query = torch.empty(12, shape.heads, shape.head_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    key = torch.empty(12, shape.key_value_heads, shape.head_size, dtype=torch.bfloat16, device="meta")
    value = torch.empty(12, shape.key_value_heads, shape.value_size, dtype=torch.bfloat16, device="meta")
    packed = Packed(torch.empty(3, dtype=torch.int32, device="meta"), 7, shape.scale, shape.window)
    (varlen,) = [each.kernel for each in KERNELS if each.name == "osft_varlen"]
    output = varlen(query, key, value, packed)
    assert output.shape == (12, shape.heads, shape.value_size)
    (gradient,) = torch.autograd.grad(output.sum(), query)
    assert gradient.shape == query.shape


def wrong_kernel(what: str):
    """`masked`, with one thing wrong."""

    def kernel(query, key, value, packed):
        if what == "raises":
            raise RuntimeError("no kernel image is available")
        if what == "sees the sample before":
            packed = packed._replace(boundaries=packed.boundaries[[0, 1, 3, 4, 5]])
        if what == "cuts one token too late":
            packed = packed._replace(boundaries=packed.boundaries + torch.tensor([0, 0, 0, 1, 0, 0]))
        if what == "window":
            packed = packed._replace(window=packed.window + 1)
        if what == "scale":
            packed = packed._replace(scale=query.shape[-1] ** -0.5)
        if what == "heads":
            key = key.flip(1)
        if what == "looks ahead":
            query, key, value = query.flip(0), key.flip(0), value.flip(0)
            turned = packed._replace(boundaries=(len(query) - packed.boundaries.flip(0)).contiguous())
            return masked(query, key, value, turned).flip(0)
        output = masked(query, key, value, packed)
        if what == "not a number":
            output = output.clone()
            output[0] = torch.nan
        if what == "gradient":
            output = output.detach() + (output - output.detach()) * 1.2
        return output

    return kernel


WRONG = {
    "raises": GROUPED,
    "sees the sample before": GROUPED,
    "cuts one token too late": GROUPED,
    "window": SHAPES["window"],
    "scale": GROUPED,
    "heads": GROUPED,
    "looks ahead": GROUPED,
    "not a number": GROUPED,
    "gradient": GROUPED,
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_kernel_is_seen(what):
    problem = disagreement(wrong_kernel(what), [WRONG[what]], dtype=torch.bfloat16, device=CPU)
    expected = {"raises": "RuntimeError: no kernel image", "gradient": "its gradient of"}
    assert problem.startswith(expected.get(what, "its output differs"))


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A GPU on which kernels are tried, which is a CPU."""
    monkeypatch.setattr(
        packed_attention,
        "disagreement",
        lambda kernel, shapes, *, dtype, device: disagreement(kernel, shapes, dtype=dtype, device=CPU),
    )


def implementation(package: str, kernel) -> packed_attention._Implementation:
    return packed_attention._Implementation(f"osft_test_{package}", package, kernel)


def chosen(model: nn.Module, *kernels) -> str | None:
    return use_kernel(model, [GROUPED], torch.device("cuda"), kernels=kernels)


def test_first_kernel_that_is_right_is_used_and_the_wrong_ones_are_named(gpu, caplog):
    model = tiny_llama(attn_implementation="sdpa").to(torch.bfloat16)
    caplog.set_level(logging.INFO)
    found = chosen(
        model,
        implementation("no_such_package", masked),
        implementation("json", wrong_kernel("heads")),
        implementation("math", masked),
        implementation("cmath", wrong_kernel("raises")),
    )
    assert found == "math"
    assert attention_of(model.config) == "osft_test_math"
    wrong, right = caplog.records
    assert "json is not used: its output differs" in wrong.getMessage()
    assert wrong.levelno == logging.WARNING
    assert "packed samples by math, without a mask" in right.getMessage()


def test_without_a_right_kernel_the_mask_stays_and_it_is_said(gpu, caplog):
    model = tiny_llama(attn_implementation="sdpa").to(torch.bfloat16)
    assert chosen(model, implementation("json", wrong_kernel("raises"))) is None
    assert attention_of(model.config) == "sdpa"
    assert ["json is not used: RuntimeError" in caplog.messages[0], "SDPA with a mask" in caplog.messages[1]] == [
        True
    ] * 2


@pytest.mark.parametrize("why", ["float32", "eager", "no shapes", "wide heads"])
def test_what_needs_the_mask_is_left_alone(gpu, why, caplog):
    model = tiny_llama(attn_implementation="eager" if why == "eager" else "sdpa")
    before = attention_of(model.config)
    model.to(torch.float32 if why == "float32" else torch.bfloat16)
    wide = AttentionShape(heads=1, key_value_heads=1, head_size=512, value_size=512, scale=1.0, window=0)
    shapes = {"no shapes": [], "wide heads": [wide]}.get(why, [GROUPED])
    assert use_kernel(model, shapes, torch.device("cuda"), kernels=[implementation("math", masked)]) is None
    assert attention_of(model.config) == before
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), LARGE], ids=[*SHAPES, "large"])
def test_on_a_cpu_each_sample_is_computed_by_itself(shape, dtype):
    (kernel,) = [each.kernel for each in KERNELS if each.device == "cpu"]
    assert disagreement(kernel, [shape], dtype=dtype, device=CPU) == ""


def test_a_model_on_a_cpu_makes_no_mask_and_gives_the_losses_and_gradients_of_one(model, monkeypatch):
    expected = losses_and_gradients(model, Batching.PACKED)
    shapes = [replace(GROUPED, window=4 if getattr(model.config, "sliding_window", None) else 0, scale=8**-0.5)]
    assert use_kernel(model, shapes, CPU) == "torch"
    monkeypatch.setattr(packed_attention.F, "scaled_dot_product_attention", without_mask_beyond(14))
    for found, other in zip(losses_and_gradients(model, Batching.PACKED), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)


def without_mask_beyond(longest: int):
    """SDPA that has no mask of more tokens than the longest sample."""
    attention = nn.functional.scaled_dot_product_attention

    def checked(query, key, value, attn_mask=None, **settings):
        assert query.shape[-2] <= longest
        return attention(query, key, value, attn_mask, **settings)

    return checked


def test_float32_within_a_model_in_bfloat16_gets_the_mask():
    register("osft_test", wrong_kernel("raises"), dtypes=[torch.bfloat16])
    model = tiny_llama(attn_implementation="sdpa")
    expected = token_nll(model, collate(samples()))
    set_attention(model.config, "osft_test")
    torch.testing.assert_close(token_nll(model, collate(samples())), expected)
