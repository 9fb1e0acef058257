"""The machine is measured while a step runs, and never at the step's cost."""

import pytest
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor

from osft.tracking import runs
from osft.tracking.outbox import MetricOutbox
from osft.tracking.system_metrics import system_metrics
from tests.tracking.rounds import new_run
from tests.tracking.waiting import wait_for

CPU = "system/cpu_utilization_percentage"


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch):
    for name in ("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"):
        monkeypatch.delenv(name, raising=False)


def test_step_measures_its_machine(mlflow, tmp_path):
    with runs.step_run(mlflow, new_run(mlflow, tmp_path), "train") as step:
        pass
    measured = mlflow.get_run(step.run_id).data.metrics
    assert {CPU, "system/system_memory_usage_megabytes", "system/disk_usage_percentage"} <= measured.keys()
    assert measured["system/system_memory_usage_megabytes"] > 0


def test_samples_are_numbered_and_the_last_one_is_taken_at_the_end(mlflow, tmp_path):
    run_id = new_run(mlflow, tmp_path)
    outbox = MetricOutbox(lambda metrics: mlflow.log_batch(run_id, metrics=metrics), interval_seconds=0.05)
    with system_metrics(outbox, interval_seconds=0.1):
        wait_for(lambda: len(mlflow.get_metric_history(run_id, CPU)) >= 2)
    sent = len(mlflow.get_metric_history(run_id, CPU))
    outbox.close(30)
    steps = [metric.step for metric in mlflow.get_metric_history(run_id, CPU)]
    assert steps == list(range(len(steps)))
    assert len(steps) > sent


def test_nothing_is_measured_where_mlflow_is_told_so(mlflow, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    with runs.step_run(mlflow, new_run(mlflow, tmp_path), "train") as step:
        pass
    assert mlflow.get_run(step.run_id).data.metrics == {}


def test_what_cannot_be_measured_is_left_out(mlflow, tmp_path, monkeypatch):
    def fail(_):
        raise RuntimeError("no such device")

    monkeypatch.setattr(CPUMonitor, "collect_metrics", fail)
    monkeypatch.setattr(DiskMonitor, "__init__", fail)
    with runs.step_run(mlflow, new_run(mlflow, tmp_path), "train") as step:
        pass
    measured = mlflow.get_run(step.run_id).data.metrics
    assert "system/network_receive_megabytes" in measured
    assert not measured.keys() & {CPU, "system/disk_usage_percentage"}
    assert mlflow.get_run(step.run_id).info.status == "FINISHED"
