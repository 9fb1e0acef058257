"""The loss is PyTorch's cross entropy, and the divergence its KL, at a fraction of their memory."""

import math

import pytest
import torch
from torch.nn import functional as F

from osft.data.chat import Sample
from osft.data.packing import collate
from osft.models import row_slices
from osft.models.likelihood import cross_entropy, kl_divergence, target_logits
from tests.conftest import tiny_llama


@pytest.fixture(params=[1, 7, 10**6], ids=["row-by-row", "few-rows", "at-once"])
def several_slices(request, monkeypatch):
    monkeypatch.setattr(row_slices, "ELEMENTS_AT_ONCE", 11 * request.param)


def rows(count: int = 20, vocabulary: int = 11, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    logits = (5 * torch.randn(count, vocabulary)).to(dtype).requires_grad_()
    return logits, torch.randint(vocabulary, (count,))


@pytest.mark.usefixtures("several_slices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_and_gradient_are_those_of_pytorch(dtype):
    logits, targets = rows(dtype=dtype)
    weights = torch.rand(len(targets))
    found = cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    expected = F.cross_entropy(logits.to(found.dtype), targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.usefixtures("several_slices")
def test_gradient_is_that_of_finite_differences():
    logits, targets = rows(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, targets), (logits,))


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2e4
    assert logits.grad.tolist() == [[1.0, -1.0, 0.0]]


def test_no_targets_give_no_loss():
    logits = torch.empty(0, 11, requires_grad=True)
    cross_entropy(logits, torch.empty(0, dtype=torch.int64)).sum().backward()
    assert logits.grad.shape == (0, 11)


def test_only_the_logits_are_kept_for_the_backward_pass():
    logits, targets = rows(100, 50, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        cross_entropy(logits * 1, targets)
    assert max(saved) == logits.nbytes
    assert sum(saved) - logits.nbytes == 100 * (8 + 4), "and for each row its target and one sum"


@pytest.mark.usefixtures("several_slices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_divergence_is_that_of_pytorch_in_float64(dtype):
    logits, _ = rows(dtype=dtype)
    other = (logits.detach() + torch.randn(logits.shape)).to(dtype)
    log_p, log_q = (each.detach().double().log_softmax(-1) for each in (logits, other))
    expected = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl_divergence(logits, other), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_of_a_distribution_from_itself_is_exactly_zero(dtype):
    logits, _ = rows(dtype=dtype)
    assert kl_divergence(logits, logits.clone()).tolist() == [0.0] * 20


def test_smallest_divergence_keeps_its_digits():
    """To second order KL is half the variance of the change of the logits: here 1e-12, far below float32's rounding."""
    logits = torch.zeros(1, 2, dtype=torch.float64)
    other = torch.tensor([[0.0, 2**0.5 * 2e-6]], dtype=torch.float64)
    assert kl_divergence(logits, other).item() == pytest.approx(1e-12, rel=1e-3)


def test_excluded_tokens_count_as_the_definition_says():
    p, q = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 0.0, 0.0]])
    assert kl_divergence(p, q).item() == pytest.approx(math.log(1.5))
    assert kl_divergence(q, p).item() == math.inf
    assert kl_divergence(p, p).item() == 0.0


@pytest.mark.parametrize("first", [True, False])
def test_divergence_of_a_nan_is_no_number(first):
    logits, _ = rows(3)
    broken = logits.detach().clone()
    broken[1, 4] = math.nan
    found = kl_divergence(*((broken, logits) if first else (logits, broken)))
    assert [math.isnan(value) for value in found] == [False, True, False]


def test_vocabularies_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"shapes \(2, 5\) and \(2, 6\) cannot be compared"):
        kl_divergence(torch.zeros(2, 5), torch.zeros(2, 6))


def test_gradient_of_the_logits_reaches_the_head_uncopied():
    model = tiny_llama()
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _head, _inputs, output: output.register_hook(seen.append) and None)
    logits = target_logits(model, collate([Sample(list(range(20)), list(range(20)))]))
    gradient = torch.ones_like(logits)
    logits.backward(gradient)
    assert [each.data_ptr() for each in seen] == [gradient.data_ptr()]
