"""Tracking of a training run that is not a step of a pipeline: MLflow and TensorBoard, where they are asked for."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from osft.config import TrainConfig
from osft.tracking import runs
from osft.training.callbacks import TrainingCallback, TrainingContext


@contextmanager
def tracked(config: TrainConfig) -> Iterator[list[TrainingCallback]]:
    """The callbacks that log the run to where `config` and the environment say; only node 0 logs.

    Raises ValueError if a package that this needs is not installed.
    """
    uri = config.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri and importlib.util.find_spec("mlflow") is None:
        if config.mlflow_tracking_uri:
            raise ValueError("mlflow_tracking_uri needs the extra osft[mlflow]. Install it: pip install 'osft[mlflow]'")
        print("mlflow: MLFLOW_TRACKING_URI is set, but mlflow is not installed; nothing is logged", flush=True)
        uri = None
    with ExitStack() as stack:
        callbacks: list[TrainingCallback] = []
        if config.node_rank == 0 and uri:
            callbacks.append(stack.enter_context(_mlflow_run(config, uri)))
        if config.node_rank == 0 and config.tensorboard_log_dir:
            callbacks.append(TensorBoard(config.tensorboard_log_dir))
        yield callbacks


@contextmanager
def _mlflow_run(config: TrainConfig, uri: str) -> Iterator[TrainingCallback]:
    """A run of its own with the settings as parameters and live metrics; FAILED if the block raises.

    In a task of Kubeflow Pipelines it is nested in the task's run, unless an experiment is named: one task can train
    several times. A training that has ended well is not failed by a server that is away.
    """
    from mlflow.exceptions import MlflowException

    client = runs.client(uri, config.ckpt_output_dir)
    experiment = config.mlflow_experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    injected = None if experiment else runs.injected_run(client)
    if injected is not None:
        experiment_id, tags = injected.info.experiment_id, {"mlflow.parentRunId": injected.info.run_id}
    else:
        experiment_id, tags = runs.experiment_of(client, experiment or "osft", config.ckpt_output_dir), {}
    run_name = config.mlflow_run_name or os.environ.get("MLFLOW_RUN_NAME")
    run_id = client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id
    trained = False
    try:
        with runs.recorded(client, run_id) as recording:
            recording.log_params(config.to_dict())
            yield recording.live_metrics()
            trained = True
    except (MlflowException, OSError) as error:
        if not trained:
            raise
        print(f"mlflow: {error}. All metrics are in metrics.jsonl in {config.ckpt_output_dir}", flush=True)


class TensorBoard(TrainingCallback):
    """Writes the numbers of each step as scalars, over steps."""

    def __init__(self, log_dir: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"tensorboard_log_dir needs the extra osft[tensorboard]: {error}") from None
        self._writer: SummaryWriter = SummaryWriter(log_dir)

    def on_step_end(self, context: TrainingContext) -> None:
        """Write a step's numbers."""
        for name, value in context.numbers.items():
            self._writer.add_scalar(f"train/{name}", value, context.step, walltime=context.metrics["timestamp"])

    def on_train_end(self, context: TrainingContext) -> None:
        """Close the file."""
        self._writer.close()
