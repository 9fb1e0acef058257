"""MLflow: nested runs, live metrics and model versions, on a local database and on a real server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from osft.data.record_hashes import NONE
from osft.tracking import lineage, registry, runs
from osft.tracking.live_metrics import LiveMetrics
from osft.tracking.outbox import MetricOutbox
from osft.training.callbacks import Follower
from tests.tracking.rounds import a_lineage


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def mlflow(storage):
    return runs.client("", storage)


def pipeline_run(mlflow, storage, run_id: str) -> str:
    return runs.pipeline_run(mlflow, experiment="e", pipeline_run_id=run_id, name="round", storage_root=storage)


def test_steps_are_nested_in_one_pipeline_run(mlflow, storage):
    parent = pipeline_run(mlflow, storage, "run-1")
    assert pipeline_run(mlflow, storage, "run-1") == parent, "a retried step finds the run"
    assert pipeline_run(mlflow, storage, "run-2") != parent
    with runs.step_run(mlflow, parent, "train") as step:
        step.log_params({"learning_rate": 0.1})
        step.log_metrics({"loss": 2.0, "missing": None}, to_parent=True)
    nested = mlflow.get_run(step.run_id)
    assert nested.data.tags["mlflow.parentRunId"] == parent
    assert nested.info.status == "FINISHED"
    assert nested.data.params == {"learning_rate": "0.1"}
    assert mlflow.get_run(parent).data.metrics == {"loss": 2.0}


def test_failed_step_marks_its_run_and_the_pipelines(mlflow, storage):
    parent = pipeline_run(mlflow, storage, "run-3")
    with pytest.raises(ValueError, match="bad data"), runs.step_run(mlflow, parent, "prepare") as step:
        raise ValueError("bad data")
    assert mlflow.get_run(step.run_id).info.status == "FAILED"
    assert mlflow.get_run(step.run_id).data.tags["error"] == "ValueError: bad data"
    assert mlflow.get_run(parent).info.status == "FAILED"
    with runs.step_run(mlflow, parent, "prepare"):
        assert mlflow.get_run(parent).info.status == "RUNNING", "a retry takes it up again"


def test_run_injected_by_kubeflow_is_adopted(mlflow, storage, monkeypatch):
    injected = pipeline_run(mlflow, storage, "made-by-kubeflow")
    monkeypatch.setenv("MLFLOW_RUN_ID", injected)
    assert pipeline_run(mlflow, storage, "run-4") == injected


def test_artifacts_lie_below_the_storage_root(mlflow, storage):
    parent = pipeline_run(mlflow, storage, "run-5")
    assert mlflow.get_run(parent).info.artifact_uri.startswith((storage / "mlflow" / "artifacts").as_uri())


def checkpoint(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(content)
    return folder


def metrics_line(step: int) -> str:
    numbers = {"step": step, "epoch": 0.5, "loss": 10.0 / step, "learning_rate": 0.1, "timestamp": 1.7e9 + step}
    return json.dumps(numbers | {"validation_loss": None, "checkpoints": []}) + "\n"


def follow(mlflow, run_id: str, file: Path) -> Follower:
    """What training does with the callback: reads the file while it grows."""
    live = LiveMetrics(MetricOutbox(mlflow, run_id, interval_seconds=0.05))
    return Follower(file.parent, [live], after=0, interval_seconds=0.05)


def test_live_metrics_arrive_once_and_partial_lines_wait(mlflow, storage, tmp_path):
    parent = pipeline_run(mlflow, storage, "run-7")
    file = tmp_path / "metrics.jsonl"
    with runs.step_run(mlflow, parent, "train") as step:
        with follow(mlflow, step.run_id, file), file.open("w") as lines:
            lines.write(metrics_line(1) + metrics_line(2) + metrics_line(3)[:5])
            lines.flush()
            wait_for(lambda: len(mlflow.get_metric_history(step.run_id, "train/loss")) == 2)
            lines.write(metrics_line(3)[5:])
        history = mlflow.get_metric_history(step.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 10.0), (2, 5.0), (3, 10.0 / 3)]


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def server(tmp_path):
    """A real MLflow server: its address, and functions to stop and to continue it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "a"),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=tmp_path
    )
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, "the server did not start"
        try:
            return urllib.request.urlopen(f"{address}/health", timeout=2).status == 200
        except OSError:
            return False

    try:
        wait_for(answers, seconds=240)
        yield address, process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.timeout(420)
def test_real_server_takes_runs_versions_and_metrics_after_an_outage(server, tmp_path, monkeypatch):
    address, group = server
    mlflow = runs.client(address, tmp_path)
    parent = pipeline_run(mlflow, tmp_path, "run-1")
    file = tmp_path / "metrics.jsonl"
    with runs.step_run(mlflow, parent, "train") as step:
        with follow(mlflow, step.run_id, file):
            file.write_text(metrics_line(1))
            wait_for(lambda: len(mlflow.get_metric_history(step.run_id, "train/loss")) == 1)
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            os.killpg(group, signal.SIGSTOP)  # the server goes away, training goes on
            with file.open("a") as lines:
                lines.write(metrics_line(2))
            time.sleep(5)  # a request times out and is sent again
            os.killpg(group, signal.SIGCONT)
            monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
            monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
        history = mlflow.get_metric_history(step.run_id, "train/loss")
        assert [(metric.step, metric.value) for metric in history] == [(1, 10.0), (2, 5.0)], "all, and each once"
        folder = checkpoint(tmp_path / "checkpoint", "{}")
        tags = {"osft.checkpoint": "1"}
        assert registry.register(mlflow, "m", folder, run_id=step.run_id, description="d", tags=tags) == 1
    assert registry.promote(mlflow, "m", 1, expected_champion=None) is None
    assert registry.champion(mlflow, "m") == 1
    assert mlflow.get_run(step.run_id).info.status == "FINISHED"
    assert (tmp_path / "a").exists(), "the checkpoint went to the server's artifacts"
    with pytest.raises(lineage.LineageError, match="version 1 of m has no lineage.json"):
        lineage.read(mlflow, "m", 1)
    written = lineage.write(tmp_path / "lineage", a_lineage(), record_hashes=NONE, held_out=folder / "config.json")
    with runs.step_run(mlflow, parent, "register") as step:
        beside = {"run_id": step.run_id, "lineage": tmp_path / "lineage"}
        assert registry.register(mlflow, "m", folder, description="d", tags={"osft.checkpoint": "2"}, **beside) == 2
    assert lineage.read(mlflow, "m", 2) == written
    (stored,) = lineage.earlier_evaluation_sets(mlflow, "m", 2, tmp_path / "sets").values()
    assert stored.read_text() == "{}"
