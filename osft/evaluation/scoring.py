"""Scores of a model on a set of records, and what changed between two models on the same records.

- loss: nats per token of the answers (of all tokens, for plain text); perplexity is its exponential.
- accuracy of a record with choices: is the right answer more probable than every other, that is, is the sum of its
  tokens' log-likelihoods the largest? One that ties with another is not right, and the only one is not, either.
- accuracy of a short answer without choices ("exact match"): is each of its tokens the most probable one, the one
  that ends it included? That is whether greedy decoding gives exactly this answer, found in one forward pass.

Standard errors treat the records as a random sample of the task's. The loss is a ratio of two sums over records, so
its error is that of the ratio estimator (Cochran, Sampling Techniques, 3rd edition, chapter 6). Two models are
compared record by record: what makes a record hard for both cancels, which leaves a far smaller error than that of
two independent samples (Miller 2024, arXiv:2411.00640).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from osft.data.branches import plan_branches
from osft.data.chat import Sample, tokenize
from osft.data.packing import Batching, MicroBatch, collate, plan_micro_batches
from osft.data.records import Record
from osft.evaluation.record import MetricChange, SetChanges, SetScore
from osft.models.cpu_linear import fast_linear_layers
from osft.models.likelihood import cross_entropy, residuals, stderr_of_sum, target_logits

SHORT_ANSWER_TOKENS = 16
"""A set has an exact-match accuracy if no answer is longer than this."""
TIE = 1e-4
"""Nats. Answers whose log-likelihoods are closer tie: so much may come from rounding, and from what they were batched
with. In a dtype with a larger machine epsilon, that."""
MAX_TEXT_TOKENS = 256
"""Of a plain text, the tokens that are scored."""


@dataclass(frozen=True, slots=True)
class RecordScores:
    """A model's scores on each record of a set, in the set's order."""

    nll: list[float]
    """(n,) negative log-likelihood of the right answer, in nats."""
    num_loss_tokens: list[int]
    """(n,) tokens of the right answer."""
    correct: list[bool] | None
    """(n,) None where the set has no accuracy."""
    accuracy_kind: str | None
    """As in `SetScore`."""
    num_ties: int = 0
    """As in `SetScore`."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return sum(self.nll) / sum(self.num_loss_tokens)

    def summary(self) -> SetScore:
        """The set's scores."""
        samples = len(self.nll)
        accuracy = None if self.correct is None else sum(self.correct) / samples
        return SetScore(
            loss=self.loss,
            loss_stderr=stderr_of_sum(residuals(self.nll, self.num_loss_tokens)),
            perplexity=math.exp(min(self.loss, 700.0)),
            num_loss_tokens=sum(self.num_loss_tokens),
            num_samples=samples,
            accuracy=accuracy,
            accuracy_stderr=None if accuracy is None else math.sqrt(accuracy * (1 - accuracy) / samples),
            accuracy_kind=self.accuracy_kind,
            num_ties=self.num_ties,
        )


def changes(before: RecordScores, after: RecordScores) -> SetChanges:
    """What changed on the same records. Raises ValueError for different numbers of records."""
    if len(before.nll) != len(after.nll):
        raise ValueError(f"scores of {len(before.nll)} and of {len(after.nll)} records cannot be compared")
    old_residuals, new_residuals = (residuals(scores.nll, scores.num_loss_tokens) for scores in (before, after))
    paired = [new - old for old, new in zip(old_residuals, new_residuals, strict=True)]
    accuracy = None
    if before.correct is not None and after.correct is not None and before.accuracy_kind == after.accuracy_kind:
        samples = len(after.correct)
        differences = [(new - old) / samples for old, new in zip(before.correct, after.correct, strict=True)]
        was, now = (sum(correct) / samples for correct in (before.correct, after.correct))
        mean = sum(differences) / samples
        accuracy = _change(was, now, stderr_of_sum([value - mean for value in differences]))
    return SetChanges(loss=_change(before.loss, after.loss, stderr_of_sum(paired)), accuracy=accuracy)


def _change(before: float, after: float, stderr: float | None) -> MetricChange:
    return MetricChange(change=after - before, relative=(after - before) / before if before else None, stderr=stderr)


@torch.no_grad()
def score_records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    max_tokens: int = 2048,
    batching: Batching = Batching.PACKED,
    description: str = "evaluate",
) -> RecordScores:
    """Score `records` (at least one). Samples are batched to at most `max_tokens` tokens."""
    asked = Asked.of(records, tokenizer)
    parameter = next(model.parameters())
    found = SampleScores(asked)
    batches = micro_batches(asked.samples, parameter.device, max_tokens, batching, description)
    with fast_linear_layers(model):
        for batch, sample_of_target in batches:
            found.add(target_logits(model, batch), batch, sample_of_target)
    return found.of_records(parameter.dtype)


def describe_accuracy(records: Sequence[Record], scores: RecordScores) -> list[str]:
    """What a reader of the set's accuracy should know of it, each in a sentence."""
    notes = []
    with_choices = sum(bool(record.choices) for record in records)
    if 0 < with_choices < len(records):
        found = f"its accuracy is by {scores.accuracy_kind} of all"
        found = found if scores.correct is not None else "it has no accuracy"
        notes.append(f"{with_choices} of {len(records)} records have choices and the others none, so {found}")
    if scores.num_ties:
        notes.append(
            f"{scores.num_ties} of {len(records)} records have a right answer that is as probable as another, or no "
            "two different choices; they count as not right"
        )
    return notes


def _margin(nll: Sequence[float], right: int) -> float:
    """By how much the right answer is more probable than the likeliest other one, in nats; 0 if there is no other."""
    others = [value for answer, value in enumerate(nll) if answer != right]
    return min(others) - nll[right] if others else 0.0


def _has_answer(record: Record) -> bool:
    """Whether what has a loss is what the assistant says."""
    return bool(record.messages) and record.messages[-1]["role"] == "assistant" and not record.unmask


def _answered(record: Record, answer: str) -> Record:
    """The record with another content of its last message."""
    if not answer:
        return record
    messages = (*record.messages[:-1], record.messages[-1] | {"content": answer})
    return replace(record, messages=messages)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a set of records asks a model, as tokens."""

    records: Sequence[Record]
    samples: list[Sample]
    """The records with each answer that counts; those of a record with equal tokens are one."""
    answers: list[list[int]]
    """Of each record, the positions in `samples` of its choices; of one without, of its answer or text."""
    right: list[int]
    """Of each record, the position of the right answer, or of the text."""

    @classmethod
    def of(cls, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, choices: bool = True) -> "Asked":
        """What the records ask of a model with this tokenizer; without `choices`, the right answers alone."""
        samples: list[Sample] = []
        answers: list[list[int]] = []
        for record in records:
            position_of: dict[tuple[int, ...], int] = {}
            of_record = []
            for answer in (choices and record.choices) or ("",):
                sample = tokenize(_answered(record, answer), tokenizer, max_text_tokens=MAX_TEXT_TOKENS)
                position = position_of.setdefault(tuple(sample.input_ids), len(samples))
                if position == len(samples):
                    samples.append(sample)
                of_record.append(position)
            answers.append(of_record)
        right = [
            of_record[record.choices.index(record.messages[-1]["content"]) if len(of_record) > 1 else 0]
            for record, of_record in zip(records, answers, strict=True)
        ]
        return cls(records, samples, answers, right)


class SampleScores:
    """What a model says of each sample, added up over its targets as their logits come."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._nll = torch.zeros(len(asked.samples), dtype=torch.float64)
        short = max(asked.samples[position].num_loss_tokens for position in asked.right) <= SHORT_ANSWER_TOKENS
        has_choices = all(record.choices for record in asked.records)
        self._is_matched = short and not has_choices and all(map(_has_answer, asked.records))
        self._wrong = torch.zeros(len(asked.samples), dtype=torch.int64)

    @torch.no_grad()
    def add(self, logits: torch.Tensor, batch: MicroBatch, sample_of_target: torch.Tensor) -> None:
        """Add the targets of a batch: their logits (L, vocabulary), and the samples (L,) that `micro_batches` gave.

        A target that ties with another token is not more probable: which of them greedy decoding takes is chance.
        """
        self._nll.index_add_(0, sample_of_target, cross_entropy(logits, batch.targets).double().cpu())
        if self._is_matched:
            as_probable = (logits >= logits.gather(1, batch.targets[:, None])).sum(-1)  # the target itself, too
            self._wrong.index_add_(0, sample_of_target, (as_probable != 1).long().cpu())

    def of_records(self, dtype: torch.dtype) -> RecordScores:
        """The scores of each record, of logits that were computed in `dtype`."""
        asked, nll = self._asked, self._nll.tolist()
        num_loss_tokens = [asked.samples[position].num_loss_tokens for position in asked.right]
        scores = RecordScores([nll[position] for position in asked.right], num_loss_tokens, None, None)
        if all(record.choices for record in asked.records):
            tie = max(TIE, torch.finfo(dtype).eps)
            margins = [
                _margin([nll[p] for p in of_record], record.choices.index(record.messages[-1]["content"]))
                for record, of_record in zip(asked.records, asked.answers, strict=True)
            ]
            ties = sum(abs(margin) <= tie for margin in margins)
            return replace(scores, correct=[m > tie for m in margins], accuracy_kind="choice", num_ties=ties)
        if self._is_matched:
            # Whether each target is more probable than any other token.
            exact = (self._wrong == 0).tolist()
            return replace(scores, correct=[exact[at] for at in asked.right], accuracy_kind="exact match")
        return scores


def micro_batches(
    samples: Sequence[Sample],
    device: torch.device,
    max_tokens: int,
    batching: Batching,
    description: str,
) -> Iterator[tuple[MicroBatch, torch.Tensor]]:
    """All samples in micro-batches on a device, each with its targets' samples: (L,), int64, on the CPU.

    Samples of more than `max_tokens` are put into batches of the next multiple. A progress bar shows `description`.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    alike: dict[int, list[int]] = {}
    for position, length in enumerate(lengths):
        alike.setdefault(-(-length // max_tokens) * max_tokens, []).append(position)
    plan: list[list[int]] = []
    for budget, positions in sorted(alike.items()):
        if batching is Batching.BRANCHED:
            (bins,) = plan_branches([samples[position].input_ids for position in positions], budget)
        else:
            (bins,) = plan_micro_batches([lengths[position] for position in positions], budget, batching=batching)
        plan += [[positions[at] for at in chosen] for chosen in bins]
    with tqdm(total=sum(lengths), desc=description, unit="token", mininterval=5.0) as progress:
        for chosen in plan:
            batch = collate([samples[position] for position in chosen], batching)
            yield batch.to(device), torch.tensor(chosen)[batch.sample_of_target]
            progress.update(sum(lengths[position] for position in chosen))
