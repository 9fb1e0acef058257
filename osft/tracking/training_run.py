"""Tracking of a training run that is not a step of a pipeline: MLflow, TensorBoard and Weights & Biases.

None of them ends or delays a training, but for what can be seen to be wrong before it begins. A tracking server that
does not answer then is the same as one that goes away later: one line says so, the run is made and gets what was logged
when the server answers, and what has not arrived at the end is in `metrics.jsonl`.
"""

import importlib.util
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from osft.process.errors import explained
from osft.process.mlflow_errors import explained_mlflow
from osft.settings.training import TrainConfig
from osft.tracking import runs
from osft.tracking.addresses import bounded_requests
from osft.tracking.live_metrics import LiveMetrics
from osft.tracking.loggers import TensorBoard, wandb_run
from osft.tracking.outbox import MetricOutbox
from osft.tracking.system_metrics import system_metrics
from osft.training.callbacks import TrainingCallback

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 2.0


@contextmanager
def tracked(config: TrainConfig) -> Iterator[list[TrainingCallback]]:
    """The callbacks that log the run to where `config` and the environment say; only node 0 logs.

    Raises ValueError for an address, an experiment or a folder that cannot be used, and if a package that this needs is
    not installed.
    """
    uri = config.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri and importlib.util.find_spec("mlflow") is None:
        if config.mlflow_tracking_uri:
            raise ValueError("mlflow_tracking_uri needs the extra osft[mlflow]. Install it: pip install 'osft[mlflow]'")
        logger.warning("mlflow: MLFLOW_TRACKING_URI is set, but mlflow is not installed; nothing is logged")
        uri = None
    with ExitStack() as stack:
        callbacks: list[TrainingCallback] = []
        if config.node_rank == 0 and uri:
            callbacks.append(stack.enter_context(_mlflow_run(config, uri)))
        if config.node_rank == 0 and config.tensorboard_log_dir:
            callbacks.append(TensorBoard(config.tensorboard_log_dir))
        if config.node_rank == 0:
            callbacks += stack.enter_context(wandb_run(config))
        yield callbacks


@contextmanager
def _mlflow_run(config: TrainConfig, uri: str) -> Iterator[TrainingCallback]:
    """A run of its own with the settings as parameters and live metrics; FAILED if the block raises."""
    run, patience = _TrainingRun(config, uri), runs.last_wait_seconds()
    outbox = MetricOutbox(run.send)
    with bounded_requests(retries=0, timeout_seconds=10):  # what has no answer is repeated here
        try:
            run.begin()
        except ConnectionError as error:
            outbox.problem = str(error)
            logger.warning(f"mlflow: {error}. Training continues; what it logs is sent when the server answers")
        try:
            with system_metrics(outbox):
                yield LiveMetrics(outbox)
        except BaseException as error:
            outbox.close(min(patience, runs.WAIT_AFTER_FAILURE_SECONDS))
            run.end(error)
            raise
        # Who never answered is not waited for.
        unsent = outbox.close(patience if run.run_id else min(patience, runs.WAIT_AFTER_FAILURE_SECONDS))
        problem = f"{unsent} metrics were not sent: {outbox.problem}" if unsent else run.end(None)
        if problem:
            logger.warning(f"mlflow: {problem}. All metrics are in metrics.jsonl in {config.ckpt_output_dir}")


class _TrainingRun:
    """The MLflow run of a training, made when the server answers: before the first step, or any time later."""

    def __init__(self, config: TrainConfig, uri: str) -> None:
        self._config, self._uri = config, uri
        self._started = time.time()
        self._making = threading.Lock()
        self._client: MlflowClient | None = None
        self.run_id = ""
        """Empty until the server has made it."""
        self._has_params = False

    def begin(self) -> "MlflowClient":
        """Have the run made, once. Raises ConnectionError while the server is away, ValueError for what it refuses."""
        from mlflow.exceptions import MlflowException

        with self._making:
            try:
                if self._client is None:
                    self._client = runs.client(self._uri, self._config.ckpt_output_dir, wait_seconds=0)
                if not self.run_id:
                    self.run_id = self._make(self._client)
                if not self._has_params:
                    runs.log_params(self._client, self.run_id, self._config.to_dict())
                    self._has_params = True
                return self._client
            except MlflowException as error:
                raise explained_mlflow(error, self._uri) from None

    def _make(self, mlflow: "MlflowClient") -> str:
        """In a task of Kubeflow Pipelines nested in its run, unless an experiment is named: a task may train often."""
        config = self._config
        experiment = config.mlflow_experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        injected = None if experiment else runs.injected_run(mlflow)
        tags: dict[str, Any] = {}
        if injected is not None:
            experiment_id, tags = injected.info.experiment_id, {"mlflow.parentRunId": injected.info.run_id}
        else:
            experiment_id = runs.experiment_of(mlflow, experiment or "osft", config.ckpt_output_dir)
        run = mlflow.create_run(
            experiment_id,
            start_time=int(self._started * 1000),
            run_name=config.mlflow_run_name or os.environ.get("MLFLOW_RUN_NAME"),
            tags=tags,
        )
        return str(run.info.run_id)

    def send(self, metrics: "list[Metric]") -> None:
        """Log metrics to the run, which is made if need be."""
        self.begin().log_batch(self.run_id, metrics=metrics)

    def end(self, error: BaseException | None) -> str:
        """Mark the run as ended. Returns what is wrong if the server does not take that."""
        from mlflow.exceptions import MlflowException

        if not self.run_id or self._client is None:
            return ""
        if error is not None:
            runs.record_failure(self._client, self.run_id, "", error)
            return ""
        deadline = time.monotonic() + runs.last_wait_seconds()
        while True:
            try:
                self._client.set_terminated(self.run_id, "FINISHED")
                return ""
            except (MlflowException, OSError) as away:
                if time.monotonic() + _RETRY_SECONDS > deadline:
                    return f"run {self.run_id} could not be marked as finished: {explained(away) or away}"
            time.sleep(_RETRY_SECONDS)
