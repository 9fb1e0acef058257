"""One MLflow run for a pipeline run (a round), a nested run for each of its steps.

Only `MlflowClient` is used: no global state, so a step cannot log into another one's run. What a step logs when
it fails is kept, and its run and the parent are marked FAILED.

Kubeflow Pipelines can make these runs itself. It then gives each task MLFLOW_TRACKING_URI, the credentials, and
MLFLOW_RUN_ID: the task's own nested run, whose parent is the pipeline run's. Both are adopted.

A round's run carries tags that find it, in the search field of MLflow's page or as the `filter_string` of
`MlflowClient.search_runs`:

    tags.`osft.pipeline_run_id` = '<id>'                    the round of a Kubeflow run, and its steps
    … AND tags.`mlflow.parentRunId` IS NULL                 only the round (not where Kubeflow nests it deeper)
    tags.`osft.task` = 'film-reviews'                       the rounds that learned a task
    tags.`osft.model_name` = 'm' AND tags.`osft.model_version` = '3'    the round that made a version
    tags.`osft.outcome` = 'refused'                         as in `Outcome`

When the tracking server does not answer:

    when a step begins            it is asked again for half a minute, then the step fails, before any work
    when `osft()` begins          training continues; the run is made, with all that was logged, when the server answers
                                  (osft.tracking.training_run)
    a call of a step              is repeated by MLflow's client, for about four minutes
                                  (MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR); then it fails
    live and system metrics       never wait: they are kept and sent when the server is back. A step that ends waits
                                  OSFT_MLFLOW_WAIT_SECONDS (150) for the last of them, then it fails: its retry finds
                                  what was trained and sends every line of `metrics.jsonl` again
    a step that fails meanwhile   fails with its own error; that MLflow does not know of it is told in the log
    wrong credentials             are refused at once, before any work

A process that is killed cannot end its run, which stays RUNNING. That of a step is KILLED by the step's next attempt;
those of a round for which there will be none by `osft clean --ended ID --yes`. No age tells that a round is over: its
next pod may wait for a node for days.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osft import storage
from osft.process.mlflow_errors import explained_mlflow
from osft.settings.values import number
from osft.tracking.addresses import bounded_requests, checked_address
from osft.tracking.datasets import Context, dataset_input
from osft.tracking.outbox import MetricOutbox
from osft.tracking.system_metrics import system_metrics

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from osft.tracking.live_metrics import LiveMetrics

logger = logging.getLogger(__name__)

PIPELINE_RUN_TAG = "osft.pipeline_run_id"
TASK_TAG = "osft.task"
MODEL_NAME_TAG = "osft.model_name"
MODEL_VERSION_TAG = "osft.model_version"
PARENT_VERSION_TAG = "osft.parent_version"
DECISION_TAG = "osft.decision"
OUTCOME_TAG = "osft.outcome"
_PARENT_TAG = "mlflow.parentRunId"
_MAX_PARAM_LENGTH = 6000  # MLflow's own limits: on a parameter's value, a tag's, and on the parameters of one request
_MAX_TAG_LENGTH = 5000
_PARAMS_PER_REQUEST = 100
_WAIT_SECONDS = 150.0  # MLflow's client makes its sixth attempt two minutes after its first
WAIT_AFTER_FAILURE_SECONDS = 5.0  # a cancelled pod has 30 s in all
_RETRY_SECONDS = 2.0
_START_SECONDS = 30.0  # a server that is restarted is back by then


class Outcome(StrEnum):
    """How a round ended."""

    PROMOTED = "promoted"
    REFUSED = "refused"
    NOTHING_TO_LEARN = "nothing to learn"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class StepRun:
    """The MLflow run of one pipeline step."""

    client: "MlflowClient"
    run_id: str
    parent_run_id: str
    """Empty: it has no parent, and nothing can be logged `to_parent`."""
    outbox: MetricOutbox
    """Takes metrics without waiting for the server."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record the step's settings. One that the run has already, from an earlier attempt, keeps its value."""
        log_params(self.client, self.run_id, params)

    def log_metrics(self, metrics: Mapping[str, float | None], *, to_parent: bool = False) -> None:
        """Record numbers; with `to_parent` also on the pipeline's run, where runs are compared. None is left out."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        measured = [Metric(name, float(value), now, 0) for name, value in metrics.items() if value is not None]
        for run_id in self._runs(to_parent):
            self.client.log_batch(run_id, metrics=measured)

    def log_dataset(
        self, *, name: str, digest: str, source: str, num_records: int, context: Context, to_parent: bool = False
    ) -> None:
        """Record a data set as an input of the step; with `to_parent` of the round too. See `dataset_input`."""
        given = dataset_input(name=name, digest=digest, source=source, num_records=num_records, context=context)
        for run_id in self._runs(to_parent):
            self.client.log_inputs(run_id, datasets=[given])

    def log_artifact(self, path: Path, *, to_parent: bool = False) -> None:
        """Record a file; with `to_parent` on the pipeline's run."""
        self.client.log_artifact(self.parent_run_id if to_parent else self.run_id, str(path))

    def tag_round(
        self,
        *,
        task: str | None = None,
        model_name: str | None = None,
        model_version: int | None = None,
        parent_version: int | None = None,
        decision: str | None = None,
        outcome: Outcome | None = None,
    ) -> None:
        """Tag the round with what is known by now; None says nothing. The module has the searches that find it.

        `decision` is "promote" or "refuse"; `parent_version` is the version that the round started from.
        """
        from mlflow.entities import RunTag

        known = {
            TASK_TAG: task,
            MODEL_NAME_TAG: model_name,
            MODEL_VERSION_TAG: model_version,
            PARENT_VERSION_TAG: parent_version,
            DECISION_TAG: decision,
            OUTCOME_TAG: outcome,
        }
        tags = [RunTag(name, str(value)[:_MAX_TAG_LENGTH]) for name, value in known.items() if value is not None]
        self.client.log_batch(self.parent_run_id, tags=tags)

    def live_metrics(self) -> "LiveMetrics":
        """A callback of training that forwards the numbers of each step to this run."""
        from osft.tracking.live_metrics import LiveMetrics

        return LiveMetrics(self.outbox)

    def _runs(self, to_parent: bool) -> tuple[str, ...]:
        return (self.run_id, self.parent_run_id) if to_parent else (self.run_id,)


def log_params(mlflow: "MlflowClient", run_id: str, params: Mapping[str, Any]) -> None:
    """Record settings of a run. One that it has already keeps its value."""
    from mlflow.entities import Param

    known = mlflow.get_run(run_id).data.params
    new = [Param(name, str(value)[:_MAX_PARAM_LENGTH]) for name, value in params.items() if name not in known]
    for start in range(0, len(new), _PARAMS_PER_REQUEST):
        mlflow.log_batch(run_id, params=new[start : start + _PARAMS_PER_REQUEST])


def client(tracking_uri: str, storage_root: str | Path, *, wait_seconds: float = _START_SECONDS) -> "MlflowClient":
    """A client for `tracking_uri`, or for MLFLOW_TRACKING_URI, or for a database below `storage_root`.

    A server's credentials come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, or
    with MLFLOW_TRACKING_AUTH=kubernetes from the pod.

    Raises TrackingRefused if it does not take them, ConnectionError if it does not answer within `wait_seconds`, and
    ValueError for an address that is none, that holds a password, or whose database cannot be opened.
    """
    # Nothing that MLflow would report about its use belongs outside this installation.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar for each small file
    uri = checked_address(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local_tracking_uri(storage_root))
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        mlflow = MlflowClient(tracking_uri=uri, registry_uri=uri)
        if uri.startswith(("http:", "https:")):
            _check_access(mlflow, uri, wait_seconds)
    except MlflowException as error:
        raise explained_mlflow(error, uri) from None
    return mlflow


def _check_access(mlflow: "MlflowClient", uri: str, wait_seconds: float) -> None:
    """Ask the server for something small, until it answers or `wait_seconds` are over."""
    from mlflow.exceptions import MlflowException

    deadline = time.monotonic() + wait_seconds
    with bounded_requests(retries=0, timeout_seconds=10):
        while True:
            try:
                mlflow.search_experiments(max_results=1)
                return
            except MlflowException as error:
                told = explained_mlflow(error, uri)
                if not isinstance(told, ConnectionError) or time.monotonic() >= deadline:
                    raise told from None
            time.sleep(min(_RETRY_SECONDS, wait_seconds))


def local_tracking_uri(storage_root: str | Path) -> str:
    """The address of the tracking database below `storage_root`."""
    return f"sqlite:///{Path(storage_root).absolute() / 'mlflow' / 'mlflow.db'}"


def experiment_of(mlflow: "MlflowClient", name: str, storage_root: str | Path) -> str:
    """The id of an experiment, made on first use. Raises ValueError for one that was deleted."""
    from mlflow.exceptions import MlflowException

    known = mlflow.get_experiment_by_name(name)
    if known is not None:
        if known.lifecycle_stage == "deleted":
            raise ValueError(
                f"the MLflow experiment {name!r} was deleted. Restore it (mlflow experiments restore --experiment-id "
                f"{known.experiment_id}), or give another name"
            )
        return str(known.experiment_id)
    # A server knows where its artifacts go; a local database is told.
    artifacts = None
    if mlflow.tracking_uri.startswith("sqlite:"):
        beside = Path(mlflow.tracking_uri.removeprefix("sqlite:///")).parent
        folder = beside if storage.is_remote(storage_root) else Path(storage_root) / "mlflow"
        artifacts = (folder.absolute() / "artifacts").as_uri()
    try:
        return str(mlflow.create_experiment(name, artifact_location=artifacts))
    except MlflowException as error:
        known = mlflow.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or known is None:
            raise
        return str(known.experiment_id)  # another run's, made at the same moment


def pipeline_run(
    mlflow: "MlflowClient", *, experiment: str, pipeline_run_id: str, name: str, storage_root: str | Path
) -> str:
    """The id of the MLflow run of a pipeline run, made on first use.

    The run that Kubeflow Pipelines made is adopted: the parent of MLFLOW_RUN_ID, or that run itself if it has none.
    Called again for the same `pipeline_run_id`, by a retried step, it finds the run that is there.
    """
    injected = injected_run(mlflow)
    if injected is not None:
        adopted = str(injected.data.tags.get(_PARENT_TAG, injected.info.run_id))
        mlflow.set_tag(adopted, PIPELINE_RUN_TAG, pipeline_run_id)
        return adopted
    experiment_id = experiment_of(mlflow, experiment, storage_root)
    found = mlflow.search_runs([experiment_id], filter_string=f"tags.`{PIPELINE_RUN_TAG}` = '{pipeline_run_id}'")
    parents = [run for run in found if _PARENT_TAG not in run.data.tags]
    if parents:
        return str(parents[0].info.run_id)
    tags = {PIPELINE_RUN_TAG: pipeline_run_id}
    return str(mlflow.create_run(experiment_id, run_name=name, tags=tags).info.run_id)


def injected_run(mlflow: "MlflowClient") -> "Run | None":
    """The run that Kubeflow Pipelines made for this task (MLFLOW_RUN_ID), if it is on the server of `mlflow`."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id or os.environ.get("MLFLOW_TRACKING_URI", mlflow.tracking_uri) != mlflow.tracking_uri:
        return None
    return mlflow.get_run(run_id)


@contextmanager
def step_run(mlflow: "MlflowClient", parent_run_id: str, step: str) -> Iterator[StepRun]:
    """A nested run for one step; FINISHED if the block ends, FAILED (and the parent too) if it raises.

    A process that is killed leaves its run RUNNING: the step's next attempt ends it as KILLED. The nested run
    that Kubeflow Pipelines made for the task is adopted. Raises what `recorded` does.
    """
    parent = mlflow.get_run(parent_run_id)
    if parent.info.status != "RUNNING":  # a step that is retried after it failed
        mlflow.update_run(parent_run_id, status="RUNNING")
    if parent.data.tags.get(OUTCOME_TAG) == Outcome.FAILED:
        mlflow.delete_tag(parent_run_id, OUTCOME_TAG)
    tags = {_PARENT_TAG: parent_run_id}
    if PIPELINE_RUN_TAG in parent.data.tags:
        tags[PIPELINE_RUN_TAG] = parent.data.tags[PIPELINE_RUN_TAG]
    injected = injected_run(mlflow)
    if injected is not None and injected.data.tags.get(_PARENT_TAG) == parent_run_id:
        run_id = str(injected.info.run_id)
        mlflow.update_run(run_id, status="RUNNING")
        mlflow.set_tag(run_id, PIPELINE_RUN_TAG, tags.get(PIPELINE_RUN_TAG, ""))
    else:
        _end_earlier_attempts(mlflow, parent, step)
        run_id = str(mlflow.create_run(parent.info.experiment_id, run_name=step, tags=tags).info.run_id)
    with recorded(mlflow, run_id, parent_run_id) as recording:
        yield recording


def _end_earlier_attempts(mlflow: "MlflowClient", parent: "Run", step: str) -> None:
    """End what earlier attempts of the step have left RUNNING. Each begins when the pod of the one before is gone."""
    found = mlflow.search_runs(
        [parent.info.experiment_id],
        filter_string=f"tags.`{_PARENT_TAG}` = '{parent.info.run_id}' AND attributes.run_name = '{step}' "
        "AND attributes.status = 'RUNNING'",
    )
    for run in found:
        end_killed(mlflow, run.info.run_id)


def end_killed(mlflow: "MlflowClient", run_id: str) -> None:
    """End a run whose process is known to be gone, and had no time to."""
    logger.warning(f"mlflow: run {run_id} was left RUNNING by a process that was killed; it is KILLED now")
    mlflow.set_tag(run_id, "error", "its process was killed before it could say how it ended")
    mlflow.set_terminated(run_id, "KILLED")


@contextmanager
def recorded(mlflow: "MlflowClient", run_id: str, parent_run_id: str = "") -> Iterator[StepRun]:
    """Measure the machine while the block runs, and end the run as the block ends.

    Raises ConnectionError, if the block has not raised, where the last metrics could not be sent.
    """
    wait_seconds = last_wait_seconds()
    outbox = MetricOutbox(lambda metrics: mlflow.log_batch(run_id, metrics=metrics))
    try:
        with system_metrics(outbox):
            yield StepRun(mlflow, run_id, parent_run_id, outbox)
    except BaseException as error:
        outbox.close(min(wait_seconds, WAIT_AFTER_FAILURE_SECONDS))
        record_failure(mlflow, run_id, parent_run_id, error)
        raise
    unsent = outbox.close(wait_seconds)
    if unsent:
        raise ConnectionError(
            f"{unsent} metrics of MLflow run {run_id} could not be sent within {wait_seconds:g} s "
            f"(OSFT_MLFLOW_WAIT_SECONDS). {outbox.problem or 'The server does not answer'}"
        )
    mlflow.set_terminated(run_id, "FINISHED")


def last_wait_seconds() -> float:
    """How long a run that ends waits for a server that is away. Raises ValueError for what is no number."""
    given = os.environ.get("OSFT_MLFLOW_WAIT_SECONDS") or _WAIT_SECONDS
    seconds = number(given, whole=False)
    if seconds is None or seconds < 0:
        raise ValueError(f"OSFT_MLFLOW_WAIT_SECONDS must be a number of seconds, got {given!r}")
    return seconds


def step_seconds(mlflow: "MlflowClient", parent_run_id: str) -> dict[str, float]:
    """How long each step of a pipeline run took that has ended well; of one that was retried, its last attempt."""
    parent = mlflow.get_run(parent_run_id)
    found = mlflow.search_runs(
        [parent.info.experiment_id],
        filter_string=f"tags.`{_PARENT_TAG}` = '{parent_run_id}' AND attributes.status = 'FINISHED'",
        order_by=["attributes.start_time ASC"],
    )
    return {run.info.run_name: (run.info.end_time - run.info.start_time) / 1000 for run in found}


def record_failure(mlflow: "MlflowClient", run_id: str, parent_run_id: str, error: BaseException) -> None:
    """Mark the run and its parent; what goes wrong then is told, and does not hide why they failed."""
    from mlflow.exceptions import MlflowException

    try:
        mlflow.set_tag(run_id, "error", f"{type(error).__name__}: {error}"[:_MAX_TAG_LENGTH])
        mlflow.set_terminated(run_id, "FAILED")
        if parent_run_id:
            mlflow.set_tag(parent_run_id, OUTCOME_TAG, Outcome.FAILED.value)
            mlflow.set_terminated(parent_run_id, "FAILED")
    except (MlflowException, OSError) as unrecorded:
        logger.warning(f"mlflow: run {run_id} has failed, and that could not be recorded: {unrecorded}")
