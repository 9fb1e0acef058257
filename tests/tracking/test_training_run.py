"""Training does not wait for a tracking server: one that is down at the start gets everything when it comes back.

The server is MLflow's own, in a thread of this process, on the database that all tests share.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from osft.settings.training import TrainConfig
from osft.tracking import training_run
from osft.tracking.training_run import tracked
from osft.training.callbacks import TrainingContext
from tests.tracking.waiting import wait_for


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def answering(mlflow, monkeypatch):
    """`with answering(port): …`: MLflow answers there."""
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", mlflow.tracking_uri)
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(Path(mlflow.tracking_uri).parent))

    @contextmanager
    def run(port: int) -> Iterator[None]:
        from mlflow.server import app
        from werkzeug.serving import make_server

        server = make_server("127.0.0.1", port, app, threaded=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    return run


@pytest.fixture
def config(tmp_path, port, request, monkeypatch) -> TrainConfig:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    monkeypatch.setenv("OSFT_MLFLOW_WAIT_SECONDS", "0.3")
    monkeypatch.setattr(training_run.MetricOutbox.__init__, "__kwdefaults__", {"interval_seconds": 0.05})
    return TrainConfig(
        model_path="m",
        data_path="d",
        unfreeze_rank_ratio=0.25,
        effective_batch_size=1,
        max_tokens_per_gpu=2,
        max_seq_len=2,
        learning_rate=0.1,
        ckpt_output_dir=str(tmp_path / "out"),
        mlflow_tracking_uri=f"http://127.0.0.1:{port}",
        mlflow_experiment_name=request.node.name,
    )


def step(callbacks, number: int) -> None:
    line = {"step": number, "loss": 1.0 / number, "timestamp": 1.7e9 + number}
    for callback in callbacks:
        callback.on_step_end(TrainingContext(output_dir=Path(), step=number, metrics=line))


def the_run(mlflow, config):
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name(config.mlflow_experiment_name).experiment_id])
    return run


def arrived(mlflow, config) -> int:
    """How many losses the server has."""
    experiment = mlflow.get_experiment_by_name(config.mlflow_experiment_name)
    found = mlflow.search_runs([experiment.experiment_id]) if experiment else []
    return sum(len(losses(mlflow, run)) for run in found)


def losses(mlflow, run) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in mlflow.get_metric_history(run.info.run_id, "train/loss")]


def test_server_that_is_down_at_the_start_gets_the_whole_run_when_it_is_back(mlflow, config, port, answering, capsys):
    began = time.time()
    with tracked(config) as callbacks:
        assert time.time() - began < 2, "it is not waited for"
        for number in (1, 2):
            step(callbacks, number)
        with answering(port):
            wait_for(lambda: arrived(mlflow, config) == 2)
        step(callbacks, 3)  # away again
        time.sleep(0.2)
        with answering(port):
            wait_for(lambda: arrived(mlflow, config) == 3)
            step(callbacks, 4)
            wait_for(lambda: arrived(mlflow, config) == 4)
    run = the_run(mlflow, config)
    assert losses(mlflow, run) == [(number, 1.0 / number) for number in (1, 2, 3, 4)]
    assert run.data.params["learning_rate"] == "0.1"
    assert abs(run.info.start_time / 1000 - began) < 5, "when training began"
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mlflow:")]
    assert "does not answer" in told[0]
    assert "Training continues" in told[0]


def test_run_whose_server_came_back_is_finished(mlflow, config, port, answering):
    with answering(port):  # noqa: SIM117 (the server outlives the run)
        with tracked(config) as callbacks:
            step(callbacks, 1)
    assert the_run(mlflow, config).info.status == "FINISHED"


def test_server_that_never_answers_costs_seconds_and_is_told_of_in_two_lines(config, capfd):
    began = time.time()
    with tracked(config) as callbacks:
        step(callbacks, 1)
    assert time.time() - began < 3
    out, err = capfd.readouterr()
    first, last = (line for line in (out + err).splitlines() if line)
    assert first.startswith("mlflow: the MLflow server http://127.0.0.1")
    assert last.endswith(f"All metrics are in metrics.jsonl in {config.ckpt_output_dir}")


def test_error_of_training_is_raised_while_the_server_is_down(config):
    with pytest.raises(KeyError, match="a bug"), tracked(config):
        raise KeyError("a bug")


def test_experiment_that_was_deleted_ends_the_call_before_training(mlflow, config, port, answering):
    mlflow.delete_experiment(mlflow.create_experiment(config.mlflow_experiment_name))
    with answering(port), pytest.raises(ValueError, match="was deleted. Restore it"), tracked(config):
        pytest.fail("training began")


def test_experiment_that_is_found_deleted_when_the_server_is_back_ends_nothing(mlflow, config, port, answering, capsys):
    mlflow.delete_experiment(mlflow.create_experiment(config.mlflow_experiment_name))
    with tracked(config) as callbacks:
        step(callbacks, 1)
        with answering(port):
            time.sleep(0.5)
    assert "1 metrics were not sent: the MLflow experiment" in capsys.readouterr().out
