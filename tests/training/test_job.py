"""The life of a training job, with processes of this machine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from osft.settings.training import TrainConfig
from osft.training import job as jobs
from osft.training.callbacks import TrainingCallback
from osft.training.job import JobFailed, JobStatus, Limits, Phase, run_job, train_arguments
from osft.training.local_job import LocalJob


class Scripted:
    """A job that goes through given states, and remembers whether it was cancelled."""

    def __init__(self, *statuses: JobStatus) -> None:
        self.statuses, self.cancelled = list(statuses), False

    def describe(self) -> str:
        return "scripted"

    def submit(self) -> None:
        pass

    def status(self) -> JobStatus:
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]

    def logs(self, stop: threading.Event) -> Iterator[str]:
        return iter(["a line of the log"])

    def cancel(self) -> None:
        self.cancelled = True


def status(phase: Phase, minutes: float = 0.0, reason: str = "", restarts: int = 0) -> JobStatus:
    since = datetime.now(UTC) - timedelta(minutes=minutes)
    return JobStatus(phase=phase, since=since, reason=reason, restarts=restarts)


def follow(job: Scripted, output: Path, **limits: float) -> None:
    run_job(job, limits=Limits(**limits), output=output, poll_seconds=0.01)


def test_success_returns_and_cancels_nothing(tmp_path, capsys):
    job = Scripted(status(Phase.QUEUED, reason="no node"), status(Phase.RUNNING), status(Phase.SUCCEEDED))
    follow(job, tmp_path)
    assert not job.cancelled
    printed = capsys.readouterr().out
    for text in ("train: queued: no node", "train: running", "a line of the log", "train: succeeded"):
        assert text in printed


def test_failure_is_raised_with_its_reason_and_what_is_left_can_be_looked_at(tmp_path):
    job = Scripted(status(Phase.FAILED, reason="rank 3: out of memory"))
    with pytest.raises(JobFailed, match="rank 3: out of memory"):
        follow(job, tmp_path)
    assert not job.cancelled


@pytest.mark.parametrize(
    ("found", "limits", "message"),
    [
        (status(Phase.QUEUED, 11, "no node"), {"queued_minutes": 10}, "max_queued_minutes=10. It waits for: no node"),
        (status(Phase.RUNNING, 11), {"running_minutes": 10}, "ran longer than max_running_minutes=10"),
        (status(Phase.RUNNING, 11), {"heartbeat_minutes": 10}, "no training step for heartbeat_minutes=10"),
        (status(Phase.RUNNING, 0, restarts=3), {"max_restarts": 2}, "restarted 3 times"),
    ],
)
def test_limit_cancels_the_job_and_is_told(tmp_path, found, limits, message):
    job = Scripted(found)
    with pytest.raises(RuntimeError, match=message):
        follow(job, tmp_path, **limits)
    assert job.cancelled


@pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.RUNNING])
def test_without_limits_a_job_may_wait_and_run_for_days(tmp_path, phase):
    job = Scripted(*[status(phase, minutes=10_000)] * 5, status(Phase.SUCCEEDED))
    follow(job, tmp_path)
    assert not job.cancelled


def test_waiting_is_reported_when_its_reason_changes_and_not_each_time(tmp_path, capsys):
    waits = [status(Phase.QUEUED, 2, reason) for reason in ("no node", "no node", "no node", "image", "image")]
    follow(Scripted(*waits, status(Phase.SUCCEEDED)), tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("train: queued for 2 min: no node") == 1
    assert printed.count("train: queued for 2 min: image") == 1


def test_waiting_that_does_not_change_is_reported_now_and_then(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "_REPEAT_SECONDS", 0.0)
    follow(Scripted(*[status(Phase.QUEUED, reason="no node")] * 3, status(Phase.SUCCEEDED)), tmp_path)
    assert capsys.readouterr().out.count("train: queued: no node") == 3


def test_cancelling_that_fails_does_not_hide_why_it_was_wanted(tmp_path, capsys):
    job = Scripted(status(Phase.RUNNING, 11))

    def cancel() -> None:
        raise OSError("no route")

    job.cancel = cancel
    with pytest.raises(RuntimeError, match="max_running_minutes"):
        follow(job, tmp_path, running_minutes=10)
    assert "could not be cancelled, look after it: OSError: no route" in capsys.readouterr().out


def test_to_cancel_is_the_first_thing_that_happens_on_sigterm(tmp_path):
    """Whatever follows the job, its log or its metrics, may hang on its way out."""
    order = []
    job = Scripted(status(Phase.RUNNING))
    job.cancel = lambda: order.append("cancelled")

    class Slow(TrainingCallback):
        def on_train_begin(self, context):
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()

        def on_train_end(self, context):
            order.append("followed to the end")

    with pytest.raises(SystemExit, match="143"):
        run_job(job, limits=Limits(), output=tmp_path, callbacks=[Slow()], poll_seconds=0.01)
    assert order == ["cancelled", "followed to the end"]


def test_sigterm_while_the_job_is_made_cancels_it(tmp_path):
    job = Scripted(status(Phase.RUNNING))
    job.submit = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        follow(job, tmp_path)
    assert job.cancelled


def test_job_with_a_lease_has_it_renewed(tmp_path):
    job = Scripted(*[status(Phase.RUNNING)] * 50, status(Phase.SUCCEEDED))
    follow(job, tmp_path, lease_minutes=0.01)
    assert (tmp_path / "lease").read_text().split()[1] > "1"
    follow(Scripted(status(Phase.SUCCEEDED)), tmp_path / "none")
    assert not (tmp_path / "none" / "lease").exists()


def test_signals_are_afterwards_as_they_were(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    follow(Scripted(status(Phase.SUCCEEDED)), tmp_path)
    with pytest.raises(RuntimeError):
        follow(Scripted(status(Phase.RUNNING, 11)), tmp_path, running_minutes=10)
    assert signal.getsignal(signal.SIGTERM) is before


def test_job_can_be_followed_from_another_thread_than_the_main_one(tmp_path):
    job, raised = Scripted(status(Phase.RUNNING, 11)), []

    def run() -> None:
        try:
            follow(job, tmp_path, running_minutes=10)
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "max_running_minutes" in raised[0]
    assert job.cancelled


def test_local_process_that_refuses_its_settings_fails_with_its_last_lines(tmp_path):
    with pytest.raises(JobFailed, match=r"exit code 2\n(.*\n)*.*unknown parameter 'nun_epochs'"):
        run_job(LocalJob(["train", "--set", "nun_epochs=3"]), limits=Limits(), output=tmp_path, poll_seconds=0.1)


def test_local_process_that_ends_well_is_a_success(tmp_path, capsys):
    run_job(LocalJob(["train", "--help"]), limits=Limits(), output=tmp_path, poll_seconds=0.1)
    assert "unfreeze_rank_ratio" in capsys.readouterr().out


FOLLOWING = """
import json, sys
from osft.training.job import Limits, run_job
from osft.training.local_job import LocalJob
run_job(LocalJob(json.loads(sys.argv[1])), limits=Limits(), output=sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_local_training_ends_with_the_process_that_started_it(tmp_path, model_folder, chats, number):
    output = tmp_path / "run"
    config = TrainConfig(
        model_path=str(model_folder),
        data_path=str(chats),
        ckpt_output_dir=str(output),
        unfreeze_rank_ratio=0.5,
        effective_batch_size=2,
        max_tokens_per_gpu=128,
        max_seq_len=128,
        learning_rate=1e-3,
        num_epochs=1000,
        nproc_per_node=2,
    )
    command = [sys.executable, "-c", FOLLOWING, json.dumps(train_arguments(config)), str(output)]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not ((output / "metrics.jsonl").is_file() and (output / "metrics.jsonl").stat().st_size):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    processes = psutil.Process(started.pid).children(recursive=True)
    assert len(processes) >= 3
    started.send_signal(number)
    assert started.wait(120) == (143 if number == signal.SIGTERM else -number)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    assert list((output / "state").glob("step-*")), "the training state was not saved"
