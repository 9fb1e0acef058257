"""One run: submit it, look at it, follow it, cancel it."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from osft.orchestration.arguments import refuse_missing
from osft.orchestration.connection import NotFoundError, api_errors, links_to_stderr
from osft.orchestration.pipelines import UploadedPipeline
from osft.settings.base import refuse_unknown

if TYPE_CHECKING:
    import kfp

EXPERIMENT = "osft"
"""Experiment of runs and schedules, if none is named."""

FINAL_STATES = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")

_PLUMBING = re.compile(r"(root|executor|driver|.*-driver)(\(\d+\))?")
"""Tasks of Pipelines itself: what resolves a step's inputs, and the pod inside a step."""


@dataclass(frozen=True, slots=True)
class StepStatus:
    """A step of a run."""

    name: str
    state: str
    """As the API has it: PENDING, RUNNING, SUCCEEDED, FAILED, …"""
    started: datetime | None
    finished: datetime | None
    error: str

    def seconds(self, now: datetime | None = None) -> float | None:
        """How long it took, or has taken until now."""
        return _seconds(self.started, self.finished, now)


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run and its steps, in the order in which they started."""

    run_id: str
    name: str
    state: str
    started: datetime | None
    finished: datetime | None
    error: str
    steps: tuple[StepStatus, ...]

    @property
    def ended(self) -> bool:
        """True if the state will not change any more."""
        return self.state in FINAL_STATES

    def seconds(self, now: datetime | None = None) -> float | None:
        """How long it took, or has taken until now."""
        return _seconds(self.started, self.finished, now)


def submit(
    client: "kfp.Client",
    pipeline: UploadedPipeline,
    arguments: Mapping[str, Any] | None = None,
    *,
    experiment: str = EXPERIMENT,
    run_name: str | None = None,
    service_account: str | None = None,
    pipeline_root: str | None = None,
) -> str:
    """Start a run and return its id.

    Args:
        client: From `connect`.
        pipeline: From `upload` or `find_pipeline`; the run stays with this version.
        arguments: Parameters over the pipeline's defaults; `pipeline_arguments` reads and checks them.
        experiment: Made if it is not there.
        run_name: None: the pipeline's name and the time.
        service_account: Kubernetes service account of the pods; None: the server's default.
        pipeline_root: Where the pods put artifacts; None: the server's default.

    Raises: ValueError for an unknown or missing parameter, before anything is sent; as `api_errors`.
    """
    arguments = dict(arguments or {})
    refuse_unknown(arguments, pipeline.parameters)
    refuse_missing(pipeline.parameters, arguments)
    with api_errors(), links_to_stderr():
        group = client.create_experiment(experiment, namespace=client.get_user_namespace() or None)
        run = client.run_pipeline(
            experiment_id=group.experiment_id,
            job_name=run_name or f"{pipeline.name} {datetime.now(UTC):%Y-%m-%d %H-%M-%S}",
            params=arguments,
            pipeline_id=pipeline.pipeline_id,
            version_id=pipeline.version_id,
            pipeline_root=pipeline_root,
            service_account=service_account,
        )
    run_id: str = run.run_id
    return run_id


def status(client: "kfp.Client", run_id: str) -> RunStatus:
    """The run and its steps as they are now. Raises ValueError if there is no such run, and as `api_errors`."""
    try:
        with api_errors():
            run = client.get_run(run_id)
    except NotFoundError:
        raise NotFoundError(f"there is no run {run_id}: `osft status` lists the newest") from None
    tasks = (run.run_details.task_details if run.run_details else None) or []
    steps = [_step(task, tasks) for task in tasks if _is_step(task, tasks)]
    steps.sort(key=lambda step: step.started or datetime.max.replace(tzinfo=UTC))
    return _run(run, tuple(steps))


def newest_runs(client: "kfp.Client", limit: int = 10) -> list[RunStatus]:
    """The newest runs first, without their steps. Raises: as `api_errors`."""
    namespace = client.get_user_namespace() or None
    with api_errors():
        page = client.list_runs(page_size=limit, sort_by="created_at desc", namespace=namespace)
    return [_run(run, ()) for run in page.runs or []]


def follow(
    client: "kfp.Client",
    run_id: str,
    on_status: Callable[[RunStatus], object],
    *,
    interval: float = 5.0,
    patience: float = 300.0,
) -> RunStatus:
    """Call `on_status` with the run every `interval` seconds until it has ended, and return how.

    A server that does not answer is asked again for `patience` seconds: a run takes hours, and the server may be
    restarted meanwhile. (`kfp.Client.wait_for_run_completion` raises its first error, and waits on for a run that was
    cancelled.)

    Raises: ConnectionError after that time, and as `api_errors`.
    """
    answered = time.monotonic()
    while True:
        try:
            found = status(client, run_id)
        except ConnectionError:
            if time.monotonic() - answered > patience:
                raise
        else:
            answered = time.monotonic()
            on_status(found)
            if found.ended:
                return found
        time.sleep(interval)


def cancel(
    client: "kfp.Client", run_id: str, *, wait: bool = True, interval: float = 2.0, timeout: float = 600.0
) -> RunStatus:
    """Terminate a run, and wait until it has ended; a run that has ended already is left as it is.

    The state in the end is CANCELED, or FAILED: some servers report what Argo says of a workflow that was stopped.

    Raises: TimeoutError if it has not ended after `timeout` seconds; as `status`.
    """
    found = status(client, run_id)
    if found.ended:
        return found
    try:
        if found.state != "CANCELING":  # the server refuses to terminate a run twice
            with api_errors():
                client.terminate_run(run_id)
    except (ValueError, ConnectionError):
        found = status(client, run_id)
        if not found.ended:  # else it ended between the two requests
            raise
    deadline = time.monotonic() + timeout
    while True:
        found = status(client, run_id)
        if found.ended or not wait:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"run {run_id} is still {found.state} after {timeout:.0f} s; its pods may be stuck")
        time.sleep(interval)


def _run(run: Any, steps: tuple[StepStatus, ...]) -> RunStatus:
    return RunStatus(
        run_id=run.run_id,
        name=run.display_name,
        state=run.state or "PENDING",
        started=run.created_at,
        finished=_finished(run.finished_at),
        error=_message(run.error),
        steps=steps,
    )


def _is_step(task: Any, tasks: list[Any]) -> bool:
    """Whether the pipeline's author wrote this task; the workflow is one, too, and its name begins all pods' names."""
    name = task.display_name or ""
    workflow = any((other.pod_name or "").startswith(f"{name}-") for other in tasks)
    return bool(name) and not _PLUMBING.fullmatch(name) and not workflow


def _step(task: Any, tasks: list[Any]) -> StepStatus:
    errors = [task, *(child for child in tasks if child.parent_task_id == task.task_id)]
    return StepStatus(
        name=task.display_name,
        state=task.state or "PENDING",
        started=task.start_time or task.create_time,
        finished=_finished(task.end_time),
        error=next(filter(None, (_message(one.error) for one in errors)), ""),
    )


def _message(error: Any) -> str:
    return (error.message or "").strip() if error else ""


def _finished(when: datetime | None) -> datetime | None:
    """None for the epoch: the server's way of saying not yet."""
    return when if when and when.timestamp() > 0 else None


def _seconds(started: datetime | None, finished: datetime | None, now: datetime | None) -> float | None:
    if started is None:
        return None
    return max(0.0, ((finished or now or datetime.now(UTC)) - started).total_seconds())
