"""Scores equal what the model says, computed the slow way."""

import math

import pytest
import torch

from osft.data.chat import tokenize
from osft.data.records import Record
from osft.evaluation.scoring import generate, score_set
from tests.conftest import arithmetic, tiny_llama


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=3).eval()


def records(count: int, *, choices: bool = True) -> list[Record]:
    return [
        Record(source="f", messages=tuple(r["messages"]), choices=tuple(r["choices"]) if choices else ())
        for r in arithmetic(count)
    ]


def nll(model, tokenizer, record: Record) -> tuple[float, int]:
    """Sum of negative log-likelihoods of a record's answer, one sample at a time with transformers' own loss."""
    sample = tokenize(record, tokenizer)
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])).loss
    return loss.item() * sample.num_loss_tokens, sample.num_loss_tokens


@pytest.mark.parametrize("max_tokens", [10, 100, 5000])
def test_loss_is_per_answer_token_whatever_the_packing(model, tokenizer, max_tokens):
    score = score_set(model, tokenizer, records(9), max_tokens=max_tokens)
    sums = [nll(model, tokenizer, record) for record in records(9)]
    assert score.num_loss_tokens == sum(count for _, count in sums)
    assert score.loss == pytest.approx(sum(value for value, _ in sums) / score.num_loss_tokens, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.loss))


def test_choice_accuracy_picks_the_most_probable_answer(model, tokenizer):
    correct = 0
    for record in records(12):
        likelihoods = {}
        for choice in record.choices:
            answered = (*record.messages[:-1], {"role": "assistant", "content": choice})
            likelihoods[choice] = -nll(model, tokenizer, Record(source="f", messages=answered))[0]
        correct += max(likelihoods, key=likelihoods.__getitem__) == record.messages[-1]["content"]
    score = score_set(model, tokenizer, records(12))
    assert score.accuracy_kind == "choice"
    assert score.accuracy == correct / 12
    assert score.accuracy_stderr == pytest.approx(math.sqrt(score.accuracy * (1 - score.accuracy) / 12))


def test_exact_match_of_a_model_that_has_learned_the_answer(tokenizer):
    model = tiny_llama(seed=3)
    (record,) = records(1, choices=False)
    sample = tokenize(record, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert score_set(model.eval(), tokenizer, [record]).accuracy == 0.0
    for _ in range(60):
        model(input_ids=torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert score_set(model.eval(), tokenizer, [record]).accuracy == 1.0
    assert generate(model, tokenizer, record) == record.messages[-1]["content"]


def test_plain_text_has_a_loss_and_no_accuracy(model, tokenizer):
    score = score_set(model, tokenizer, [Record(source="f", text="some text"), Record(source="f", text="more")])
    assert score.accuracy is None
    assert score.accuracy_kind is None
    assert score.num_loss_tokens == 8 + 3


def test_long_answers_have_no_accuracy(model, tokenizer):
    long = {"role": "assistant", "content": "a long answer " * 5}
    score = score_set(model, tokenizer, [Record(source="f", messages=({"role": "user", "content": "?"}, long))])
    assert score.accuracy is None
