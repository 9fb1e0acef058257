"""The model's probability of the tokens that count, and how far two models' predictions of them are apart."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_masks_for_generate

from osft.data.packing import Batching, Feeding, MicroBatch
from osft.data.samples import Samples
from osft.models.loss_head import LossHead
from osft.models.packed_attention import in_place_of_mask, takes_boundaries
from osft.models.row_slices import row_slices
from osft.process.vector_math import settle_vector_math

settle_vector_math()


def target_logits(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Logits that predict each target, (L, vocabulary), in the model's dtype. Other positions cost no logits."""
    network: Any = model  # its type is an nn.Module's, whose attributes may be tensors
    head = network.get_output_embeddings()
    selected = False

    def select(_head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal selected
        hidden_states, *rest = inputs
        if hidden_states.shape[:-1] != batch.input_ids.shape:
            return inputs
        selected = True
        return (hidden_states.flatten(0, 1)[batch.loss_positions][None], *rest)

    hook = head.register_forward_pre_hook(select) if head is not None else None
    try:
        outputs = network(**_inputs(network, batch))
    finally:
        if hook is not None:
            hook.remove()
    logits: torch.Tensor = outputs.logits.flatten(0, 1)  # and not [0], whose gradient is copied into zeros
    return logits if selected else logits[batch.loss_positions]


def _inputs(model: Any, batch: MicroBatch) -> dict[str, Any]:
    """What the model's forward pass takes of a micro-batch.

    One sample a row needs the tokens only: all else is a model's own default.
    """
    inputs: dict[str, Any] = {"use_cache": False}
    if batch.batching is not Batching.PADDED:
        inputs |= {"attention_mask": _attention_mask(model, batch), "position_ids": batch.position_ids}
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"input_ids": batch.input_ids} | {
        name: value for name, value in inputs.items() if takes_all or name in parameters
    }


def _attention_mask(model: Any, batch: MicroBatch) -> Any:
    """What keeps packed samples apart, in the form that the model's attention takes; None where nothing is needed.

    Most models make it from the position ids themselves. Some, OPT and gpt-oss among them, use these for the
    positions alone and would let packed samples see each other.
    """
    embeddings = model.get_input_embeddings().weight
    # Only its shape, dtype and device are read.
    hidden_states = torch.empty(*batch.input_ids.shape, 0, dtype=embeddings.dtype, device=batch.input_ids.device)
    known: dict[str, Any] = {"attention_mask": None, "past_key_values": None}
    if batch.boundaries is not None and takes_boundaries(model.config):
        known["attention_mask"] = in_place_of_mask(batch.boundaries, batch.longest)
        return create_masks_for_generate(model.config, hidden_states, **known)
    if batch.ends is None:
        return create_masks_for_generate(model.config, hidden_states, position_ids=batch.position_ids, **known)
    ends = batch.ends

    def visible(row: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query < ends[row, key]  # and key <= query, as of any causal model

    return create_masks_for_generate(model.config, hidden_states, and_mask_function=visible, **known)


def token_nll(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Negative log-likelihood of each target in nats, (L,), float32, without logits where the head is a `LossHead`."""
    network: Any = model
    head = network.get_output_embeddings()
    if not isinstance(head, LossHead):
        return cross_entropy(target_logits(model, batch), batch.targets)
    with head.asked_for_losses(batch):
        losses: torch.Tensor = network(**_inputs(network, batch)).logits
    return losses.flatten()


@torch.no_grad()
def sample_nll(model: nn.Module, samples: Samples, feeding: Feeding) -> torch.Tensor:
    """Negative log-likelihood of the loss tokens of each sample, (num_samples,) float64, in nats.

    Of a model in training, which is in training mode again afterwards. Call it on every rank; each gets all of them.
    """
    model.eval()
    nll = torch.zeros(len(samples.lengths), dtype=torch.float64, device=feeding.device)
    for indices, batch in feeding.batches(samples):
        found = token_nll(model, batch).double()
        if indices:  # else this rank only keeps the others company
            nll.index_add_(0, torch.tensor(indices, device=feeding.device)[batch.sample_of_target], found)
    if feeding.world_size > 1:
        torch.distributed.all_reduce(nll)
    model.train()
    return nll


def mean_nll(model: nn.Module, samples: Samples, feeding: Feeding) -> float:
    """Mean negative log-likelihood of all loss tokens, in nats. As `sample_nll`."""
    return sample_nll(model, samples, feeding).sum().item() / sum(samples.num_loss_tokens)


def residuals(sums: Sequence[float], num_tokens: Sequence[int]) -> list[float]:
    """(n,) what each record adds to a mean per token beyond its tokens' share; they add up to 0.

    sums: (n,) of each record, over its tokens; num_tokens: (n,). The mean is linear in the residuals to first order,
    so its error, and that of a difference of means, is theirs (Cochran, Sampling Techniques, chapter 6).
    """
    tokens = sum(num_tokens)
    mean = sum(sums) / tokens
    return [(value - mean * count) / tokens for value, count in zip(sums, num_tokens, strict=True)]


def stderr_of_sum(parts: Sequence[float]) -> float | None:
    """Standard error of a sum over records from what each adds to it, its mean taken away; None of one record."""
    n = len(parts)
    return math.sqrt(n / (n - 1) * sum(part**2 for part in parts)) if n > 1 else None


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each row, (L,), float32 (float64 of float64 logits).

    `logits`: (L, vocabulary), any float dtype; `targets`: (L,), int64. PyTorch's own keeps float32 log-probabilities
    beside the logits and makes two gradients of their size. With a large vocabulary these are what fills a GPU, so
    here a few rows at a time are computed in float32, and again in the backward pass: the logits and one gradient in
    their own dtype are all that is whole.
    """
    nll: torch.Tensor = _CrossEntropy.apply(logits, targets)
    return nll


class _CrossEntropy(torch.autograd.Function):
    """log sum_j exp(z_j) - z_target of each row z, with the gradient softmax(z) - onehot(target)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        exact = torch.promote_types(logits.dtype, torch.float32)
        log_sum_exp = torch.empty(logits.shape[0], dtype=exact, device=logits.device)
        for rows in row_slices(logits):
            torch.logsumexp(logits[rows].to(exact), dim=-1, out=log_sum_exp[rows])
        ctx.save_for_backward(logits, targets, log_sum_exp)
        return log_sum_exp - logits.gather(1, targets[:, None])[:, 0].to(exact)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad_output,) = grad_outputs
        logits, targets, log_sum_exp = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in row_slices(logits):
            probabilities = (logits[rows] - log_sum_exp[rows, None]).exp_()
            probabilities[torch.arange(len(probabilities), device=logits.device), targets[rows]] -= 1
            gradient[rows] = probabilities.mul_(grad_output[rows, None])
        return gradient, None


@torch.no_grad()
def kl_divergence(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum_j p_j (log p_j - log q_j) of each row in nats, (L,), float64; p = softmax(logits), q of `other`.

    Both: (L, vocabulary), any float dtype. A token that p excludes (a logit of -inf) adds nothing; one that only q
    excludes makes the divergence infinite. Computed in float64, a few rows at a time: what a small update moves is
    1e-6 nats a token and less, which is the rounding error of a log-probability in float32.

    Raises ValueError for logits of different shapes.
    """
    if logits.shape != other.shape:
        raise ValueError(f"logits of shapes {tuple(logits.shape)} and {tuple(other.shape)} cannot be compared")
    divergence = torch.empty(logits.shape[0], dtype=torch.float64, device=logits.device)
    for rows in row_slices(logits):
        log_p, log_q = (each[rows].double().log_softmax(-1) for each in (logits, other))
        p = log_p.exp()
        divergence[rows] = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)  # not p > 0: a NaN stays one
    return divergence.clamp_(min=0)  # which it is but for rounding
