"""A real MLflow server over PostgreSQL, with users: what works on a local database works there, outages included."""

import importlib.metadata
import json
import logging
import threading
import time
from pathlib import Path

import pytest

from osft.data.record_hashes import NONE
from osft.doctor.finding import Check
from osft.doctor.mlflow_server import check_mlflow
from osft.process.mlflow_errors import TrackingRefused
from osft.tracking import lineage, registry, runs
from osft.tracking.champion import promote
from osft.tracking.description import describe_version
from osft.training.callbacks import Follower
from tests.doctor.conftest import subject
from tests.tracking.evaluations import an_evaluation
from tests.tracking.rounds import a_lineage
from tests.tracking.server import START_SECONDS
from tests.tracking.test_outbox import metrics_line
from tests.tracking.waiting import wait_for

pytestmark = [pytest.mark.mlflow_server, pytest.mark.timeout(2 * START_SECONDS + 60)]


def pipeline_run(mlflow, run_id: str) -> str:
    return runs.pipeline_run(mlflow, experiment="e", pipeline_run_id=run_id, name="round", storage_root="")


@pytest.mark.parametrize("password", ["wrong-and-secret", ""])
def test_wrong_credentials_are_refused_at_once_and_told_nowhere(address, server, password, monkeypatch, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    started = time.monotonic()
    with pytest.raises(TrackingRefused, match="MLFLOW_TRACKING_PASSWORD") as refused:
        runs.client(address, "")
    assert time.monotonic() - started < 5, "it is not tried again"
    told = "".join([str(refused.value), *capfd.readouterr(), caplog.text, server.log.read_text()])
    assert "wrong-and-secret" not in told


def test_password_is_told_nowhere_while_a_step_runs(address, server, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    mlflow = runs.client(address, "")
    with runs.step_run(mlflow, pipeline_run(mlflow, "secret"), "train") as step:
        step.log_params({"mlflow_tracking_uri": address})
    recorded = str(mlflow.get_run(step.run_id).to_dictionary())
    assert server.password not in "".join([recorded, *capfd.readouterr(), caplog.text, server.log.read_text()])


def test_round_with_its_data_is_found_by_tags(address):
    mlflow = runs.client(address, "")
    parent = pipeline_run(mlflow, "found")
    with runs.step_run(mlflow, parent, "train") as step:
        step.tag_round(task="mails", model_name="m", model_version=7, outcome=runs.Outcome.REFUSED)
        step.log_dataset(name="mails", digest="ab" * 32, source="/d", num_records=3, context="training", to_parent=True)
    experiment = mlflow.get_run(parent).info.experiment_id
    for query in (
        "tags.`osft.task` = 'mails'",
        "tags.`osft.model_name` = 'm' AND tags.`osft.model_version` = '7'",
        "tags.`osft.pipeline_run_id` = 'found' AND tags.`mlflow.parentRunId` IS NULL",
    ):
        (found,) = mlflow.search_runs([experiment], filter_string=query)
        assert found.info.run_id == parent, query
    assert [given.dataset.digest for given in found.inputs.dataset_inputs] == ["ab" * 18]


def test_version_is_registered_promoted_and_read_back(address, server, tmp_path):
    mlflow = runs.client(address, "")
    parent = pipeline_run(mlflow, "versions")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    written = lineage.write(tmp_path / "lineage", a_lineage(), record_hashes=NONE, held_out=checkpoint / "config.json")
    described = describe_version(an_evaluation(anchors=200), parent_version=None)
    assert len(described) > 4800
    with runs.step_run(mlflow, parent, "register") as step:
        version = registry.register(
            mlflow,
            "m",
            checkpoint,
            run_id=step.run_id,
            description=described,
            tags={"osft.checkpoint": "1"},
            lineage=tmp_path / "lineage",
        )
    assert promote(mlflow, "m", version, storage_root=str(tmp_path), expected_champion=None) is None
    assert registry.champion(mlflow, "m") == version
    assert mlflow.get_model_version("m", str(version)).description == described, "as long as a description gets"
    assert any((server.folder / "artifacts").rglob("config.json")), "the checkpoint went to the server's artifacts"
    assert lineage.read(mlflow, "m", version) == written
    (stored,) = lineage.earlier_evaluation_sets(
        mlflow, "m", lineage.history(mlflow, "m", version), tmp_path / "sets"
    ).values()
    assert stored.read_text() == "{}"


def test_step_continues_after_its_database_was_away(address, server):
    mlflow = runs.client(address, "")
    parent = pipeline_run(mlflow, "database")
    server.stop_database()
    back = threading.Timer(8, server.start_database)
    back.start()
    try:
        with runs.step_run(mlflow, parent, "train") as step:
            step.log_metrics({"loss": 2.0})
    finally:
        back.join()
    assert mlflow.get_run(step.run_id).data.metrics["loss"] == 2.0
    assert mlflow.get_run(step.run_id).info.status == "FINISHED"


def test_metrics_of_training_while_the_server_was_away_arrive(address, server, tmp_path):
    """The server is killed in the middle of training, which ends before the server is back."""
    mlflow = runs.client(address, "")
    parent = pipeline_run(mlflow, "outage")
    file = tmp_path / "metrics.jsonl"
    with runs.step_run(mlflow, parent, "train") as step:
        with Follower(tmp_path, [step.live_metrics()], after=0), file.open("w") as lines:
            for number in range(1, 41):
                lines.write(metrics_line(number))
                lines.flush()
                if number == 10:
                    wait_for(lambda: len(mlflow.get_metric_history(step.run_id, "train/loss")) == 10)
                    server.kill()
                if number == 30:
                    time.sleep(10)  # requests are refused meanwhile
                    server.start()
                time.sleep(0.05)
        assert not server.answers(), "training did not wait for the server"
        step.log_params({"launcher": "local"})
        step.log_metrics({"steps": 40}, to_parent=True)
    assert_equal_to_the_file(mlflow, step.run_id, file)
    run = mlflow.get_run(step.run_id)
    assert (run.info.status, run.data.params, run.data.metrics["steps"]) == ("FINISHED", {"launcher": "local"}, 40)
    assert mlflow.get_run(parent).data.metrics == {"steps": 40}


def assert_equal_to_the_file(mlflow, run_id: str, file: Path) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    names = {"loss": "loss", "learning_rate": "learning_rate", "epoch": "epoch", "tokens": "tokens_seen"}
    for name, known in names.items():
        history = mlflow.get_metric_history(run_id, f"train/{known}")
        measured = sorted((metric.step, metric.value, metric.timestamp) for metric in history)
        assert measured == [(line["step"], line[name], int(line["timestamp"] * 1000)) for line in lines], name


def test_doctor_tells_the_release_and_whether_the_credentials_are_taken(address, monkeypatch):
    def asked() -> list[tuple[str, str, str]]:
        told = Check("services", "MLflow", check_mlflow).findings(subject({"mlflow_tracking_uri": address}))
        return [(one.level, one.text, one.remedy) for one in told]

    (level, release, _), access = asked()
    assert level == access[0] == "ok"
    assert f"is release {importlib.metadata.version('mlflow')}," in release
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-and-secret")
    _, (level, text, remedy) = asked()
    assert (level, "MLFLOW_TRACKING_PASSWORD" in remedy) == ("error", True)
    assert "wrong-and-secret" not in text + remedy
