"""What a step needs of its machine, in MLflow: CPU, memory, disk, network, and GPUs where there are any.

The names are MLflow's own, `system/cpu_utilization_percentage` and so on, so its page "System metrics" shows them. The
numbers are those of the machine on which the step's process runs, in a pod mostly the node's: CPU and memory are of the
whole node, whoever uses it; the disk is what the container sees as /, the GPUs are those that the container was given.

On this machine everything is measured if training runs in local processes. With a job on a cluster, training runs in
other pods: this measures the pod of the step, which waits, and how training fares is in `train/tokens_per_second` and
`train/step_seconds`.

MLflow's own monitor ends for good when one request fails; here the samples go to the outbox and arrive later.
"""

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from osft.tracking.outbox import MetricOutbox

_INTERVAL_SECONDS = 10.0


@contextmanager
def system_metrics(outbox: MetricOutbox, *, interval_seconds: float | None = None) -> Iterator[None]:
    """Measure every `interval_seconds` and once when the block ends.

    Off without psutil, or with MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false; MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
    sets the seconds. What cannot be measured is left out: it never ends a step.
    """
    wanted = os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("true", "1")
    if not wanted or importlib.util.find_spec("psutil") is None:
        yield
        return
    configured = os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL")
    interval = interval_seconds or float(configured or _INTERVAL_SECONDS)
    ended = threading.Event()
    # A daemon that is not waited for long: a driver that hangs must not keep the step from ending.
    thread = threading.Thread(target=_measure, args=(outbox, ended, interval), name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)


def _measure(outbox: MetricOutbox, ended: threading.Event, interval: float) -> None:
    monitors = list(_monitors())
    for monitor in monitors:
        _sample(monitor)  # the first utilization is that since another call, so it says nothing
    number, last = 0, False
    while not last:
        last = ended.wait(interval)
        now = time.time()
        for monitor in monitors:
            for name, value in _sample(monitor).items():
                outbox.put(f"system/{name}", value, step=number, seconds=now)
        number += 1


def _monitors() -> Iterator[Any]:
    """Those of MLflow's monitors that work on this machine."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    kinds: list[Callable[[], Any]] = [CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor, ROCMMonitor]
    for kind in kinds:
        try:
            yield kind()
        except Exception:  # no such device, driver or package: each monitor has its own error for that
            continue


def _sample(monitor: Any) -> dict[str, float]:
    try:
        monitor.collect_metrics()
        values: dict[str, float] = monitor.aggregate_metrics()
        monitor.clear_metrics()
    except Exception:  # as above, in the middle of a run
        return {}
    return values
