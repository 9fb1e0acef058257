"""The loss is PyTorch's cross entropy, at a fraction of its memory."""

import pytest
import torch
from torch.nn import functional as F

from osft import likelihood
from osft.likelihood import cross_entropy


@pytest.fixture(params=[1, 7, 10**6], ids=["row-by-row", "few-rows", "at-once"])
def several_slices(request, monkeypatch):
    monkeypatch.setattr(likelihood, "ELEMENTS_AT_ONCE", 11 * request.param)


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
