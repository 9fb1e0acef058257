"""The distance from the start: its value, its gradient, what merging the rest does to it."""

import pytest
import torch
from torch.nn import functional as F

from osft.data.chat import Sample
from osft.data.packing import Batching, Feeding
from osft.data.samples import SampleList
from osft.models import row_slices
from osft.training.teacher import taught, top_k, top_k_divergence
from tests.conftest import tiny_llama

VOCABULARY = 11


@pytest.fixture(params=[1, 7, 10**6], ids=["row-by-row", "few-rows", "at-once"])
def several_slices(request, monkeypatch):
    monkeypatch.setattr(row_slices, "ELEMENTS_AT_ONCE", VOCABULARY * request.param)


def two_models(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 20 tokens by the start and by another model."""
    torch.manual_seed(0)
    start = 3 * torch.randn(20, VOCABULARY)
    return start.to(dtype), (start + torch.randn_like(start)).to(dtype).requires_grad_()


def merged(logits: torch.Tensor, start: torch.Tensor, k: int) -> torch.Tensor:
    """Log-probabilities of the k likeliest tokens of the start and of the rest, (L, k + 1)."""
    kept = start.topk(k).indices
    probabilities = logits.double().softmax(1)
    of_kept = probabilities.gather(1, kept)
    return torch.cat([of_kept, probabilities.scatter(1, kept, 0.0).sum(1, keepdim=True)], 1).log()


@pytest.mark.usefixtures("several_slices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_small_vocabulary_it_is_pytorchs_divergence_and_gradient(dtype):
    start, logits = two_models(dtype)
    weights = torch.rand(20)
    found = top_k_divergence(top_k(start, k=VOCABULARY), logits)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    log_p, log_q = start.float().log_softmax(1), logits.float().log_softmax(1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.usefixtures("several_slices")
def test_of_a_large_vocabulary_the_rest_is_one_outcome():
    start, logits = two_models()
    weights = torch.rand(20)
    found = top_k_divergence(top_k(start, k=4), logits)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    log_p, log_q = merged(start, start, 4), merged(logits, start, 4)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(gradient, expected_gradient.float())


def test_merging_hides_part_of_the_distance_and_less_of_it_the_more_tokens_are_kept():
    start, logits = two_models()
    by_k = [top_k_divergence(top_k(start, k=k), logits).sum().item() for k in (1, 2, 4, 8, VOCABULARY)]
    assert by_k == sorted(by_k)
    assert by_k[0] > 0


def test_a_model_has_moved_by_nothing_from_itself():
    start, _ = two_models()
    for k in (4, VOCABULARY):
        logits = start.clone().requires_grad_()
        found = top_k_divergence(top_k(start, k=k), logits)
        assert found.tolist() == [0.0] * 20
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert gradient.abs().max() < 1e-6


def test_certain_predictions_give_no_nan():
    """All probability is on the kept tokens, and the rest's is zero in float32."""
    start = torch.tensor([[200.0, 0.0, 0.0, 0.0], [float("-inf"), 1.0, 1.0, 1.0]])
    logits = torch.tensor([[0.0, 1.0, 0.0, 0.0], [float("-inf"), 1.0, 2.0, 1.0]], requires_grad=True)
    for k in (1, 4):
        found = top_k_divergence(top_k(start, k=k), logits)
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert found.isfinite().all()
        assert gradient.isfinite().all()
    assert found[0].item() == pytest.approx(-F.log_softmax(logits[0], 0)[0].item())


@pytest.mark.parametrize("batching", list(Batching))
@pytest.mark.parametrize("world_size", [1, 3])
def test_distance_of_a_text_depends_on_neither_batches_nor_processes(batching, world_size):
    start, now = tiny_llama(), tiny_llama(seed=1)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(258, (length,), generator=generator).tolist() for length in (5, 17, 9, 30)]
    samples = SampleList([Sample(text, text) for text in texts])
    expected = sum(
        F.kl_div(*(m(torch.tensor([t])).logits[0, :-1].log_softmax(1) for m in (now, start)), log_target=True,
                 reduction="sum").item()
        for t in texts
    )  # fmt: skip
    for max_tokens in (30, 1000):
        total = 0.0
        for rank in range(world_size):
            feeding = Feeding(
                max_tokens=max_tokens, device=torch.device("cpu"), batching=batching, rank=rank, world_size=world_size
            )
            for batch in taught(start, samples, feeding):
                total += batch.divergence(now, feeding.device).sum().item()
        assert total == pytest.approx(expected, rel=1e-4)
