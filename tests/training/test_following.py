"""Following a run whose files cannot be read for a while, or are not what they were."""

import errno
import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from osft import storage
from osft.training import metrics_file
from osft.training.callbacks import Follower, StopTraining, TrainingCallback
from osft.training.job import JobStatus, Limits, Phase, run_job
from osft.training.metrics_file import MetricsFile
from tests.training.test_job import Scripted


def line(step: int, **changes: object) -> bytes:
    metrics = {"step": step, "epoch": 0.5, "loss": 1.0 / step, "learning_rate": 0.1, "validation_loss": None}
    return json.dumps(metrics | {"checkpoints": []} | changes).encode() + b"\n"


def steps_of(reader: MetricsFile) -> list[int]:
    return [metrics["step"] for metrics in reader.new_lines()]


@pytest.fixture(params=["folder", "store"])
def written(request, tmp_path, monkeypatch) -> tuple[MetricsFile, Callable[[bytes], None]]:
    """A reader of a folder or of a store's URI, and what replaces the content of the file."""
    file = tmp_path / "metrics.jsonl"
    if request.param == "folder":

        def write(content: bytes) -> None:
            file.write_bytes(content)

        return MetricsFile(tmp_path, after=0), write
    content: dict[str, bytes] = {}
    monkeypatch.setattr(metrics_file.storage, "read", content.get)
    uri = "s3://bucket/run"
    return MetricsFile(uri, after=0), lambda new: content.__setitem__(f"{uri}/metrics.jsonl", new)


ONE, TWO, THREE, FOUR, FIVE, *_ = LINES = [line(step) for step in range(1, 9)]
ZEROS = bytes(len(TWO) - 1) + b"\n"
CUT = b'{"step": 2, "lo\n'
TEXT = ONE.replace(b'"step": 1', b'"step": "1"')
CASES: dict[str, list[tuple[list[bytes], list[int]]]] = {
    "nothing there, then steps": [([], []), ([ONE, TWO], [1, 2])],
    "appended": [([ONE, TWO], [1, 2]), (LINES[:3], [3]), (LINES[:3], []), (LINES[:5], [4, 5])],
    "half a line": [([ONE, TWO[:20]], [1]), ([ONE, TWO[:-1]], []), (LINES[:3], [2, 3])],
    "cut and written again": [(LINES[:4], [1, 2, 3, 4]), (LINES[:2], []), (LINES[:5], [5])],
    "cut, and longer at once": [(LINES[:3], [1, 2, 3]), ([ONE, TWO, line(3, loss=0.12345), FOUR, FIVE], [4, 5])],
    "emptied and begun again": [(LINES[:3], [1, 2, 3]), ([], []), ([ONE], []), (LINES[:4], [4])],
    "zeros where a block is not there yet": [([ONE, ZEROS], [1]), (LINES[:3], [2, 3])],
    "a damaged line for good": [([ONE, CUT, THREE], [1, 3]), ([ONE, CUT, THREE, FOUR], [4])],
    "no utf-8": [([ONE, b"\xff\xfe\n", TWO], [1, 2])],
    "no object": [([b"[1]\n", b"null\n", b"3\n", b"\n", ONE], [1])],
    "not the fields": [([b'{"step": 1}\n', line(2, epoch=None), line(3, checkpoints=3), TEXT, FOUR], [4])],
    "a store that went back": [(LINES[:3], [1, 2, 3]), ([ONE, TWO], []), (LINES[:3], []), (LINES[:4], [4])],
}


@pytest.mark.parametrize("looks", CASES.values(), ids=CASES)
def test_each_sound_step_is_given_once_whatever_becomes_of_the_file(written, looks):
    reader, write = written
    for content, expected in looks:
        write(b"".join(content))
        assert steps_of(reader) == expected


def test_replaced_file_is_read_from_its_beginning(tmp_path):
    reader = MetricsFile(tmp_path, after=0)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(LINES[:3]))
    assert steps_of(reader) == [1, 2, 3]
    (tmp_path / "other").write_bytes(b"".join([line(1, loss=9.5), *LINES[1:6]]))
    (tmp_path / "other").rename(tmp_path / "metrics.jsonl")
    assert steps_of(reader) == [4, 5, 6]


def test_steps_that_are_repeated_are_signs_of_life(tmp_path):
    reader = MetricsFile(tmp_path, after=0)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"".join(LINES[:4]))
    reader.new_lines()
    assert reader.has_grown
    reader.new_lines()
    assert not reader.has_grown
    file.write_bytes(b"".join([*LINES[:2], line(3, loss=7.0)]))
    assert steps_of(reader) == []
    assert reader.has_grown


class Steps(TrainingCallback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, context):
        self.seen.append(context.step)


class Broken:
    """Calls of a function that fail until it is mended."""

    def __init__(self, function: Callable, error: Exception) -> None:
        self.function, self.error, self.whole, self.calls = function, error, threading.Event(), 0

    def __call__(self, *arguments, **named):
        self.calls += 1
        if not self.whole.is_set():
            raise self.error
        return self.function(*arguments, **named)


ERRORS = [
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    TimeoutError("the store did not answer"),
    ValueError("no credentials"),
    RuntimeError("an object store's client of its own mind"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error))
def test_steps_arrive_when_the_file_can_be_read_again(tmp_path, monkeypatch, capsys, error):
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(LINES[:3]))
    broken = Broken(MetricsFile._read, error)
    monkeypatch.setattr(MetricsFile, "_read", lambda self: broken(self))
    steps = Steps()
    with Follower(tmp_path, [steps], after=0, interval_seconds=0.01) as follower:
        while broken.calls < 3:
            time.sleep(0.01)
        assert (steps.seen, follower.looked) == ([], None)
        broken.whole.set()
        while not steps.seen:
            time.sleep(0.01)
    assert steps.seen == [1, 2, 3]
    assert capsys.readouterr().out.count("the run cannot be followed") == 1


def test_request_of_a_callback_is_left_when_it_can_be_written_again(tmp_path, monkeypatch):
    class Stops(TrainingCallback):
        def on_step_end(self, context):
            raise StopTraining

    broken = Broken(storage.write, OSError(errno.EIO, "Input/output error"))
    monkeypatch.setattr(storage, "write", broken)
    (tmp_path / "metrics.jsonl").write_bytes(LINES[0])
    with Follower(tmp_path, [Stops()], after=0, interval_seconds=0.01):
        while broken.calls < 2:
            time.sleep(0.01)
        assert not (tmp_path / "stop").exists()
        broken.whole.set()
    assert (tmp_path / "stop").read_text() == "3"


class Ends(Scripted):
    """A job that runs for `seconds`, since long ago."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.end = time.monotonic() + seconds

    def status(self) -> JobStatus:
        phase = Phase.RUNNING if time.monotonic() < self.end else Phase.SUCCEEDED
        return JobStatus(phase=phase, since=datetime.now(UTC) - timedelta(hours=2))


@pytest.mark.parametrize("error", ERRORS[:2], ids=lambda error: str(error))
def test_job_whose_metrics_cannot_be_read_is_not_ended(tmp_path, monkeypatch, error):
    def fails(self: MetricsFile) -> bytes:
        raise error

    monkeypatch.setattr(MetricsFile, "_read", fails)
    job = Ends(0.8)
    run_job(job, limits=Limits(heartbeat_minutes=60), output=tmp_path, poll_seconds=0.01)
    assert not job.cancelled


def test_job_that_is_silent_once_its_metrics_can_be_read_is_ended(tmp_path):
    job = Ends(20)
    with pytest.raises(RuntimeError, match="no training step for heartbeat_minutes=60. The last one was step 0"):
        run_job(job, limits=Limits(heartbeat_minutes=60), output=tmp_path, poll_seconds=0.01)
    assert job.cancelled
