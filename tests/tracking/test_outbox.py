"""Metrics arrive while training runs, after an outage, and each once; what does not arrive is told."""

import json
import time
from pathlib import Path

import pytest

from osft.settings.training import TrainConfig
from osft.tracking import runs
from osft.tracking.live_metrics import TOKENS_SEEN, LiveMetrics
from osft.tracking.outbox import MetricOutbox
from osft.tracking.training_run import tracked
from osft.training.callbacks import Follower
from tests.tracking.rounds import new_run
from tests.tracking.waiting import wait_for


def metrics_line(step: int) -> str:
    numbers = {"step": step, "epoch": 0.5, "loss": 10.0 / step, "learning_rate": 0.1, "timestamp": 1.7e9 + step}
    return json.dumps(numbers | {"tokens": 100 * step, "validation_loss": None, "checkpoints": []}) + "\n"


def history(mlflow, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in mlflow.get_metric_history(run_id, name)]


def outbox_of(mlflow, run_id: str, **options: float) -> MetricOutbox:
    return MetricOutbox(lambda metrics: mlflow.log_batch(run_id, metrics=metrics), **options)


def follow(outbox: MetricOutbox, file: Path) -> Follower:
    """What training does with the callback: reads the file while it grows."""
    return Follower(file.parent, [LiveMetrics(outbox)], after=0, interval_seconds=0.05)


def test_live_metrics_arrive_once_and_partial_lines_wait(mlflow, tmp_path):
    run_id = new_run(mlflow, tmp_path)
    outbox = outbox_of(mlflow, run_id, interval_seconds=0.05)
    file = tmp_path / "metrics.jsonl"
    with follow(outbox, file), file.open("w") as lines:
        lines.write(metrics_line(1) + metrics_line(2) + metrics_line(3)[:5])
        lines.flush()
        wait_for(lambda: len(history(mlflow, run_id, "train/loss")) == 2)
        lines.write(metrics_line(3)[5:])
    assert outbox.close(30) == 0
    assert history(mlflow, run_id, "train/loss") == [(1, 10.0), (2, 5.0), (3, 10.0 / 3)]


def test_every_step_has_the_tokens_seen_as_its_other_axis(mlflow, tmp_path):
    run_id = new_run(mlflow, tmp_path)
    outbox = outbox_of(mlflow, run_id)
    file = tmp_path / "metrics.jsonl"
    file.write_text(metrics_line(1) + metrics_line(2))
    with follow(outbox, file):
        pass
    outbox.close(30)
    assert history(mlflow, run_id, TOKENS_SEEN) == [(1, 100.0), (2, 200.0)]


def test_metrics_of_an_outage_arrive_after_it(leaving, tmp_path):
    run_id = new_run(leaving, tmp_path)
    outbox = outbox_of(leaving, run_id, interval_seconds=0.02)
    leaving.away = True
    for step in range(1, 2501):  # three of MLflow's batches
        outbox.put("train/loss", 1.0 / step, step=step, seconds=1.7e9 + step)
    wait_for(lambda: outbox.problem != "")
    leaving.away = False
    assert outbox.close(30) == 0
    assert history(leaving, run_id, "train/loss") == [(step, 1.0 / step) for step in range(1, 2501)]


def test_batch_whose_answer_was_lost_is_kept_once(leaving, tmp_path):
    run_id = new_run(leaving, tmp_path)
    outbox = outbox_of(leaving, run_id, interval_seconds=0.02)
    taken = leaving.log_batch

    def lose_the_answer(*arguments, **named):
        taken(*arguments, **named)
        leaving.log_batch = taken
        raise ConnectionResetError("the answer is lost")

    leaving.log_batch = lose_the_answer
    outbox.put("train/loss", 2.0, step=1, seconds=1.7e9)
    assert outbox.close(30) == 0
    assert history(leaving, run_id, "train/loss") == [(1, 2.0)]


def test_wait_for_a_server_that_stays_away_is_bounded_and_counts_what_is_left(leaving, tmp_path):
    outbox = outbox_of(leaving, new_run(leaving, tmp_path), interval_seconds=0.02)
    leaving.away = True
    outbox.put("train/loss", 2.0, step=1, seconds=1.7e9)
    started = time.monotonic()
    assert outbox.close(0.3) == 1
    assert time.monotonic() - started < 2


def test_metrics_of_a_deleted_run_are_not_sent_again_and_again(leaving, tmp_path):
    run_id = new_run(leaving, tmp_path)
    leaving.delete_run(run_id)
    outbox = outbox_of(leaving, run_id, interval_seconds=0.02)
    outbox.put("train/loss", 2.0, step=1, seconds=1.7e9)
    wait_for(lambda: "active" in outbox.problem)
    time.sleep(0.3)
    started = time.monotonic()
    assert outbox.close(30) == 1
    assert time.monotonic() - started < 5, "it does not wait for what cannot come"
    assert leaving.batches == 1


def test_step_whose_last_metrics_are_not_sent_fails(leaving, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    monkeypatch.setenv("OSFT_MLFLOW_WAIT_SECONDS", "0.2")
    parent = new_run(leaving, tmp_path)
    with pytest.raises(ConnectionError, match=r"1 metrics .* could not be sent within 0.2 s"):  # noqa: SIM117
        with runs.step_run(leaving, parent, "train") as step:
            leaving.away = True
            step.outbox.put("train/loss", 2.0, step=1, seconds=1.7e9)


def test_training_that_ended_well_is_not_failed_by_a_server_that_is_away(leaving, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OSFT_MLFLOW_WAIT_SECONDS", "0.2")
    monkeypatch.setattr(runs, "client", lambda *_, **__: leaving)
    config = TrainConfig.from_parameters(
        {
            "model_path": "m",
            "data_path": "d",
            "unfreeze_rank_ratio": 0.25,
            "effective_batch_size": 1,
            "max_tokens_per_gpu": 2,
            "max_seq_len": 2,
            "learning_rate": 0.1,
            "ckpt_output_dir": str(tmp_path),
            "mlflow_tracking_uri": leaving.tracking_uri,
        }
    )
    with tracked(config):
        leaving.away = True
    assert f"All metrics are in metrics.jsonl in {tmp_path}" in capsys.readouterr().out
