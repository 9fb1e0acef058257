"""How far a model has moved from another: the divergence of its predictions, which no gain elsewhere can hide.

    KL(reference || model) = sum_j p_j (log p_j - log q_j)        nats per token, p the reference's probabilities

over the whole vocabulary, at the positions that count in the loss. The loss on an anchor can fall while the model
moves: any training repairs what quantization broke, and that hides what was lost. The divergence is 0 only for equal
predictions, and it predicts forgetting whatever the method (Shenfeld et al. 2025, arXiv:2509.04259).

Its standard error is that of a ratio of two sums over records, as the loss's (`osft.evaluation.scoring`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from osft.data.chat import tokenize
from osft.data.packing import Batching
from osft.data.records import Record
from osft.evaluation.scoring import MAX_TEXT_TOKENS, micro_batches, residuals, stderr_of_sum
from osft.likelihood import kl_divergence, target_logits


@dataclass(frozen=True, slots=True)
class SetDrift:
    """How far a model is from another on one evaluation set."""

    kl: float
    """KL(reference || model), nats per token."""
    stderr: float | None
    """Standard error of `kl`; None of one record."""
    num_tokens: int
    """The tokens whose predictions were compared."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RecordDrift:
    """How far a model is from another on each record of a set, in the set's order."""

    kl: list[float]
    """(n,) KL(reference || model), the sum over the record's tokens, in nats."""
    num_tokens: list[int]
    """(n,)"""

    def summary(self) -> SetDrift:
        """The set's drift."""
        tokens = sum(self.num_tokens)
        return SetDrift(sum(self.kl) / tokens, stderr_of_sum(residuals(self.kl, self.num_tokens)), tokens)


@torch.no_grad()
def measure_drift(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    records: Sequence[Record],
    *,
    max_tokens: int = 2048,
    batching: Batching = Batching.PACKED,
    description: str = "drift",
) -> RecordDrift | None:
    """The divergence of `model` from `reference` on `records` (at least one), of answers or of plain texts.

    tokenizers: the reference's and the model's. None if the two read the records as different tokens, or give
    probabilities to different numbers of them: then there is nothing to compare. Both models are on one device, and
    samples are batched to at most `max_tokens` tokens.
    """
    samples, others = (
        [tokenize(record, tokenizer, max_text_tokens=MAX_TEXT_TOKENS) for record in records] for tokenizer in tokenizers
    )
    if samples != others:
        return None
    kl = torch.zeros(len(samples), dtype=torch.float64)
    device = next(model.parameters()).device
    for batch, sample_of_target in micro_batches(samples, device, max_tokens, batching, description):
        logits, moved = target_logits(reference, batch), target_logits(model, batch)
        if logits.shape != moved.shape:
            return None
        kl.index_add_(0, sample_of_target, kl_divergence(logits, moved).cpu())
    return RecordDrift(kl.tolist(), [sample.num_loss_tokens for sample in samples])
