"""MLflow: rounds and their steps as nested runs, what finds them, and what they carry."""

import json
from typing import Any

import pytest

from osft.tracking import runs
from osft.tracking.runs import Outcome

PARENT = "mlflow.parentRunId"


@pytest.fixture
def new_round(mlflow, registry_root):
    """`new_round("id")`: the id of the MLflow run of a pipeline run."""

    def make(pipeline_run_id: str, client: Any = mlflow) -> str:
        return runs.pipeline_run(
            client, experiment="e", pipeline_run_id=pipeline_run_id, name="round", storage_root=registry_root
        )

    return make


def found(mlflow, filter_string: str) -> set[str]:
    experiment = mlflow.get_experiment_by_name("e").experiment_id
    return {run.info.run_id for run in mlflow.search_runs([experiment], filter_string=filter_string)}


def test_steps_are_nested_in_one_pipeline_run(mlflow, new_round):
    parent = new_round("nested")
    assert new_round("nested") == parent, "a retried step finds the run"
    assert new_round("another") != parent
    with runs.step_run(mlflow, parent, "train") as step:
        step.log_params({"learning_rate": 0.1})
        step.log_metrics({"loss": 2.0, "missing": None}, to_parent=True)
    nested = mlflow.get_run(step.run_id)
    assert nested.data.tags[PARENT] == parent
    assert nested.info.status == "FINISHED"
    assert nested.data.params == {"learning_rate": "0.1"}
    assert mlflow.get_run(parent).data.metrics == {"loss": 2.0}


def test_failed_step_marks_its_run_and_the_pipelines(mlflow, new_round):
    parent = new_round("failing")
    with pytest.raises(ValueError, match="bad data"), runs.step_run(mlflow, parent, "prepare") as step:
        raise ValueError("bad data")
    assert mlflow.get_run(step.run_id).info.status == "FAILED"
    assert mlflow.get_run(step.run_id).data.tags["error"] == "ValueError: bad data"
    assert mlflow.get_run(parent).info.status == "FAILED"
    assert found(mlflow, "tags.`osft.outcome` = 'failed'") == {parent}
    with runs.step_run(mlflow, parent, "prepare"):
        retried = mlflow.get_run(parent)
    assert retried.info.status == "RUNNING", "a retry takes it up again"
    assert "osft.outcome" not in retried.data.tags


def test_run_that_a_killed_attempt_left_is_ended_by_the_next_attempt_of_that_step(mlflow, new_round):
    parent = new_round("killed")
    experiment = mlflow.get_run(parent).info.experiment_id
    begun = {
        (round, step): mlflow.create_run(experiment, run_name=step, tags={PARENT: round}).info.run_id
        for round, step in ((parent, "train"), (parent, "evaluate"), (new_round("beside"), "train"))
    }
    with runs.step_run(mlflow, parent, "train") as retried:
        states = {key: mlflow.get_run(run).info.status for key, run in begun.items()}
        assert mlflow.get_run(retried.run_id).info.status == "RUNNING"
    killed = begun.pop((parent, "train"))
    assert states.pop((parent, "train")) == "KILLED"
    assert "killed" in mlflow.get_run(killed).data.tags["error"]
    assert set(states.values()) == {"RUNNING"}, "what others do is not touched"
    assert mlflow.get_run(parent).info.status == "RUNNING"


def test_step_fails_with_its_own_error_when_the_server_is_away(leaving, new_round, monkeypatch, capsys):
    monkeypatch.setenv("OSFT_MLFLOW_WAIT_SECONDS", "0.2")
    parent = new_round("failing-away")
    with pytest.raises(ValueError, match="bad data"), runs.step_run(leaving, parent, "prepare"):
        leaving.away = True
        raise ValueError("bad data")
    assert "could not be recorded" in capsys.readouterr().out


def test_runs_made_by_kubeflow_are_adopted(mlflow, new_round, monkeypatch):
    parent = new_round("made-by-kubeflow")
    experiment = mlflow.get_run(parent).info.experiment_id
    task = mlflow.create_run(experiment, tags={PARENT: parent}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", task)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.tracking_uri)
    assert new_round("kfp-1") == parent, "MLFLOW_RUN_ID is the task's run, the round is its parent"
    with runs.step_run(mlflow, parent, "train") as step:
        pass
    assert step.run_id == task
    assert mlflow.get_run(task).info.status == "FINISHED"
    assert found(mlflow, "tags.`osft.pipeline_run_id` = 'kfp-1'") == {parent, task}


def test_injected_run_without_a_parent_is_the_round(mlflow, new_round, monkeypatch):
    injected = new_round("only-one-run")
    monkeypatch.setenv("MLFLOW_RUN_ID", injected)
    assert new_round("kfp-2") == injected


def test_injected_run_of_another_server_is_not_adopted(mlflow, new_round, monkeypatch):
    injected = new_round("elsewhere")
    monkeypatch.setenv("MLFLOW_RUN_ID", injected)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert new_round("kfp-3") != injected


def test_setting_of_an_earlier_attempt_keeps_its_value(mlflow, new_round):
    with runs.step_run(mlflow, new_round("settings"), "train") as step:
        step.log_params({f"setting_{number}": number for number in range(150)})  # past MLflow's 100 a request
        step.log_params({"setting_0": "changed", "new": 1})
    params = mlflow.get_run(step.run_id).data.params
    assert len(params) == 151
    assert params["setting_0"] == "0"


def test_round_is_found_by_task_version_and_kubeflow_run(mlflow, new_round):
    parent, other = new_round("kfp-4"), new_round("kfp-5")
    with runs.step_run(mlflow, parent, "promote") as step:
        step.tag_round(task="mails", model_name="m", model_version=3, parent_version=2)
        step.tag_round(decision="promote", outcome=Outcome.PROMOTED)
    with runs.step_run(mlflow, other, "resolve") as resolving:
        resolving.tag_round(task="mails", outcome=Outcome.NOTHING_TO_LEARN)
    assert found(mlflow, "tags.`osft.task` = 'mails'") == {parent, other}
    assert found(mlflow, "tags.`osft.model_name` = 'm' AND tags.`osft.model_version` = '3'") == {parent}
    assert found(mlflow, "tags.`osft.pipeline_run_id` = 'kfp-4'") == {parent, step.run_id}
    assert found(mlflow, f"tags.`osft.pipeline_run_id` = 'kfp-4' AND tags.`{PARENT}` IS NULL") == {parent}
    assert found(mlflow, "tags.`osft.outcome` = 'nothing to learn'") == {other}


def test_outcome_of_a_round_outlives_its_later_steps(mlflow, new_round):
    parent = new_round("refused, then registered")
    with runs.step_run(mlflow, parent, "evaluate") as step:
        step.tag_round(outcome=Outcome.REFUSED)
    with runs.step_run(mlflow, parent, "register"):
        pass
    assert mlflow.get_run(parent).data.tags["osft.outcome"] == "refused"


def log_dataset(mlflow, new_round, source: str) -> tuple[Any, Any]:
    """A data set logged to a step and its round. Returns what both have."""
    parent = new_round(f"data of {source}".replace("'", ""))
    with runs.step_run(mlflow, parent, "train") as step:
        step.log_dataset(
            name="mails", digest="ab" * 32, source=source, num_records=12, context="training", to_parent=True
        )
    (given,) = mlflow.get_run(step.run_id).inputs.dataset_inputs
    (of_round,) = mlflow.get_run(parent).inputs.dataset_inputs
    return given, of_round


def test_dataset_is_an_input_of_step_and_round(mlflow, new_round):
    given, of_round = log_dataset(mlflow, new_round, "s3://bucket/mails.jsonl")
    assert given.dataset == of_round.dataset
    assert (given.dataset.name, given.dataset.digest) == ("mails", "ab" * 18)
    assert json.loads(given.dataset.profile) == {"num_records": 12, "digest": "ab" * 32}
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


@pytest.mark.parametrize(
    ("source", "kind", "stored"),
    [
        ("/data/mails.jsonl", "local", {"uri": "/data/mails.jsonl"}),
        ("s3://bucket/mails.jsonl", "s3", {"uri": "s3://bucket/mails.jsonl"}),
        ("https://me:secret@host/mails?signature=secret", "http", {"url": "https://host/mails"}),
        ("org/mails@v1", "hugging_face", {"path": "org/mails", "revision": "v1"}),
    ],
)
def test_source_of_a_dataset_is_one_that_mlflow_reads_and_without_secrets(source, kind, stored):
    from mlflow.data import get_source

    from osft.tracking.datasets import dataset_input

    given = dataset_input(name="d", digest="0" * 64, source=source, num_records=1, context="evaluation").dataset
    assert (given.source_type, json.loads(given.source)) == (kind, stored)
    assert get_source(given)._get_source_type() == kind


def test_artifacts_lie_below_the_storage_root(mlflow, new_round, registry_root):
    assert mlflow.get_run(new_round("artifacts")).info.artifact_uri.startswith(
        (registry_root / "mlflow" / "artifacts").as_uri()
    )


def test_address_with_a_password_is_refused_without_telling_it(tmp_path):
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        runs.client("https://me:hidden@host", tmp_path)
    assert "hidden" not in str(refused.value)
