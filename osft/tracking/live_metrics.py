"""Training metrics in MLflow while training runs.

Training knows nothing of MLflow: this is a callback in the launching process, with a thread that sends what has come.
If the server does not answer, training goes on and the metrics are sent later; what could not be sent when training
ends is still in `metrics.jsonl`, and a line says so.
"""

import logging
import threading
from typing import TYPE_CHECKING, Any

from osft.training.callbacks import TrainingCallback, TrainingContext

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)


class LiveMetrics(TrainingCallback):
    """Forwards the numbers of each step to an MLflow run."""

    def __init__(self, mlflow: "MlflowClient", run_id: str, *, interval_seconds: float = 5.0) -> None:
        self._mlflow, self._run_id, self._interval = mlflow, run_id, interval_seconds
        self._pending: list[TrainingContext] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-metrics", daemon=True)

    def on_train_begin(self, context: TrainingContext) -> None:
        """Start sending."""
        self._thread.start()

    def on_step_end(self, context: TrainingContext) -> None:
        """Take a step's numbers."""
        self._pending.append(context)

    def on_train_end(self, context: TrainingContext) -> None:
        """Send what is left."""
        self._stop.set()
        self._thread.join()
        if not self._send():
            print(f"mlflow: the last metrics could not be sent; they are in {context.output_dir}", flush=True)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._send()

    def _send(self) -> bool:
        """Send all that is pending; False if the server did not take it."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        steps = list(self._pending)
        metrics = [metric for step in steps for metric in _metrics(step, Metric)]
        try:
            for start in range(0, len(metrics), 1000):  # MLflow's limit on one batch
                self._mlflow.log_batch(self._run_id, metrics=metrics[start : start + 1000])
        except (MlflowException, OSError) as error:
            _log.warning("metrics could not be sent to MLflow, trying again later: %s", error)
            return False
        del self._pending[: len(steps)]
        return True


def _metrics(context: TrainingContext, make: Any) -> list[Any]:
    """The numbers of one step, with the step as their axis. Sent twice, they are equal and MLflow keeps one."""
    milliseconds = int(context.metrics["timestamp"] * 1000)
    return [make(f"train/{k}", float(v), milliseconds, context.step) for k, v in context.numbers.items()]
