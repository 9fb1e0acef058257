"""Scores of a model on a set of records.

- loss: nats per token of the answers (of all tokens, for plain text); perplexity is its exponential.
- accuracy of a record with choices: is the right answer the most probable one, that is, is the sum of its tokens'
  log-likelihoods the largest?
- accuracy of a short answer without choices ("exact match"): is each of its tokens the most probable one? That
  is whether greedy decoding gives exactly this answer, found in one forward pass.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from osft.data.chat import Sample, tokenize
from osft.data.packing import collate, plan_micro_batches
from osft.data.records import Record
from osft.likelihood import cross_entropy, target_logits

SHORT_ANSWER_TOKENS = 16
"""A set has an exact-match accuracy if no answer is longer than this."""


@dataclass(frozen=True, slots=True)
class SetScore:
    """A model's scores on one evaluation set."""

    loss: float
    perplexity: float
    num_loss_tokens: int
    num_samples: int
    accuracy: float | None
    accuracy_stderr: float | None
    """Standard error of the accuracy, sqrt(p (1 - p) / n)."""
    accuracy_kind: str | None
    """`choice`, `exact match`, or None where the set has neither."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def score_set(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    max_tokens: int = 2048,
    max_text_tokens: int = 256,
    description: str = "evaluate",
) -> SetScore:
    """Score `records` (at least one). Samples are packed into batches of at most `max_tokens` tokens."""
    samples: list[Sample] = []
    owners: list[tuple[int, str]] = []  # which record and which of its possible answers a sample is
    for index, record in enumerate(records):
        for answer in record.choices or ("",):
            samples.append(tokenize(_answered(record, answer), tokenizer, max_text_tokens=max_text_tokens))
            owners.append((index, answer))
    nll, exact = _score_samples(model, samples, max_tokens, description)

    right = [
        position
        for position, (index, answer) in enumerate(owners)
        if not records[index].choices or answer == records[index].messages[-1]["content"]
    ]
    num_loss_tokens = sum(samples[position].num_loss_tokens for position in right)
    loss = sum(nll[position] for position in right) / num_loss_tokens

    correct: list[bool] = []
    kind: str | None = None
    if all(record.choices for record in records):
        kind = "choice"
        likeliest: dict[int, tuple[float, str]] = {}
        for position, (index, answer) in enumerate(owners):
            likeliest[index] = min(likeliest.get(index, (math.inf, "")), (nll[position], answer))
        correct = [likeliest[i][1] == record.messages[-1]["content"] for i, record in enumerate(records)]
    elif all(record.messages for record in records) and all(
        samples[position].num_loss_tokens <= SHORT_ANSWER_TOKENS for position in right
    ):
        kind = "exact match"
        correct = [exact[position] for position in right]
    accuracy = sum(correct) / len(correct) if kind else None
    return SetScore(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        num_loss_tokens=num_loss_tokens,
        num_samples=len(records),
        accuracy=accuracy,
        accuracy_stderr=None if accuracy is None else math.sqrt(accuracy * (1 - accuracy) / len(correct)),
        accuracy_kind=kind,
    )


def _answered(record: Record, answer: str) -> Record:
    """The record with another last message."""
    if not answer:
        return record
    messages = (*record.messages[:-1], {"role": "assistant", "content": answer})
    return replace(record, messages=messages)


@torch.no_grad()
def _score_samples(
    model: PreTrainedModel, samples: Sequence[Sample], max_tokens: int, description: str
) -> tuple[list[float], list[bool]]:
    """Per sample: the sum of its targets' negative log-likelihoods, and whether each target is the argmax."""
    device = next(model.parameters()).device
    lengths = [len(sample.input_ids) for sample in samples]
    (plan,) = plan_micro_batches(lengths, max(max_tokens, *lengths))
    nll = torch.zeros(len(samples), dtype=torch.float64)
    wrong = torch.zeros(len(samples), dtype=torch.int64)
    with tqdm(total=sum(lengths), desc=description, unit="token", mininterval=5.0) as progress:
        for packed in plan:
            batch = collate([samples[position] for position in packed]).to(device)
            logits = target_logits(model, batch)
            losses = cross_entropy(logits, batch.targets).double().cpu()
            misses = (logits.argmax(-1) != batch.targets).long().cpu()
            sample_of_target = torch.tensor(packed)[batch.sample_of_target.cpu()]
            nll.index_add_(0, sample_of_target, losses)
            wrong.index_add_(0, sample_of_target, misses)
            progress.update(batch.input_ids.numel())
    return nll.tolist(), (wrong == 0).tolist()


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: Record, *, max_new_tokens: int = 24
) -> str:
    """The model's own answer to a record's prompt, by greedy decoding."""
    prompt = list(record.messages[:-1])
    encoded: Any = tokenizer.apply_chat_template(
        prompt,
        tools=list(record.tools) or None,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    encoded = encoded.to(next(model.parameters()).device)
    generating: Any = model  # its type is an nn.Module's, whose attributes may be tensors
    output = generating.generate(
        **encoded, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    new_tokens = output[0, encoded["input_ids"].shape[1] :]
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True)).strip()
