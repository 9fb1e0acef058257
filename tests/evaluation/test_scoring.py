"""Scores equal what the model says, computed the slow way."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from osft.data.chat import tokenize
from osft.data.records import Record
from osft.evaluation.scoring import RecordScores, changes, generate, score_records
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
    score = score_records(model, tokenizer, records(9), max_tokens=max_tokens).summary()
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
    score = score_records(model, tokenizer, records(12)).summary()
    assert score.accuracy_kind == "choice"
    assert score.accuracy == correct / 12
    assert score.accuracy_stderr == pytest.approx(math.sqrt(score.accuracy * (1 - score.accuracy) / 12))


def test_exact_match_of_a_model_that_has_learned_the_answer(tokenizer):
    model = tiny_llama(seed=3)
    (record,) = records(1, choices=False)
    sample = tokenize(record, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert score_records(model.eval(), tokenizer, [record]).summary().accuracy == 0.0
    for _ in range(60):
        model(input_ids=torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert score_records(model.eval(), tokenizer, [record]).summary().accuracy == 1.0
    assert generate(model, tokenizer, record) == record.messages[-1]["content"]


def test_plain_text_has_a_loss_and_no_accuracy(model, tokenizer):
    score = score_records(
        model, tokenizer, [Record(source="f", text="some text"), Record(source="f", text="more")]
    ).summary()
    assert score.accuracy is None
    assert score.accuracy_kind is None
    assert score.num_loss_tokens == 8 + 3


def test_long_answers_have_no_accuracy(model, tokenizer):
    long = {"role": "assistant", "content": "a long answer " * 5}
    score = score_records(
        model, tokenizer, [Record(source="f", messages=({"role": "user", "content": "?"}, long))]
    ).summary()
    assert score.accuracy is None


def scores(nll: list[float], tokens: list[int], correct: list[bool] | None = None) -> RecordScores:
    return RecordScores(nll, tokens, correct, None if correct is None else "choice")


BEFORE = scores([1.0, 3.0, 8.0], [1, 1, 2])  # loss 3; residuals -1/2, 0, 1/2


def test_standard_error_of_the_loss_is_that_of_a_ratio():
    assert BEFORE.summary().loss == 3.0
    assert BEFORE.summary().loss_stderr == pytest.approx(math.sqrt(3 / 2 * (0.25 + 0.25)))


def test_standard_error_of_the_loss_is_the_spread_over_drawn_samples():
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 30, 300)
    nll = draw.gamma(2.0, size=300) * tokens
    drawn = draw.integers(0, 300, (2000, 300))
    spread = (nll[drawn].sum(1) / tokens[drawn].sum(1)).std()
    assert scores(nll.tolist(), tokens.tolist()).summary().loss_stderr == pytest.approx(spread, rel=0.1)


def test_change_of_loss_is_compared_record_by_record():
    found = changes(BEFORE, scores([1.0, 1.0, 8.0], [1, 1, 2]))["loss"]  # loss 2.5; residuals -3/8, -3/8, 3/4
    stderr = math.sqrt(3 / 2 * (0.125**2 + 0.375**2 + 0.25**2))
    assert found == {"change": -0.5, "relative": pytest.approx(-1 / 6), "stderr": pytest.approx(stderr)}


def test_what_is_hard_for_both_models_adds_no_error():
    found = changes(BEFORE, scores([0.5, 2.5, 7.0], [1, 1, 2]))["loss"]  # each token is 0.5 better
    assert found["change"] == -0.5
    assert found["stderr"] == 0.0


def test_change_of_accuracy_is_compared_record_by_record():
    was, now = ([True, False, False, True], [True, True, True, False])
    found = changes(scores([1.0] * 4, [1] * 4, was), scores([1.0] * 4, [1] * 4, now))["accuracy"]
    # differences 0, 1, 1, -1: their variance is 2.75 / 3
    assert found == {"change": 0.25, "relative": 0.5, "stderr": pytest.approx(math.sqrt(2.75 / 3 / 4))}


def test_a_change_from_zero_has_no_relative_size():
    found = changes(scores([0.0, 0.0], [1, 1], [False] * 2), scores([1.0, 3.0], [1, 1], [True] * 2))
    assert found["loss"]["relative"] is None
    assert found["accuracy"]["relative"] is None


def test_one_record_has_no_standard_error():
    one = scores([1.0], [1], [True])
    assert one.summary().loss_stderr is None
    assert changes(one, one)["loss"]["stderr"] is None
    assert changes(one, one)["accuracy"]["stderr"] is None


def test_accuracy_of_one_model_only_or_of_another_kind_is_not_compared():
    chosen = scores([1.0] * 3, [1] * 3, [True] * 3)
    assert changes(BEFORE, chosen)["accuracy"] is None
    assert changes(replace(chosen, accuracy_kind="exact match"), chosen)["accuracy"] is None


def test_scores_of_different_records_are_not_compared():
    with pytest.raises(ValueError, match="3 and of 1 records"):
        changes(BEFORE, scores([1.0], [1]))
