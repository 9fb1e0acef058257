"""The whole pipeline from the compiled YAML, step by step in processes, and what it refuses before the first one."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from docs.console_picture import draw
from osft.models.training_summary import TrainingSummary
from osft.tracking import runs
from osft.training import TrainResult
from pipelines.run_local import YAML, app, without_retries
from tests.conftest import arithmetic, write_jsonl

pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parents[2]


def run_local(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pipelines.run_local", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def arguments(storage: Path, model_folder: Path, chats: Path) -> list[str]:
    text = write_jsonl(storage / "prose.jsonl", [{"text": f"a plain text, number {i}"} for i in range(20)])
    task = write_jsonl(storage / "other-numbers.jsonl", arithmetic(30, seed=4))
    settings = {
        "anchor_uris": json.dumps([str(text), str(task)]),
        "effective_batch_size": 8,
        "learning_rate": 0.02,
        "stiffness": 10.0,  # in a random model no direction is free of use
        "gate": json.dumps({"max_drift": None}),
        "model_name": "tiny",
        "nproc_per_node": 2,
    }
    given = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return ["--model", str(model_folder), "--data", str(chats), "--storage", str(storage), *given]


@pytest.fixture(scope="module")
def promoted(arguments: list[str]) -> subprocess.CompletedProcess:
    return run_local(*arguments)


def test_run_ends_with_table_version_and_report(promoted, storage):
    assert promoted.returncode == 0, promoted.stdout[-5000:] + promoted.stderr[-5000:]
    end = promoted.stdout[promoted.stdout.rindex("base -> candidate") :]
    for word in (
        "larger-number",
        "new task",
        "prose",
        "other-numbers",
        "anchor",
        "drift:   prose ",
        "gate:    passed",
        "tiny 1",
    ):
        assert word in end
    (folder,) = (storage / "rounds").iterdir()
    assert str(folder / "report.html") in end
    evaluation = json.loads((folder / "evaluation.json").read_text())
    task = {model: scores["larger-number"]["loss"] for model, scores in evaluation["results"].items()}
    assert f"{task['base']:.3f} -> {task['candidate']:.3f}" in end
    assert task["candidate"] < 0.85 * task["base"]
    trained = TrainResult(folder / "train", TrainingSummary.read(folder / "train" / "training.json"))
    assert AutoModelForCausalLM.from_pretrained(trained.checkpoint).num_parameters() > 0


def test_run_shows_each_step_with_its_result_and_leaves_the_rest_in_its_log(promoted, storage):
    (log,) = (storage / "logs").iterdir()
    first, *lines = promoted.stdout[: promoted.stdout.index("base -> candidate")].splitlines()
    assert first == f"log:     {log}"
    ended = [re.fullmatch(r"(\S+): done in (?:\d+m)?\d+s: (.+)", line) for line in lines if "done in" in line]
    results = {line[1]: line[2] for line in ended}
    (folder,) = (storage / "rounds").iterdir()
    task = json.loads((folder / "evaluation.json").read_text())["results"]
    before, after = (task[model]["larger-number"]["loss"] for model in ("base", "candidate"))
    losses = [json.loads(line)["loss"] for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    assert results == {
        "resolve-round": "120 of 120 records are new; the base model learns larger-number",
        "prepare-data": results["prepare-data"],
        "precompute-svd": "computed 14, reused 0 of 14 weights",
        "train-osft": f"{len(losses)} steps, training loss {losses[0]:.4f} -> {losses[-1]:.4f}",
        "evaluate-model": f"gate: passed; loss on larger-number {before:.3f} -> {after:.3f}",
        "register-model": "tiny version 1 is the candidate",
        "promote-model": "tiny version 1 is the champion",
    }
    assert re.fullmatch(r"\d+ training samples \(\d+ tokens, \d+ with loss\), \d+ held out", results["prepare-data"])
    for noise in ("KFP Executor", "parameterValues", "RuntimeWarning", "it/s]", "\x1b", "\r"):
        assert noise not in promoted.stdout + promoted.stderr
    for noise in ("Got executor_input", "RuntimeWarning", "token/s]"):
        assert noise in log.read_text()


def test_picture_of_the_console_has_the_steps_and_what_was_found(promoted, storage, tmp_path):
    (log,) = (storage / "logs").iterdir()
    draw(log, tmp_path / "run.svg")
    text = html.unescape(re.sub("<[^>]+>", "", (tmp_path / "run.svg").read_text()))
    text = " ".join(text.split())
    for words in ("promote-model tiny version 1 is the champion", "nats per token (KL)", "gate: passed", "make run"):
        assert words in text


def test_pipelines_artifacts_hold_metrics_and_report(promoted, storage):
    (pipeline,) = (storage / "kfp").iterdir()
    report = (pipeline / "evaluate-model" / "report").read_text()
    assert report.lstrip().lower().startswith("<!doctype html>")
    outputs = json.loads((pipeline / "evaluate-model" / "executor_output.json").read_text())
    (metrics,) = outputs["artifacts"]["metrics"]["artifacts"]
    assert "candidate/larger-number/loss" in metrics["metadata"]


def test_mlflow_has_a_run_a_step_and_a_champion(promoted, storage):
    mlflow = runs.client("", storage)
    experiment = mlflow.get_experiment_by_name("osft-continual-learning")
    found = mlflow.search_runs([experiment.experiment_id])
    (first,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    steps = {run.info.run_name: run for run in found if run.data.tags.get("mlflow.parentRunId") == first.info.run_id}
    learning = {"prepare_data", "precompute_svd", "train_osft", "evaluate_model", "register_model", "promote_model"}
    assert steps.keys() == {"resolve_round"} | learning
    assert {run.info.status for run in (first, *steps.values())} == {"FINISHED"}
    losses = mlflow.get_metric_history(steps["train_osft"].info.run_id, "train/loss")
    assert len(losses) == steps["train_osft"].data.metrics["steps"]
    assert [metric.step for metric in losses] == list(range(1, len(losses) + 1))
    artifacts = {artifact.path for artifact in mlflow.list_artifacts(first.info.run_id)}
    assert {"report.html", "evaluation.json"} <= artifacts
    champion = mlflow.get_model_version_by_alias("tiny", "champion")
    assert int(champion.version) == 1
    folder = mlflow.download_artifacts(champion.run_id, "model")
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0


@pytest.mark.slow
def test_second_run_on_the_same_data_has_nothing_to_learn_and_one_with_more_trains_the_champion(
    promoted, arguments, storage, chats, tmp_path
):
    again = run_local(*arguments)
    assert again.returncode == 0, again.stdout[-5000:] + again.stderr[-5000:]
    assert "nothing to learn" in again.stdout.splitlines()[-1]
    steps = [line for line in again.stdout.splitlines() if line.endswith(": started")]
    assert steps == ["resolve-round: started"], "what there is no need for is not shown"
    mlflow = runs.client("", storage)
    assert len(mlflow.search_model_versions("name = 'tiny'")) == 1
    more = shutil.copytree(chats.parent, tmp_path / "inbox")
    write_jsonl(more / "more-numbers.jsonl", arithmetic(60, seed=9))
    refused = run_local(*arguments, "--data", str(more), "--set", 'gate={"min_gain": {"bound": 0.99}}')
    assert refused.returncode == 0, refused.stdout[-5000:] + refused.stderr[-5000:]
    end = refused.stdout[refused.stdout.rindex("champion -> candidate") :]
    for words in ("gate:    refused", "must be at least 99.00 %", "larger-number", "earlier task", "tiny 2"):
        assert words in end
    assert int(mlflow.get_model_version_by_alias("tiny", "champion").version) == 1
    assert int(mlflow.get_model_version_by_alias("tiny", "challenger").version) == 2


BAD_DATA = {
    "malformed.jsonl": ('{"messages": [\n', "malformed.jsonl:1: not valid JSON"),
    "silent.jsonl": ('{"messages": [{"role": "user", "content": "a"}]}', "silent.jsonl:1: there is no assistant"),
    "empty.jsonl": ("", "empty.jsonl holds no record"),
}
BAD_SETTINGS = {
    "model_name=team/model": "model_name 'team/model' holds '/'",
    "model_name=": "model_name is empty",
    "mlflow_tracking_uri=localhost:5000": "has no scheme. Give http://localhost:5000",
    'anchor_uris=["~no-such-user/x"]': "knows no home folder of no-such-user",
    "base_model=$HOME/model": "$HOME is not replaced by what it stands for",
    "unfreeze_rank_ratio=0": "nothing to train",
    "unfreeze_rank_ratio=1.5": "unfreeze_rank_ratio must be between 0.0 and 1.0, got 1.5",
    "unfreeze_rank_ratio=0.001": "leaves nothing to train in a weight of shape",
    "learning_rat=1": "unknown parameter 'learning_rat'. Did you mean 'learning_rate'?",
    'target_patterns=["qkv"]': "'qkv' matches no linear layer",
    'gate={"max_drift": {"bound": -1}}': "gate: max_drift: bound must be at least 0, got -1",
    'anchor_uris=["example:larger-number"]': "two data sets are called 'larger-number'",
    'anchor_uris=["missing.jsonl"]': "missing.jsonl does not exist",
}


def assert_refused(problem: str, storage: Path, *given: str) -> None:
    result = CliRunner().invoke(app, [*given, "--storage", str(storage)], env={"COLUMNS": "500"})
    assert result.exit_code == 2
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert problem in error
    assert not storage.is_dir(), "nothing is left behind"


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused_before_a_step_starts(name, tmp_path, model_folder):
    content, problem = BAD_DATA[name]
    (tmp_path / name).write_text(content)
    assert_refused(problem, tmp_path / "storage", "--model", str(model_folder), "--data", str(tmp_path / name))


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_bad_setting_is_refused_before_a_step_starts(setting, tmp_path, model_folder, chats):
    given = ("--model", str(model_folder), "--data", str(chats), "--set", setting)
    assert_refused(BAD_SETTINGS[setting], tmp_path / "storage", *given)


def test_only_the_retries_are_left_out_of_what_the_cluster_would_run():
    def stripped(value):
        if isinstance(value, dict):
            return {key: stripped(part) for key, part in value.items() if key != "retryPolicy"}
        return [stripped(part) for part in value] if isinstance(value, list) else value

    here = list(yaml.safe_load_all(without_retries(YAML.read_text())))
    assert "retryPolicy" not in str(here)
    assert here == stripped(list(yaml.safe_load_all(YAML.read_text())))


def test_missing_model_and_data_and_a_storage_that_is_a_file_are_refused(tmp_path, model_folder, chats):
    storage, missing = tmp_path / "storage", str(tmp_path / "missing")
    assert_refused("is a file, where a folder is needed", chats, "--model", str(model_folder), "--data", str(chats))
    assert_refused("missing is not a model folder", storage, "--model", missing, "--data", str(chats))
    assert_refused("missing does not exist", storage, "--model", str(model_folder), "--data", missing)


def test_dry_run_prints_the_parameters_and_runs_nothing(model_folder, chats, tmp_path):
    storage = tmp_path / "storage"
    given = ["--model", str(model_folder), "--data", str(chats), "--storage", str(storage), "--dry-run"]
    result = CliRunner().invoke(app, [*given, "--set", "num_epochs=3"])
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed["num_epochs"] == 3
    assert printed["base_model"] == str(model_folder)
    assert not storage.exists()
