"""Benchmarks are the harness's, on local data, with the network off; what cannot be run is refused before."""

import math
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from osft.evaluation.benchmarks import Benchmarks
from osft.evaluation.record import BenchmarkTask
from tests.conftest import arithmetic, byte_tokenizer, tiny_llama, write_jsonl

QUESTIONS = 12
TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metadata": {"version": 1.0},
}


def questions(seed: int) -> list[dict]:
    return [
        {"question": r["messages"][0]["content"], "choices": r["choices"], "answer": r["messages"][1]["content"]}
        for r in arithmetic(QUESTIONS, seed)
    ]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks, a group of both with an aggregate and one without, and a tag."""
    for seed, name in enumerate(("larger", "other")):
        write_jsonl(tmp_path / f"{name}.jsonl", questions(seed))
        data = {"data_files": {"test": f"{name}.jsonl"}, "cache_dir": str(tmp_path / "cache")}
        write_task(tmp_path, name, dataset_kwargs=data, tag="numbers_tag")
    members = {"group": "numbers", "task": ["larger", "other"]}
    write_yaml(tmp_path, members | {"aggregate_metric_list": [{"metric": "acc_norm", "weight_by_size": True}]})
    write_yaml(tmp_path, members | {"group": "plain"})
    return tmp_path


def write_yaml(folder: Path, content: dict) -> None:
    (folder / f"{content.get('group') or content['task']}.yaml").write_text(yaml.safe_dump(content))


def write_task(folder: Path, name: str, **changes: object) -> None:
    write_yaml(folder, TASK | {"task": name} | changes)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=3).eval()


def likelihood(model, tokenizer, question: str, answer: str) -> float:
    """Log-likelihood of an answer, with transformers' own loss."""
    context, whole = (tokenizer(text)["input_ids"] for text in (question, f"{question} {answer}"))
    labels = [-100] * len(context) + whole[len(context) :]
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([whole]), labels=torch.tensor([labels])).loss
    return -loss.item() * (len(whole) - len(context))


def accuracy(model, tokenizer, *, seed: int, by_length: bool = False) -> float:
    correct = 0
    for doc in questions(seed):
        scores = {
            choice: likelihood(model, tokenizer, doc["question"], choice) / (len(choice) if by_length else 1)
            for choice in doc["choices"]
        }
        correct += max(scores, key=scores.__getitem__) == doc["answer"]
    return correct / QUESTIONS


def test_result_is_the_accuracy_of_the_most_probable_answer(folder, model, tokenizer):
    benchmarks = Benchmarks(["larger"], folder=str(folder))
    assert benchmarks.described == {"larger": BenchmarkTask(metric="acc", higher_is_better=True, num_samples=QUESTIONS)}
    found = benchmarks.run(model, byte_tokenizer())["larger"]
    expected = accuracy(model, tokenizer, seed=0)
    assert 0 < expected < 1
    assert found.value == expected
    assert found.stderr == pytest.approx(math.sqrt(expected * (1 - expected) / (QUESTIONS - 1)))


def test_group_has_its_aggregate_and_one_without_its_tasks(folder, model, tokenizer):
    benchmarks = Benchmarks(["numbers"], folder=str(folder))
    described = {"metric": "acc_norm", "higher_is_better": True, "num_samples": 2 * QUESTIONS}
    assert benchmarks.described == {"numbers": BenchmarkTask(**described)}
    expected = [accuracy(model, tokenizer, seed=seed, by_length=True) for seed in (0, 1)]
    assert benchmarks.run(model, byte_tokenizer())["numbers"].value == pytest.approx(sum(expected) / 2)
    assert Benchmarks(["plain"], folder=str(folder)).names == ["larger", "other"]
    assert Benchmarks(["numbers_tag"], folder=str(folder)).names == ["larger", "other"]


def test_only_the_first_questions_are_asked(folder, model):
    benchmarks = Benchmarks(["larger"], folder=str(folder), max_samples=3)
    assert benchmarks.described["larger"].num_samples == 3
    assert benchmarks.run(model, byte_tokenizer())["larger"].value in (0.0, 1 / 3, 2 / 3, 1.0)


def test_content_hash_is_of_what_is_asked_and_not_of_where_it_lies(folder, tmp_path_factory):
    def content_hash(folder: Path, **settings: int) -> str:
        return Benchmarks(["larger"], folder=str(folder), **settings).content_hash

    before = content_hash(folder)
    moved = tmp_path_factory.mktemp("elsewhere") / "tasks"
    moved.mkdir()
    write_jsonl(moved / "larger.jsonl", questions(0))
    data = {"data_files": {"test": "larger.jsonl"}, "cache_dir": str(moved / "cache")}
    write_task(moved, "larger", dataset_kwargs=data)
    assert content_hash(moved) == before
    assert content_hash(moved, max_samples=3) != before
    write_task(moved, "larger", dataset_kwargs=data, target_delimiter="")
    assert content_hash(moved) != before
    write_task(moved, "larger", dataset_kwargs=data)
    write_jsonl(moved / "larger.jsonl", questions(7))
    assert content_hash(moved) != before


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"unsafe_code": True}, "benchmark bad runs code that the model wrote"),
        ({"metric_list": [{"metric": "code_eval"}]}, "metric 'code_eval', whose code would be downloaded"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "metric 'acc', whose code would be downloaded"),
        ({"class": "some.Task"}, "is a Python class"),
        ({"doc_to_image": "image"}, "shows more than text"),
        ({"dataset_path": "some/dataset"}, "benchmark bad cannot be set up.*local data_files"),
    ],
)
@pytest.mark.parametrize("name", ["bad", "bads", "bad_tag"])
def test_task_that_must_not_or_cannot_run_is_refused_by_every_name(folder, name, changes, problem):
    write_task(folder, "bad", tag="bad_tag", **changes)
    write_yaml(folder, {"group": "bads", "task": ["larger", "bad"]})
    with pytest.raises(ValueError, match=problem.replace("benchmark bad cannot", "benchmark bad.* cannot")):
        Benchmarks([name], folder=str(folder))


def test_metric_without_a_direction_is_refused(folder):
    (folder / "metrics.py").write_text("def mine(items):\n    return 1.0\n")
    text = yaml.safe_dump(TASK | {"task": "bad", "dataset_kwargs": {"data_files": {"test": "larger.jsonl"}}})
    (folder / "bad.yaml").write_text(text + "metric_list:\n- metric: !function metrics.mine\n  aggregation: mean\n")
    with pytest.raises(ValueError, match="does not say whether a higher mine is better"):
        Benchmarks(["bad"], folder=str(folder))


def test_unknown_name_is_refused_with_the_nearest(folder, monkeypatch):
    from lm_eval.tasks import TaskManager

    # The harness's own thousands of tasks take seconds to read.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    with pytest.raises(ValueError, match="unknown benchmark 'lager'. Did you mean 'larger'"):
        Benchmarks(["other", "lager"], folder=str(folder))
    write_yaml(folder, {"group": "holed", "task": ["larger", "lager"]})
    with pytest.raises(ValueError, match="unknown benchmark 'lager', which one of the groups names"):
        Benchmarks(["holed"], folder=str(folder))


@pytest.mark.slow  # reads all of the harness's tasks
def test_names_of_the_harness_are_known(folder):
    with pytest.raises(ValueError, match="Did you mean 'hellaswag'"):
        Benchmarks(["larger", "hellaswagg"], folder=str(folder))
    with pytest.raises(ValueError, match="benchmark humaneval runs code"):
        Benchmarks(["larger", "humaneval"], folder=str(folder))


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        Benchmarks(["larger"], folder=str(tmp_path / "nowhere"))


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'osft[eval]'")):
        Benchmarks(["larger"])
