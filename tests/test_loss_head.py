"""A head that gives losses: they and the gradient are those of the logits, which never are there as a whole."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from osft.data.chat import Sample
from osft.data.packing import Batching, collate
from osft.models import loss_head
from osft.models.likelihood import cross_entropy, target_logits, token_nll
from osft.models.loss_head import LossHead
from osft.subspace.preflight import preflight
from tests.architectures import small_config
from tests.conftest import tiny_llama

SAMPLES = [Sample(list(range(n)), [-100, *range(1, n)]) for n in (9, 5, 12)]


@pytest.fixture(params=[1, 7, 10**6], ids=["row-by-row", "few-rows", "at-once"])
def _several_slices(request, monkeypatch):
    monkeypatch.setattr(loss_head, "LOGITS_AT_ONCE", {"cpu": 11 * request.param})


def product(dtype: torch.dtype, bias: bool = False):
    torch.manual_seed(0)
    hidden, weight, offset = torch.randn(25, 6), torch.randn(11, 6), torch.randn(11) if bias else None
    cast = [each if each is None else each.to(dtype) for each in (hidden, weight, offset)]
    positions = torch.randint(25, (20,)).sort().values
    assert len(positions.unique()) < 20, "some are several targets'"
    return cast[0].requires_grad_(), positions, *cast[1:], torch.randint(11, (20,))


@pytest.mark.usefixtures("_several_slices")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradient_are_those_of_the_logits(dtype, bias):
    hidden, positions, weight, offset, targets = product(dtype, bias)
    factors = torch.rand(20)
    found = loss_head._LinearCrossEntropy.apply(hidden, positions, weight, offset, targets)
    (gradient,) = torch.autograd.grad((found * factors).sum(), hidden)
    expected = cross_entropy(nn.functional.linear(hidden[positions], weight, offset), targets)
    (expected_gradient,) = torch.autograd.grad((expected * factors).sum(), hidden)
    torch.testing.assert_close(found, expected)
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(gradient, expected_gradient, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("_several_slices")
def test_gradient_is_that_of_finite_differences():
    hidden, positions, weight, offset, targets = product(torch.float64, bias=True)
    assert torch.autograd.gradcheck(
        lambda h: loss_head._LinearCrossEntropy.apply(h, positions, weight, offset, targets), (hidden,)
    )


@pytest.mark.parametrize("batching", [Batching.PACKED, Batching.PADDED, Batching.BRANCHED])
def test_model_has_the_losses_and_gradients_that_it_had(batching):
    model, batch = tiny_llama(attn_implementation="sdpa"), collate(SAMPLES, batching)
    model.lm_head.requires_grad_(False)
    trained = model.model.layers[0].mlp.up_proj.weight

    def computed() -> tuple[torch.Tensor, torch.Tensor]:
        losses = token_nll(model, batch)
        return losses, torch.autograd.grad(losses.sum(), trained)[0]

    expected, logits = computed(), model(batch.input_ids).logits
    assert LossHead.take_place_in(model)
    for found, value in zip(computed(), expected, strict=True):
        torch.testing.assert_close(found, value)
    assert torch.equal(model(batch.input_ids).logits, logits), "it gives logits to whoever does not ask for losses"
    assert model.state_dict().keys() == tiny_llama().state_dict().keys()


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result.numel() if isinstance(result, torch.Tensor) else 0
        self.elements = max(self.elements, made)
        return result


def test_no_more_logits_are_there_than_are_computed_at_once(monkeypatch):
    monkeypatch.setattr(loss_head, "LOGITS_AT_ONCE", {"cpu": 3 * 5000})
    model = tiny_llama(vocab_size=5000, tie_word_embeddings=False, attn_implementation="sdpa").requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    batch = collate([Sample(list(range(60)), list(range(60)))])
    weight = model.lm_head.weight.numel()

    def largest() -> int:
        with Largest() as seen:
            token_nll(model, batch).sum().backward()
        return seen.elements

    assert largest() == 59 * 5000 > weight, "the test sees them"
    LossHead.take_place_in(model)
    assert largest() <= weight  # which is transposed


def test_head_that_is_trained_or_something_else_keeps_its_logits():
    model = tiny_llama()
    assert not LossHead.take_place_in(model)
    model.requires_grad_(False).lm_head = nn.Sequential(model.lm_head)
    assert not LossHead.take_place_in(model)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("llama", True), ("qwen3", True), ("mixtral", True), ("gemma2", False), ("granite", False), ("cohere", False)],
)
def test_head_whose_product_is_changed_afterwards_keeps_its_logits(kind, expected, tmp_path):
    config = small_config(kind)
    if kind == "granite":
        config.logits_scaling = 8.0
    config.save_pretrained(tmp_path)
    assert preflight(tmp_path).loss_head is expected


def test_logits_of_targets_are_still_there_for_who_compares_them():
    model, batch = tiny_llama().requires_grad_(False), collate(SAMPLES)
    expected = target_logits(model, batch)
    LossHead.take_place_in(model)
    assert torch.equal(target_logits(model, batch), expected)
