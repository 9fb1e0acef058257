"""One MLflow run for a pipeline run, a nested run for each of its steps.

Only `MlflowClient` is used: no global state, so a step cannot log into another one's run. What a step logs when
it fails is kept, and its run and the parent are marked FAILED.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osft import storage

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PIPELINE_RUN_TAG = "osft.pipeline_run_id"
_PARENT_TAG = "mlflow.parentRunId"
_MAX_PARAM_LENGTH = 6000  # MLflow's own limit on a parameter's value


@dataclass(frozen=True, slots=True)
class StepRun:
    """The MLflow run of one pipeline step."""

    client: "MlflowClient"
    run_id: str
    parent_run_id: str

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record the step's settings."""
        for name, value in params.items():
            self.client.log_param(self.run_id, name, str(value)[:_MAX_PARAM_LENGTH])

    def log_metrics(self, metrics: Mapping[str, float | None], *, to_parent: bool = False) -> None:
        """Record numbers; with `to_parent` also on the pipeline's run, where runs are compared. None is left out."""
        for name, value in metrics.items():
            if value is not None:
                for run_id in (self.run_id, self.parent_run_id) if to_parent else (self.run_id,):
                    self.client.log_metric(run_id, name, value)

    def log_artifact(self, path: Path, *, to_parent: bool = False) -> None:
        """Record a file; with `to_parent` on the pipeline's run."""
        self.client.log_artifact(self.parent_run_id if to_parent else self.run_id, str(path))


def client(tracking_uri: str, storage_root: str | Path) -> "MlflowClient":
    """A client for `tracking_uri`, or for MLFLOW_TRACKING_URI, or for a database below `storage_root`."""
    # Nothing that MLflow would report about its use belongs outside this installation.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar for each small file
    from mlflow import MlflowClient

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local_tracking_uri(storage_root)
    if uri.startswith("sqlite:"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def local_tracking_uri(storage_root: str | Path) -> str:
    """The address of the tracking database below `storage_root`."""
    return f"sqlite:///{Path(storage_root).absolute() / 'mlflow' / 'mlflow.db'}"


def experiment_of(mlflow: "MlflowClient", name: str, storage_root: str | Path) -> str:
    """The id of an experiment, made on first use."""
    known = mlflow.get_experiment_by_name(name)
    if known is not None:
        return str(known.experiment_id)
    # A server knows where its artifacts go; a local database is told.
    artifacts = None
    if mlflow.tracking_uri.startswith("sqlite:"):
        beside = Path(mlflow.tracking_uri.removeprefix("sqlite:///")).parent
        folder = beside if storage.is_remote(storage_root) else Path(storage_root) / "mlflow"
        artifacts = (folder.absolute() / "artifacts").as_uri()
    return str(mlflow.create_experiment(name, artifact_location=artifacts))


def pipeline_run(
    mlflow: "MlflowClient", *, experiment: str, pipeline_run_id: str, name: str, storage_root: str | Path
) -> str:
    """The id of the MLflow run of a pipeline run, made on first use.

    The run that Kubeflow Pipelines injects (MLFLOW_RUN_ID) is adopted. Called again for the same
    `pipeline_run_id`, by a retried step, it finds the run that is there.
    """
    injected = os.environ.get("MLFLOW_RUN_ID")
    if injected:
        mlflow.set_tag(injected, _PIPELINE_RUN_TAG, pipeline_run_id)
        return injected
    experiment_id = experiment_of(mlflow, experiment, storage_root)
    found = mlflow.search_runs([experiment_id], filter_string=f"tags.`{_PIPELINE_RUN_TAG}` = '{pipeline_run_id}'")
    parents = [run for run in found if _PARENT_TAG not in run.data.tags]
    if parents:
        return str(parents[0].info.run_id)
    tags = {_PIPELINE_RUN_TAG: pipeline_run_id}
    return str(mlflow.create_run(experiment_id, run_name=name, tags=tags).info.run_id)


@contextmanager
def step_run(mlflow: "MlflowClient", parent_run_id: str, step: str) -> Iterator[StepRun]:
    """A nested run for one step; FINISHED if the block ends, FAILED (and the parent too) if it raises."""
    parent = mlflow.get_run(parent_run_id)
    tags = {_PARENT_TAG: parent_run_id}
    if _PIPELINE_RUN_TAG in parent.data.tags:
        tags[_PIPELINE_RUN_TAG] = parent.data.tags[_PIPELINE_RUN_TAG]
    if parent.info.status != "RUNNING":  # a step that is retried after it failed
        mlflow.update_run(parent_run_id, status="RUNNING")
    run_id = mlflow.create_run(parent.info.experiment_id, run_name=step, tags=tags).info.run_id
    try:
        yield StepRun(mlflow, run_id, parent_run_id)
    except BaseException as error:
        mlflow.set_tag(run_id, "error", f"{type(error).__name__}: {error}"[:5000])
        mlflow.set_terminated(run_id, "FAILED")
        mlflow.set_terminated(parent_run_id, "FAILED")
        raise
    mlflow.set_terminated(run_id, "FINISHED")


def step_seconds(mlflow: "MlflowClient", parent_run_id: str) -> dict[str, float]:
    """How long each step of a pipeline run took that has ended well; of one that was retried, its last attempt."""
    parent = mlflow.get_run(parent_run_id)
    found = mlflow.search_runs(
        [parent.info.experiment_id],
        filter_string=f"tags.`{_PARENT_TAG}` = '{parent_run_id}' AND attributes.status = 'FINISHED'",
        order_by=["attributes.start_time ASC"],
    )
    return {run.info.run_name: (run.info.end_time - run.info.start_time) / 1000 for run in found}
