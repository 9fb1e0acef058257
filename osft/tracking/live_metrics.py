"""Training metrics in MLflow while training runs.

Training writes `metrics.jsonl` and knows nothing of MLflow; a thread of the launching process reads what has been
added and sends it. If the server does not answer, training goes on and the lines are sent later; what could not
be sent when training ends is still in the file, and the step says so.
"""

import json
import logging
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)


class LiveMetrics:
    """Forwards the lines of a growing metrics file to a run, until the block ends."""

    def __init__(self, mlflow: "MlflowClient", run_id: str, metrics_file: Path, *, interval_seconds: float = 5.0):
        self._mlflow, self._run_id, self._file, self._interval = mlflow, run_id, metrics_file, interval_seconds
        self._offset = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-metrics", daemon=True)

    def __enter__(self) -> "LiveMetrics":
        self._offset = self._file.stat().st_size if self._file.is_file() else 0
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if not self._send():
            print(f"mlflow: the last metrics could not be sent; they are in {self._file}", flush=True)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._send()

    def _send(self) -> bool:
        """Send all complete new lines; False if the server did not take them."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        if not self._file.is_file():
            return True
        with self._file.open("rb") as lines:
            if self._file.stat().st_size < self._offset:
                self._offset = 0  # the file was begun anew
            lines.seek(self._offset)
            added = lines.read()
        complete = added[: added.rfind(b"\n") + 1]
        metrics = [metric for line in complete.splitlines() for metric in _metrics(json.loads(line), Metric)]
        try:
            for start in range(0, len(metrics), 1000):  # MLflow's limit on one batch
                self._mlflow.log_batch(self._run_id, metrics=metrics[start : start + 1000])
        except (MlflowException, OSError) as error:
            _log.warning("metrics could not be sent to MLflow, trying again later: %s", error)
            return False
        self._offset += len(complete)
        return True


def _metrics(line: dict[str, Any], make: Any) -> list[Any]:
    """The numbers of one line, with the step as their axis. Sent twice, they are equal and MLflow keeps one."""
    axes = ("step", "timestamp")
    milliseconds = int(line["timestamp"] * 1000)
    return [make(f"train/{k}", float(v), milliseconds, line["step"]) for k, v in line.items() if k not in axes]
