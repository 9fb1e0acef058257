"""Scores equal what the model says, computed the slow way."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from osft.data.chat import Sample, tokenize
from osft.data.packing import Batching
from osft.data.records import Record
from osft.evaluation.generation import generate
from osft.evaluation.scoring import RecordScores, changes, describe_accuracy, micro_batches, score_records
from tests.conftest import arithmetic, byte_tokenizer, tiny_llama


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


@pytest.mark.parametrize("batching", Batching)
@pytest.mark.parametrize("max_tokens", [10, 100, 5000])
def test_loss_is_per_answer_token_whatever_the_packing(model, tokenizer, max_tokens, batching):
    score = score_records(model, tokenizer, records(9), max_tokens=max_tokens, batching=batching).summary()
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


CHOICES = {
    "of other lengths": ("a", "abcdefgh", "xyz"),
    "that begin alike": ("abc", "abd", "ab"),
    "that are the same": ("abc", "abc", "x"),
    "one": ("abc",),
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_answers_that_share_their_prompt_have_the_scores_that_they_have_alone(model, tokenizer, choices):
    asked_for = [asked(answer, *choices) for answer in choices] + records(3) + [Record(source="t", text="One two.")]
    found = score_records(model, tokenizer, asked_for, batching=Batching.BRANCHED)
    assert found.nll == pytest.approx([nll(model, tokenizer, record)[0] for record in asked_for], rel=1e-5)
    only = [record for record in asked_for if record.choices]
    branched, alone = (score_records(model, tokenizer, only, batching=b) for b in (Batching.BRANCHED, Batching.PADDED))
    assert (branched.correct, branched.num_ties) == (alone.correct, alone.num_ties)


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
    assert generate(model, tokenizer, [record]) == [record.messages[-1]["content"]]


def test_answers_do_not_depend_on_what_is_asked_beside_them(model, tokenizer):
    asked_for = [record for size in (1, 5, 12) for record in (asked("a" * size), asked("b", "b", "c"))]
    asked_for.append(Record(source="f", messages=tuple({"role": "user", "content": "x" * 40} for _ in range(2))))
    answers = generate(model, tokenizer, asked_for)
    assert len(set(answers)) > 1
    assert answers == generate(model, tokenizer, asked_for, together=False)
    assert answers == [answer for record in asked_for for answer in generate(model, tokenizer, [record])]
    assert generate(model, tokenizer, []) == []


@pytest.mark.parametrize("batching", list(Batching))
def test_long_sample_does_not_make_the_batches_of_others_long(batching):
    lengths = [3, 40, 5, 4, 9, 2, 10, 41, 6]
    samples = [Sample([number] * length, [number] * length) for number, length in enumerate(lengths)]
    found = list(micro_batches(samples, torch.device("cpu"), 10, batching, ""))
    assert sorted(int(i) for _, of_target in found for i in of_target.unique()) == list(range(len(samples)))
    sizes = [batch.input_ids.numel() for batch, _ in found]
    assert sizes[-2:] == [40, 41]
    assert max(sizes[:-2]) <= 10


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


def asked(answer: str, *choices: str) -> Record:
    messages = ({"role": "user", "content": "which?"}, {"role": "assistant", "content": answer})
    return Record(source="f:1", messages=messages, choices=choices)


def rewarding(tokenizer, answer: str) -> LlamaForCausalLM:
    """A model that thinks the answer's tokens likely, wherever they come."""
    model = tiny_llama(tie_word_embeddings=False, initializer_range=1e-4).eval()
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1.0
        model.model.embed_tokens.weight[:, 0] = 1.0  # survives the layers, which do next to nothing
        model.lm_head.weight.zero_()
        for token in set(tokenizer(answer)["input_ids"]) | {tokenizer.eos_token_id}:
            model.lm_head.weight[token, 0] = 1.0
    return model


@pytest.mark.parametrize(
    ("answer", "choices", "right"),
    [
        ("ab", ("ab", "cd"), True),
        ("cd", ("ab", "cd"), False),
        ("ab", ("ab", "ba"), False),  # as probable, in another order
        ("ab", ("ab",), False),
        ("ab", ("ab", "ab"), False),
        ("ab", ("ab", "cd", "ab"), False),
        ("ab", ("ab", "cd", "cd"), True),  # it is a wrong one that comes twice
        ("ab", ("cd", "ab", "ef", "abx"), True),
        ("ab", ("ab", " ab"), True),  # not the same to this template
        ("abab", ("abab", "ab"), False),  # longer, and so less probable
    ],
)
def test_only_an_answer_that_is_more_probable_than_every_other_is_right(tokenizer, answer, choices, right):
    found = score_records(rewarding(tokenizer, "ab"), tokenizer, [asked(answer, *choices)])
    assert found.correct == [right]
    assert found.num_ties == (answer == "ab" and not right)


@pytest.mark.parametrize("choices", [("ab", " ab"), ("ab", "ab\n"), ("AB", "ab")])
def test_choices_that_the_template_makes_equal_tie(tokenizer, choices):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("['content']", "['content'] | trim | lower")
    found = score_records(tiny_llama(), tokenizer, [asked(choices[0], *choices)])
    assert (found.correct, found.num_ties) == ([False], 1)


def test_a_model_without_a_clue_is_never_right(tokenizer):
    model = tiny_llama(tie_word_embeddings=False).eval()
    torch.nn.init.zeros_(model.lm_head.weight)  # every token is as probable as any other
    of_choices = score_records(model, tokenizer, [asked("a", "a", "b"), asked("b", "a", "b"), asked("cd", "ab", "cd")])
    assert (of_choices.correct, of_choices.num_ties) == ([False] * 3, 3)
    first_token = chr(33)  # the token 0, which an argmax would take
    assert score_records(model, tokenizer, [asked(first_token)]).correct == [False]


def test_ties_are_within_what_a_dtype_can_tell(tokenizer):
    model = rewarding(tokenizer, "ab")
    with torch.no_grad():
        model.lm_head.weight[tokenizer("c")["input_ids"][0], 0] = 0.9999
    answers = [asked("ab", "ab", "cb"), asked("ab", "ab", "cd")]
    assert score_records(model, tokenizer, answers).correct == [True, True]
    assert score_records(model.bfloat16(), tokenizer, answers).correct == [False, True]


@pytest.mark.parametrize("max_tokens", [60, 200, 5000])
def test_scores_do_not_depend_on_the_order_or_on_what_is_packed_together(model, tokenizer, max_tokens):
    chosen = [*records(9), *records(6, choices=False)]
    usual = score_records(model, tokenizer, chosen)
    turned = score_records(model, tokenizer, chosen[::-1], max_tokens=max_tokens)
    assert turned.nll[::-1] == pytest.approx(usual.nll, rel=1e-5)
    of_choices = [
        score_records(model, tokenizer, part, max_tokens=max_tokens) for part in (records(9), records(9)[::-1])
    ]
    assert of_choices[0].correct == of_choices[1].correct[::-1]


def test_an_answer_that_does_not_end_is_no_exact_match(tokenizer):
    model = tiny_llama(tie_word_embeddings=False).eval()
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
        model.model.norm.weight[0] = 1.0
        model.model.embed_tokens.weight[:, 0] = 100.0
        model.lm_head.weight[tokenizer("a")["input_ids"][0], 0] = 1.0  # says nothing but a, for ever
    assert score_records(model, tokenizer, [asked("aaa")]).correct == [False]
    open_template = byte_tokenizer()
    open_template.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}"
    assert score_records(model, open_template, [asked("aaa")]).correct == [True], "nothing ends an answer here"


def test_an_empty_answer_is_its_end(tokenizer):
    call = {"role": "assistant", "content": ""}
    record = Record(source="f:1", messages=({"role": "user", "content": "?"}, call))
    assert score_records(tiny_llama(), tokenizer, [record]).num_loss_tokens == [1]


def test_a_chosen_answer_keeps_what_else_its_message_has(tokenizer):
    thinking = byte_tokenizer()
    thinking.chat_template = tokenizer.chat_template.replace(
        "message['content']", "(message['thinking'] or '') + message['content']"
    )
    record = asked("ab", "ab", "cd")
    record = replace(record, messages=(record.messages[0], record.messages[1] | {"thinking": "because "}))
    assert score_records(tiny_llama(), thinking, [record]).num_loss_tokens == [len("because ab") + 1]


def test_what_is_unusual_of_an_accuracy_is_said(model, tokenizer):
    mixed = [*records(3), *records(2, choices=False)]
    (note,) = describe_accuracy(mixed, score_records(model, tokenizer, mixed))
    assert note == "3 of 5 records have choices and the others none, so its accuracy is by exact match of all"
    long = [*records(1), asked("a long answer of more than sixteen tokens")]
    (note,) = describe_accuracy(long, score_records(model, tokenizer, long))
    assert note.endswith("so it has no accuracy")
    tied = [asked("a", "a"), *records(2)]
    (note,) = describe_accuracy(tied, score_records(model, tokenizer, tied))
    assert note.startswith("1 of 3 records have a right answer that is as probable as another, or no two different")
    assert describe_accuracy(records(3), score_records(model, tokenizer, records(3))) == []


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
    found = changes(BEFORE, scores([1.0, 1.0, 8.0], [1, 1, 2])).loss  # loss 2.5; residuals -3/8, -3/8, 3/4
    stderr = math.sqrt(3 / 2 * (0.125**2 + 0.375**2 + 0.25**2))
    assert found.to_dict() == {"change": -0.5, "relative": pytest.approx(-1 / 6), "stderr": pytest.approx(stderr)}


def test_what_is_hard_for_both_models_adds_no_error():
    found = changes(BEFORE, scores([0.5, 2.5, 7.0], [1, 1, 2])).loss  # each token is 0.5 better
    assert found.change == -0.5
    assert found.stderr == 0.0


def test_change_of_accuracy_is_compared_record_by_record():
    was, now = ([True, False, False, True], [True, True, True, False])
    found = changes(scores([1.0] * 4, [1] * 4, was), scores([1.0] * 4, [1] * 4, now)).accuracy
    # differences 0, 1, 1, -1: their variance is 2.75 / 3
    assert found.to_dict() == {"change": 0.25, "relative": 0.5, "stderr": pytest.approx(math.sqrt(2.75 / 3 / 4))}


def test_a_change_from_zero_has_no_relative_size():
    found = changes(scores([0.0, 0.0], [1, 1], [False] * 2), scores([1.0, 3.0], [1, 1], [True] * 2))
    assert found.loss.relative is None
    assert found.accuracy.relative is None


def test_one_record_has_no_standard_error():
    one = scores([1.0], [1], [True])
    assert one.summary().loss_stderr is None
    assert changes(one, one).loss.stderr is None
    assert changes(one, one).accuracy.stderr is None


def test_accuracy_of_one_model_only_or_of_another_kind_is_not_compared():
    chosen = scores([1.0] * 3, [1] * 3, [True] * 3)
    assert changes(BEFORE, chosen).accuracy is None
    assert changes(replace(chosen, accuracy_kind="exact match"), chosen).accuracy is None


def test_scores_of_different_records_are_not_compared():
    with pytest.raises(ValueError, match="3 and of 1 records"):
        changes(BEFORE, scores([1.0], [1]))
