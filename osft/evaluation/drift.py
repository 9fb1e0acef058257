"""How far a model has moved from another: the divergence of its predictions, which no gain elsewhere can hide.

    KL(reference || model) = sum_j p_j (log p_j - log q_j)        nats per token, p the reference's probabilities

over the whole vocabulary, at the positions that count in the loss. The loss on an anchor can fall while the model
moves: any training repairs what quantization broke, and that hides what was lost. The divergence is 0 only for equal
predictions, and it predicts forgetting whatever the method (Shenfeld et al. 2025, arXiv:2509.04259).

The models are computed in float32. In bfloat16 the rounding of the activations alone counts as about 0.002 nats per
token (SmolLM2-135M on English prose: a drift of 0.00004 reads as 0.0020, 0.0038 as 0.0062, 0.0339 as 0.0358), which is
more than a careful round moves; only GPUs that cannot hold both models in float32 compare them like this. Both are in
memory together, each spread over all GPUs, since the logits of a whole set would be more than a model; what has no room
there even so is copied from the CPU's memory while it computes.

Its standard error is that of a ratio of two sums over records, as the loss's (`osft.evaluation.scoring`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from osft.data.chat import tokenize
from osft.data.packing import Batching
from osft.data.records import Record
from osft.evaluation.record import SetDrift
from osft.evaluation.scoring import MAX_TEXT_TOKENS, RecordScores, SampleScores, micro_batches
from osft.models.checkpoint import CheckpointReader
from osft.models.likelihood import kl_divergence, residuals, stderr_of_sum, target_logits
from osft.models.loading import ROOM_FOR_WEIGHTS


@dataclass(frozen=True, slots=True)
class RecordDrift:
    """How far a model is from another on each record of a set, in the set's order."""

    kl: list[float]
    """(n,) KL(reference || model), the sum over the record's tokens, in nats."""
    num_tokens: list[int]
    """(n,)"""
    dtype: str
    """As in `SetDrift`."""

    def summary(self) -> SetDrift:
        """The set's drift."""
        tokens = sum(self.num_tokens)
        stderr = stderr_of_sum(residuals(self.kl, self.num_tokens))
        return SetDrift(kl=sum(self.kl) / tokens, stderr=stderr, num_tokens=tokens, dtype=self.dtype)


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
    on_scores: Callable[[RecordScores, RecordScores], None] | None = None,
) -> RecordDrift | None:
    """The divergence of `model` from `reference` on `records` (at least one), of answers or of plain texts.

    tokenizers: the reference's and the model's. None if the two read the records as different tokens, or give
    probabilities to different numbers of them: then there is nothing to compare. Both models take inputs on one
    device, and samples are batched to at most `max_tokens` tokens.

    on_scores: is told of the reference's and the model's scores, whose logits are at hand; not of records with choices,
    of which only the right answer is compared.
    """
    samples, others = (
        [tokenize(record, tokenizer, max_text_tokens=MAX_TEXT_TOKENS) for record in records] for tokenizer in tokenizers
    )
    if samples != others:
        return None
    kl = torch.zeros(len(samples), dtype=torch.float64)
    wanted = on_scores is not None and not any(record.choices for record in records)
    scored = [SampleScores(len(samples)) for _ in range(2)] if wanted else []
    parameter = next(model.parameters())
    device, dtype = parameter.device, str(parameter.dtype).removeprefix("torch.")
    for batch, sample_of_target in micro_batches(samples, device, max_tokens, batching, description):
        logits, moved = target_logits(reference, batch), target_logits(model, batch)
        if logits.shape != moved.shape:
            return None
        kl.index_add_(0, sample_of_target, kl_divergence(logits, moved).cpu())
        for scores, found in zip(scored, (logits, moved), strict=False):
            scores.add(found, batch, sample_of_target)
    if on_scores is not None and scored:
        on_scores(*(scores.of_records(records, samples) for scores in scored))
    return RecordDrift(kl.tolist(), [sample.num_loss_tokens for sample in samples], dtype)


def drift_dtype(folders: Sequence[Path]) -> torch.dtype:
    """What the models of these folders, of which two at a time are compared, are to be computed in."""
    memory = sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count()))
    if not memory:
        return torch.float32
    readers = [CheckpointReader(folder) for folder in folders]
    sizes = sorted(sum(reader.empty(name).numel() for name in reader.names()) for reader in readers)
    return dtype_that_fits(sum(sizes[-2:]), memory)


def dtype_that_fits(num_parameters: int, memory: int) -> torch.dtype:
    """float32 if so many parameters leave a share of so many bytes to the activations and logits, else bfloat16."""
    return torch.float32 if 4 * num_parameters <= ROOM_FOR_WEIGHTS * memory else torch.bfloat16
