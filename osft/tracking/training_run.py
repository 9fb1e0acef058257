"""Tracking of a training run that is not a step of a pipeline: MLflow and TensorBoard, where they are asked for."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from osft.config import TrainConfig
from osft.tracking import runs
from osft.tracking.live_metrics import LiveMetrics
from osft.training.callbacks import TrainingCallback, TrainingContext

if TYPE_CHECKING:
    pass


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
    """A run of its own with the settings as parameters and live metrics; FAILED if the block raises."""
    client = runs.client(uri, config.ckpt_output_dir)
    experiment = config.mlflow_experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "osft"
    experiment_id = runs.experiment_of(client, experiment, config.ckpt_output_dir)
    run_name = config.mlflow_run_name or os.environ.get("MLFLOW_RUN_NAME")
    run = runs.StepRun(client, client.create_run(experiment_id, run_name=run_name).info.run_id, "")
    run.log_params(config.to_dict())
    try:
        yield LiveMetrics(client, run.run_id)
    except BaseException:
        client.set_terminated(run.run_id, "FAILED")
        raise
    client.set_terminated(run.run_id, "FINISHED")


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
