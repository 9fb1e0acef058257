"""One evaluation of three models: what it holds, and what it does not measure twice."""

import weakref
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from osft.data.packing import Batching
from osft.data.records import DataError, Record
from osft.evaluation.evaluate import EvaluationSet, evaluate, load_set
from osft.evaluation.gate import GateRules, decide
from osft.evaluation.generation import generate
from osft.evaluation.record import BenchmarkTask, EvaluatedModel, Evaluation
from osft.evaluation.scoring import RecordScores, changes, score_records
from tests.conftest import arithmetic, byte_tokenizer, tiny_llama, write_jsonl

SEEDS = {"base": 0, "champion": 1, "candidate": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = {}
    for name, seed in SEEDS.items():
        folder = tmp_path_factory.mktemp(name)
        tiny_llama(seed).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def chats(count: int, seed: int) -> tuple[Record, ...]:
    return tuple(
        Record(source=f"f:{i}", messages=tuple(r["messages"]), choices=tuple(r["choices"]))
        for i, r in enumerate(arithmetic(count, seed))
    )


SETS = [
    EvaluationSet(
        "text", "anchor", "text.jsonl", tuple(Record(source="t", text=text) for text in ("One.", "Two two."))
    ),
    EvaluationSet("new", "new task", "new.jsonl", chats(6, seed=1)),
    EvaluationSet("old", "earlier task", "old.jsonl", chats(5, seed=2)),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("scores"))


@pytest.fixture(scope="module")
def evaluation(models: dict[str, str], store: str) -> dict[str, Any]:
    return evaluate(models, SETS, num_examples=2, score_store=store)


@pytest.fixture
def in_memory() -> list[int]:
    """How many models are in memory when the next one is loaded."""
    return []


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, in_memory: list[int]) -> list[str]:
    """The folders that models are loaded from, in order."""
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained
    folders: list[str] = []
    alive: list[weakref.ref] = []

    def load(folder: Path, **settings: Any) -> Any:
        in_memory.append(sum(reference() is not None for reference in alive))
        model = original(folder, **settings)
        folders.append(str(folder))
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    return folders


def scores(seed: int, of: EvaluationSet) -> RecordScores:
    return score_records(tiny_llama(seed).eval(), byte_tokenizer(), of.records, batching=Batching.BRANCHED)


def test_results_are_each_models_scores(evaluation):
    assert list(evaluation.results) == list(SEEDS)
    for name, seed in SEEDS.items():
        for s in SETS:
            expected = scores(seed, s).summary()
            assert evaluation.results[name][s.name] == expected


def test_changes_are_the_candidates_against_each_other_model(evaluation):
    assert list(evaluation.changes) == ["base", "champion"]
    found = {name: scores(seed, SETS[1]) for name, seed in SEEDS.items()}
    for name in ("base", "champion"):
        assert evaluation.changes[name]["new"] == changes(found[name], found["candidate"])
    assert evaluation.changes["base"]["text"].accuracy is None


def test_what_was_evaluated_is_described(evaluation, models):
    assert evaluation.task == "new"
    assert evaluation.reference == "champion"
    assert evaluation.models == {name: EvaluatedModel(path=path, version=None) for name, path in models.items()}
    assert evaluation.sets["old"].to_dict() == {
        "role": "earlier task",
        "source": "old.jsonl",
        "num_samples": 5,
        "notes": [],
    }
    assert evaluation.benchmarks is None


def test_evaluation_is_json_and_can_be_decided_on(evaluation):
    decision = decide(Evaluation.from_json(evaluation.to_json(), "it"), GateRules())
    assert [rule.rule for rule in decision.rules] == ["min_gain", "max_forgetting", "max_drift"]


def test_examples_show_the_new_and_the_earlier_tasks_with_every_models_answer(evaluation):
    assert [example.set for example in evaluation.examples] == ["new", "new", "old", "old"]
    record, shown = SETS[2].records[1], evaluation.examples[3]
    assert shown.prompt == record.messages[0]["content"]
    assert shown.reference == record.messages[1]["content"]
    answers = {name: generate(tiny_llama(seed).eval(), byte_tokenizer(), [record])[0] for name, seed in SEEDS.items()}
    assert shown.answers == answers
    assert len(set(answers.values())) > 1


def test_first_round_compares_with_the_base_model(models):
    first = {name: models[name] for name in ("candidate", "base")}
    found = evaluate(first, SETS, num_examples=0)
    assert found.reference == "base"
    assert list(found.models) == list(found.results) == ["base", "candidate"]
    assert list(found.changes) == ["base"]
    assert found.examples == ()


def test_each_model_is_loaded_once_if_all_fit_into_memory(models, loaded, in_memory):
    evaluate(models, SETS, num_examples=1)
    assert loaded == list(models.values())
    assert in_memory == [0, 1, 2]


def test_models_are_loaded_beside_the_candidate_if_no_more_fit(models, loaded, in_memory, evaluation, monkeypatch):
    monkeypatch.setattr("osft.evaluation.evaluate.plan_comparison", lambda folders: (torch.float32, False))
    found = evaluate(models, SETS, num_examples=2)
    base, champion, candidate = models.values()
    assert loaded == [base, candidate, champion, base, champion]
    assert in_memory == [0, 1, 1, 1, 1]
    assert found.replace(created="") == evaluation.replace(created="")


def test_scores_come_from_the_logits_that_are_compared(models, monkeypatch):
    monkeypatch.setattr("osft.evaluation.measure.score_records", scored := Mock(wraps=score_records))
    found = evaluate(models, SETS, num_examples=0)
    scored.assert_not_called()
    for name, seed in SEEDS.items():
        for s in SETS:
            assert found.results[name][s.name] == scores(seed, s).summary()


def test_what_is_in_the_store_loads_no_model(evaluation, models, store, loaded):
    again = evaluate(models, SETS, num_examples=2, score_store=store)
    assert loaded == []
    assert again.replace(created="") == evaluation.replace(created="")


def test_only_the_model_that_is_new_is_loaded(evaluation, models, store, loaded, tmp_path):
    tiny_llama(5).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    next_round = {"base": models["base"], "champion": models["candidate"], "candidate": str(tmp_path)}
    found = evaluate(next_round, SETS, num_examples=2, score_store=store)
    assert loaded == [models["base"], models["candidate"], str(tmp_path)]
    assert found.results["champion"] == evaluation.results["candidate"]


@pytest.mark.parametrize(
    "changed",
    [
        {"sets": [SETS[0], SETS[1], EvaluationSet("old", "earlier task", "", chats(4, seed=9))]},
        {"max_tokens": 100},
        {"num_examples": 3},
    ],
    ids=["records", "settings", "examples"],
)
def test_other_records_or_settings_are_measured(evaluation, models, store, loaded, changed):
    evaluate(models, **({"sets": SETS, "num_examples": 2, "score_store": store} | changed))
    assert loaded == list(models.values())


def test_other_tokenizer_is_another_model(evaluation, models, store, loaded, tmp_path):
    tiny_llama(SEEDS["base"]).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "model")
    tokenizer.save_pretrained(tmp_path)
    evaluate(models | {"base": str(tmp_path)}, SETS, num_examples=2, score_store=store)
    assert loaded == [str(tmp_path), models["candidate"]]


def test_same_model_in_two_roles_is_measured_once(models, loaded):
    evaluate(models | {"champion": models["base"]}, SETS, num_examples=1)
    assert loaded == [models["base"], models["candidate"]]


def test_killed_evaluation_keeps_the_sets_that_were_measured(models, loaded, tmp_path, monkeypatch):
    from osft.evaluation import measure

    original, measured = measure.compare, []

    def compare(*given: Any, **settings: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(settings["description"])
        return original(*given, **settings)

    monkeypatch.setattr(measure, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        evaluate(models, SETS, score_store=str(tmp_path))
    assert measured == ["base and champion to candidate on text", "base and champion to candidate on new"]
    measured.clear()
    evaluate(models, SETS, score_store=str(tmp_path))
    assert measured == ["base and champion to candidate on old"]


def test_benchmarks_are_measured_once_and_compared(models, loaded, tmp_path):
    questions = [
        {"question": r["messages"][0]["content"], "choices": r["choices"], "answer": r["messages"][1]["content"]}
        for r in arithmetic(8)
    ]
    write_jsonl(tmp_path / "larger.jsonl", questions)
    task = {
        "task": "larger",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "larger.jsonl"}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    (tmp_path / "larger.yaml").write_text(yaml.safe_dump(task))
    settings = {
        "benchmarks": ["larger"],
        "benchmark_folder": str(tmp_path),
        "score_store": str(tmp_path / "scores"),
        "num_examples": 0,
    }
    found = evaluate(models, SETS, **settings)
    assert len(loaded) == 3
    assert found.benchmarks.tasks == {"larger": BenchmarkTask(metric="acc", higher_is_better=True, num_samples=8)}
    assert list(found.benchmarks.results) == list(models)
    assert evaluate(models, SETS, **settings).benchmarks == found.benchmarks
    assert len(loaded) == 3
    (rule,) = [rule for rule in decide(found, GateRules()).rules if rule.subject == "larger"]
    assert rule.after == found.benchmarks.results["candidate"]["larger"].value


def test_benchmark_that_cannot_run_is_refused_before_a_model_is_looked_for(tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"task": "bad", "unsafe_code": True}))
    nowhere = {"base": "./nowhere", "candidate": "./nowhere"}
    with pytest.raises(ValueError, match="runs code"):
        evaluate(nowhere, SETS, benchmarks=["bad"], benchmark_folder=str(tmp_path))


@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        ([SETS[1], SETS[1]], "different names, got new, new"),
        ([SETS[0]], "exactly one evaluation set must have the role 'new task', got 0"),
        ([EvaluationSet("a", "task", "", SETS[0].records)], "has the role 'task'; there are new task, earlier task"),
        ([EvaluationSet("a", "new task", "a.jsonl", ())], r"a \(a.jsonl\) has no records"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(models, sets, problem):
    with pytest.raises(DataError, match=problem):
        evaluate(models, sets)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"base": "a"}, "the model 'candidate' is missing"),
        ({"base": "a", "candidate": "b", "new": "c"}, "no model 'new'"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(given, problem):
    with pytest.raises(ValueError, match=problem):
        evaluate(given, SETS)


def test_loaded_set_does_not_depend_on_the_order_of_its_lines(tmp_path):
    lines = arithmetic(20)
    write_jsonl(tmp_path / "a.jsonl", lines)
    write_jsonl(tmp_path / "b.jsonl", lines[::-1] + lines[:3])
    chosen = [
        [record.content_hash for record in load_set(str(tmp_path / name), "anchor", max_samples=7).records]
        for name in ("a.jsonl", "b.jsonl")
    ]
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 7
