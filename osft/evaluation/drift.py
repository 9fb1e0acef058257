"""How far a model has moved from another: the divergence of its predictions, which no gain elsewhere can hide.

    KL(reference || model) = sum_j p_j (log p_j - log q_j)        nats per token, p the reference's probabilities

over the whole vocabulary, at the positions that count in the loss. The loss on an anchor can fall while the model
moves: any training repairs what quantization broke, and that hides what was lost. The divergence is 0 only for equal
predictions, and it predicts forgetting whatever the method (Shenfeld et al. 2025, arXiv:2509.04259).

The models are computed in float32. In bfloat16 the rounding of the activations alone counts as about 0.002 nats per
token (SmolLM2-135M on English prose: a drift of 0.00004 reads as 0.0020, 0.0038 as 0.0062, 0.0339 as 0.0358), which is
more than a careful round moves; only GPUs that cannot hold two models in float32 compare them like this. Both are in
memory together (all three of a round where there is room, and the candidate reads a set once), each spread over all
GPUs, since the logits of a whole set would be more than a model; what has no room there even so is copied from the
CPU's memory while it computes.

Its standard error is that of a ratio of two sums over records, as the loss's (`osft.evaluation.scoring`).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from osft.data.packing import Batching
from osft.data.records import Record
from osft.evaluation.record import SetDrift
from osft.evaluation.scoring import Asked, RecordScores, SampleScores, micro_batches
from osft.models.checkpoint import CheckpointReader
from osft.models.cpu_linear import fast_linear_layers
from osft.models.likelihood import kl_divergence, residuals, stderr_of_sum, target_logits
from osft.models.loading import ROOM_FOR_WEIGHTS
from osft.process.memory import memory_available


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


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the logits of several models on the same records say."""

    drift: list[RecordDrift | None]
    """From each reference to the model; None if the two read the records as different tokens, or give probabilities to
    different numbers of them: then there is nothing to compare."""
    scores: list[RecordScores | None]
    """Of each reference and of the model, where they were wanted and there was something to compare."""


@torch.no_grad()
def compare(
    models: Sequence[PreTrainedModel],
    tokenizers: Sequence[PreTrainedTokenizerBase],
    records: Sequence[Record],
    *,
    max_tokens: int = 2048,
    batching: Batching = Batching.PACKED,
    description: str = "drift",
    with_scores: bool = False,
) -> Comparison:
    """The divergence of the last model from each other on `records` (at least one), of right answers or plain texts.

    tokenizers: the models'. All models take inputs on one device, and samples are batched to at
    most `max_tokens` tokens. with_scores: the models read all choices, for their scores.
    """
    *references, model = models
    *others, asked = (Asked.of(records, tokenizer, choices=with_scores) for tokenizer in tokenizers)
    pairs = [_Pair(asked) if other == asked else None for other in others]
    scores = SampleScores(asked)
    is_right = torch.zeros(len(asked.samples), dtype=torch.bool).index_fill_(0, torch.tensor(asked.right), True)
    parameter = next(model.parameters())
    batches = micro_batches(asked.samples, parameter.device, max_tokens, batching, description) if any(pairs) else ()
    with ExitStack() as stack:
        for each in models:
            stack.enter_context(fast_linear_layers(each))
        for batch, sample_of_target in batches:
            moved, right = target_logits(model, batch), is_right[sample_of_target]
            for number, (pair, reference) in enumerate(zip(pairs, references, strict=True)):
                if pair is None:
                    continue
                logits = moved if reference is model else target_logits(reference, batch)
                if logits.shape != moved.shape:
                    pairs[number] = None
                    continue
                pair.add(logits, moved, sample_of_target, right)
                if with_scores:
                    pair.scores.add(logits, batch, sample_of_target)
            if with_scores:
                scores.add(moved, batch, sample_of_target)
    wanted = [*(pair.scores if pair else None for pair in pairs), scores if any(pairs) else None]
    return Comparison(
        [pair.drift(parameter.dtype) if pair else None for pair in pairs],
        [each.of_records(parameter.dtype) if each and with_scores else None for each in wanted],
    )


class _Pair:
    """A reference and the model, as far as they were compared."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._kl = torch.zeros(len(asked.samples), dtype=torch.float64)
        self.scores = SampleScores(asked)
        """The reference's."""

    def add(
        self, logits: torch.Tensor, moved: torch.Tensor, sample_of_target: torch.Tensor, right: torch.Tensor
    ) -> None:
        """The targets of a batch: both models' logits (L, vocabulary); `right` (L,) says which count."""
        if not right.all():
            logits, moved, sample_of_target = logits[right], moved[right], sample_of_target[right]
        self._kl.index_add_(0, sample_of_target, kl_divergence(logits, moved).cpu())

    def drift(self, dtype: torch.dtype) -> RecordDrift:
        """Of each record, the right answer's."""
        kl, asked = self._kl.tolist(), self._asked
        return RecordDrift(
            [kl[position] for position in asked.right],
            [asked.samples[position].num_loss_tokens for position in asked.right],
            str(dtype).removeprefix("torch."),
        )


def plan_comparison(folders: Sequence[Path]) -> tuple[torch.dtype, bool]:
    """What the models of these folders are to be computed in, and whether all of them fit into memory at once.

    If not, two do.
    """
    gpus = sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count()))
    readers = [CheckpointReader(folder) for folder in folders]
    sizes = sorted(sum(reader.empty(name).numel() for name in reader.names()) for reader in readers)
    if not gpus:
        return torch.float32, dtype_that_fits(sum(sizes), memory_available()) == torch.float32
    dtype = dtype_that_fits(sum(sizes[-2:]), gpus)
    return dtype, dtype_that_fits(sum(sizes), gpus) == dtype == torch.float32


def dtype_that_fits(num_parameters: int, memory: int) -> torch.dtype:
    """float32 if so many parameters leave a share of so many bytes to the activations and logits, else bfloat16."""
    return torch.float32 if 4 * num_parameters <= ROOM_FOR_WEIGHTS * memory else torch.bfloat16
