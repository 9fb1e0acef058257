"""A training job, wherever it runs: start it, watch it, end it.

`Launcher` is what a job looks like from outside. `osft.training.local_job` has the one for processes on this machine,
`osft.kubernetes.launcher` the one for a job on a cluster. `run_job` is the life of either:

    the job cannot be started       raised; what an earlier call has started, if it did, is left alone
    it succeeds                     returns
    it fails                        JobFailed with the launcher's reason; what is left of it can be looked at
    a limit is reached, or it can   cancelled, then RuntimeError
    never start
    this process gets SIGTERM       cancelled before anything else; the process waits until it is gone and ends with
                                    143, unless it is killed meanwhile (in a cancelled pipeline run it mostly is)
    this process is killed          the job continues until its lease ends (`osft.training.lease`); the next call with
                                    the same job finds it (or, for local processes, they end with this one and the next
                                    call resumes their state)
    nobody can tell how it is       JobUnreachable; the job is left alone, for the next call to find. So it is whatever
                                    else asking for it raises: only its own answer, a limit or a person ends a job
"""

import json
import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Protocol

from osft.process import logs
from osft.process.exit_codes import INTERRUPTED
from osft.settings.base import default
from osft.settings.training import TrainConfig
from osft.training.callbacks import Follower, TrainingCallback
from osft.training.lease import Lease

logger = logging.getLogger(__name__)

_REPEAT_SECONDS = 300.0  # how often an unchanged waiting is reported
_CREDENTIALS = re.compile(r"://[^/\s]*:[^/\s]*@")


class Phase(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    """Not all of it runs (yet, or again after a restart)."""
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """A job at one moment."""

    phase: Phase
    since: datetime
    """When it came into this phase, with a time zone."""
    reason: str = ""
    """What a queued job waits for, or why it failed."""
    cannot_start: bool = False
    """Whether what a queued job waits for does not come by waiting, while a part of it may hold its GPUs."""
    restarts: int = 0
    """How often a part of it was restarted, as far as this process has seen."""
    failure: str = ""
    """How the last part that was restarted had ended."""


class Launcher(Protocol):
    """One training job."""

    def describe(self) -> str:
        """What is started, to be kept: a manifest, a command."""

    def submit(self) -> None:
        """Start the job, or find it if an earlier call has started it.

        Raises ValueError if it cannot be started so, or if the job that is there is another one.
        """

    def status(self) -> JobStatus:
        """How the job is. Raises JobUnreachable if that cannot be found out."""

    def logs(self, stop: threading.Event) -> Iterator[str]:
        """The lines of rank 0's log as they come, each once, over restarts, until the job ends or `stop` is set."""

    def cancel(self) -> None:
        """End the job and wait until nothing of it runs any more. Does nothing if it has ended."""


class JobFailed(RuntimeError):
    """The job has ended by itself, and not well; the message is the reason."""


class JobUnreachable(RuntimeError):
    """The job's state is unknown for too long. It may be running, and was left alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long and how often, in minutes of the clock on the wall; None: without end."""

    queued_minutes: float | None = None
    running_minutes: float | None = None
    heartbeat_minutes: float | None = None
    """Without a new training step, while the job runs."""
    lease_minutes: float | None = None
    """Without anybody who follows the job. None: it has no lease, for it ends with this process."""
    max_restarts: int = 0


def train_arguments(config: TrainConfig) -> list[str]:
    """What a pod or a process is started with: `train --set NAME=VALUE …`, with what is not the default.

    Raises ValueError for a URI with credentials, which everyone could read in a manifest.
    """
    arguments = ["train"]
    for name, field in TrainConfig.model_fields.items():
        value = getattr(config, name)
        if not field.is_required() and value == default(field):
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        if _CREDENTIALS.search(text):
            raise ValueError(f"{name} holds credentials. Leave them out of the URI and give them by a secret")
        arguments += ["--set", f"{name}={text}"]
    return arguments


def run_job(
    launcher: Launcher,
    *,
    limits: Limits,
    output: Path | str,
    callbacks: Sequence[TrainingCallback] = (),
    poll_seconds: float = 2.0,
) -> None:
    """Start or find the job, print its log, follow its metrics in the folder `output`, and wait for its end.

    `output` is a path or URI. Raises JobFailed if it fails, RuntimeError if a limit ends it, ValueError if it cannot be
    started, JobUnreachable, and SystemExit(143) on SIGTERM. But for JobUnreachable, it does not run any more then.
    """
    lease = Lease(output, minutes=limits.lease_minutes) if limits.lease_minutes else nullcontext()
    with _sigterm_raises() as ignore_sigterm:

        @contextmanager
        def cancelled_unless(*kinds: type[Exception]) -> Iterator[None]:
            try:
                yield
            except kinds:
                raise
            except BaseException as error:
                if not cancelled:
                    cancelled.append(True)
                    ignore_sigterm()  # told once is enough: what follows must not be cut off
                    logger.warning(f"train: {type(error).__name__}, the job is cancelled")
                    _cancel(launcher)
                raise

        cancelled: list[bool] = []
        with cancelled_unless(Exception):
            launcher.submit()
        with (
            cancelled_unless(JobUnreachable, JobFailed),
            lease,
            _printed(launcher),
            Follower(output, callbacks, after=0) as follower,
            cancelled_unless(JobUnreachable, JobFailed),  # at once; to put away what follows the job may take its time
        ):
            _wait(launcher, limits, follower, poll_seconds)


def _cancel(launcher: Launcher) -> None:
    """Cancel; what goes wrong then is told, and does not hide why it was wanted."""
    try:
        launcher.cancel()
    except Exception as error:
        logger.error(f"train: the job could not be cancelled, look after it: {type(error).__name__}: {error}")


def _wait(launcher: Launcher, limits: Limits, follower: Follower, poll_seconds: float) -> None:
    """Return when the job has succeeded."""
    reported = _Report()
    while True:
        status = _status(launcher)
        reported.show(status)
        if status.phase is Phase.SUCCEEDED:
            return
        if status.phase is Phase.FAILED:
            raise JobFailed(status.reason)
        _check_limits(status, limits, follower)
        time.sleep(poll_seconds)


def _status(launcher: Launcher) -> JobStatus:
    """How the job is. Raises JobUnreachable whatever goes wrong: not to know is no reason to end it."""
    try:
        return launcher.status()
    except JobUnreachable:
        raise
    except Exception as error:
        raise JobUnreachable(
            f"the job was left alone, and may be running: its state cannot be read ({type(error).__name__}: {error})"
        ) from error


def _check_limits(status: JobStatus, limits: Limits, follower: Follower) -> None:
    """Raise RuntimeError if the job has had its time."""
    now = datetime.now(UTC)
    minutes = (now - status.since).total_seconds() / 60
    if status.restarts > limits.max_restarts:
        raise RuntimeError(
            f"the job was restarted {status.restarts} times, more than max_restarts={limits.max_restarts}. "
            f"Last: {status.failure or 'no reason known'}"
        )
    if status.phase is Phase.QUEUED:
        if status.cannot_start:
            raise RuntimeError(f"the job cannot start: {status.reason}")
        if limits.queued_minutes is not None and minutes > limits.queued_minutes:
            raise RuntimeError(
                f"the job did not start within max_queued_minutes={limits.queued_minutes:g}. It waits for: "
                f"{status.reason or 'no reason known'}"
            )
        return
    if limits.running_minutes is not None and minutes > limits.running_minutes:
        raise RuntimeError(f"the job ran longer than max_running_minutes={limits.running_minutes:g}")
    # Up to the last look: what cannot be read is not known to be silent.
    silent = (
        (follower.looked or status.since) - max(status.since, follower.heard or status.since)
    ).total_seconds() / 60
    if limits.heartbeat_minutes is not None and silent > limits.heartbeat_minutes:
        raise RuntimeError(
            f"the job runs, but made no training step for heartbeat_minutes={limits.heartbeat_minutes:g}. "
            f"The last one was step {follower.step}"
        )


class _Report:
    """Says in the log what a job is doing, when that changes and now and then while it waits."""

    def __init__(self) -> None:
        self._last: tuple[Phase, str] | None = None
        self._at = float("-inf")

    def show(self, status: JobStatus) -> None:
        current = (status.phase, status.reason)
        waiting = status.phase is Phase.QUEUED
        if current == self._last and not (waiting and time.monotonic() - self._at > _REPEAT_SECONDS):
            return
        self._last, self._at = current, time.monotonic()
        minutes = (datetime.now(UTC) - status.since).total_seconds() / 60
        text = f"train: {status.phase}"
        if waiting and minutes >= 1:
            text += f" for {minutes:.0f} min"
        if status.reason and status.phase is not Phase.FAILED:  # a failure's reason is in the error
            text += f": {status.reason}"
        logger.info(text)


@contextmanager
def _printed(launcher: Launcher) -> Iterator[None]:
    """Print the job's log in a thread of its own; on leaving after the job's end, up to the log's end."""
    stop = threading.Event()

    def show() -> None:
        try:
            for line in launcher.logs(stop):
                logs.pass_on(line)
        except Exception as error:  # the job's log is not the job
            logger.warning(f"train: its log cannot be followed: {type(error).__name__}: {error}")

    thread = threading.Thread(target=show, name="job-log", daemon=True)
    thread.start()
    try:
        yield
        thread.join(timeout=30)
    except JobFailed:
        thread.join(timeout=10)
        raise
    finally:
        stop.set()


@contextmanager
def _sigterm_raises() -> Iterator[Callable[[], None]]:
    """Let SIGTERM raise SystemExit(143), until the function is called that is given. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def on_signal(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(INTERRUPTED)

    def ignore() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield ignore
    finally:
        signal.signal(signal.SIGTERM, before)
