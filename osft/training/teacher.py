"""What a model says of a text before it is trained, and how far the model in training has moved from that.

The distance is KL(start || current) of the next token's distribution, in nats per token. Of a large vocabulary the
start's TOP_K most probable tokens are kept, and the others are one outcome, "the rest":

    KL = sum_i p_i (log p_i - log q_i) + P (log P - log Q)      i: the kept tokens; P, Q: the rest's probabilities

To merge outcomes never makes a divergence larger; what it hides is how the rest's probability is spread. Measured on
SmolLM2-135M, of whose vocabulary of 49,152 it keeps a twelfth, that is 2 % of the divergence (of 1,024 tokens 8 %, of
64 tokens 30 %), whatever its size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from osft.data.packing import Feeding, MicroBatch, on_device
from osft.data.samples import Samples
from osft.models.likelihood import target_logits
from osft.models.row_slices import row_slices

TOP_K = 4096
"""Tokens whose probabilities are kept, 8 bytes each: 32 KiB for each position. A smaller vocabulary is kept whole."""


@dataclass(frozen=True, slots=True)
class TopK:
    """Distributions of the next token."""

    tokens: torch.Tensor
    """(L, k), int32: the most probable ones."""
    log_probabilities: torch.Tensor
    """(L, k), float32."""
    log_rest: torch.Tensor | None
    """(L,), float32: of all other tokens together. None: there are no others."""

    def to(self, device: torch.device | str) -> "TopK":
        """The same on `device`, as `osft.data.packing.on_device`."""
        rest = None if self.log_rest is None else on_device(self.log_rest, device)
        return TopK(on_device(self.tokens, device), on_device(self.log_probabilities, device), rest)


def top_k(logits: torch.Tensor, k: int = TOP_K) -> TopK:
    """The distributions that `logits`, (L, vocabulary) of any float dtype, stand for."""
    k = min(k, logits.shape[1])
    parts = []
    for rows in row_slices(logits):
        tokens = logits[rows].float().topk(k).indices
        parts.append((tokens.int(), *_log_probabilities(logits[rows], tokens)))
    if not parts:
        parts = [(torch.empty(0, k, dtype=torch.int32), torch.empty(0, k), torch.empty(0))]
    tokens, kept, rest = map(torch.cat, zip(*parts, strict=True))
    return TopK(tokens, kept, rest if k < logits.shape[1] else None)


def top_k_divergence(start: TopK, logits: torch.Tensor) -> torch.Tensor:
    """KL(start || softmax(logits)) of each row in nats, (L,) float32, with a gradient for the logits.

    logits: (L, vocabulary), any float dtype. As `osft.models.likelihood.cross_entropy` a few rows at a time in float32.
    """
    found: torch.Tensor = _Divergence.apply(logits, start.tokens, start.log_probabilities, start.log_rest)
    return found


class _Divergence(torch.autograd.Function):
    """Gradient with respect to z_j: q_j - p_j of a kept token, q_j (1 - P / Q) of one in the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        log_probabilities: torch.Tensor,
        log_rest: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(logits, tokens, log_probabilities, log_rest)
        found = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for rows in row_slices(logits):
            now, now_rest = _log_probabilities(logits[rows], tokens[rows].long())
            start = log_probabilities[rows]
            found[rows] = _outcomes(start, now).sum(1)
            if log_rest is not None:
                found[rows] += _outcomes(log_rest[rows], now_rest)
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = grad_outputs
        logits, tokens, log_probabilities, log_rest = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in row_slices(logits):
            kept = tokens[rows].long()
            probabilities = logits[rows].float().softmax(1)
            of_kept = probabilities.gather(1, kept) - log_probabilities[rows].exp()
            if log_rest is not None:
                _, now_rest = _log_probabilities(logits[rows], kept)
                probabilities *= 1 - (log_rest[rows] - now_rest).exp()[:, None]
            probabilities.scatter_(1, kept, of_kept)
            gradient[rows] = probabilities * grad_output[rows, None]
        return gradient, None, None, None


def _outcomes(start: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """p (log p - log q) of log p and log q; 0 where p is 0."""
    probability = start.exp()
    return torch.where(probability == 0, 0.0, probability * (start - now))  # a NaN stays one


def _log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of some tokens of each row, (L, k), and of all others together, (L,); float32."""
    logits = logits.float()
    log_sum_exp = logits.logsumexp(1)
    others = logits.scatter(1, tokens, float("-inf"))
    return logits.gather(1, tokens) - log_sum_exp[:, None], others.logsumexp(1) - log_sum_exp


@dataclass(frozen=True, slots=True)
class TaughtBatch:
    """A micro-batch, and what the start says at each of its targets."""

    batch: MicroBatch
    start: TopK

    def divergence(self, model: nn.Module, device: torch.device) -> torch.Tensor:
        """KL(start || model) at each target, (L,) nats, with a gradient for the model."""
        return top_k_divergence(self.start.to(device), target_logits(model, self.batch.to(device)))


@torch.no_grad()
def taught(
    model: nn.Module, samples: Samples, feeding: Feeding, indices: Sequence[int] | None = None
) -> list[TaughtBatch]:
    """This rank's micro-batches of some samples (all by default), kept on the CPU, with what `model` says of them now.

    Every rank gets as many as the others. Call it on all of them, while the model is the start.
    """
    model.eval()
    batches = [
        TaughtBatch(batch.to("cpu"), top_k(target_logits(model, batch)).to("cpu"))
        for _, batch in feeding.batches(samples, indices)
    ]
    model.train()
    return batches
