"""Uploads that are slower than collective operations may be, with real process groups."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from osft.training.state_upload import StateUpload
from tests.training.in_processes import in_processes

TIMEOUT_SECONDS = 1.2
UPLOAD_SECONDS = 2.0


def step(upload: StateUpload) -> None:
    """What a training step does with an upload."""
    told = torch.tensor(int(upload.is_busy))
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
    if not told.item():
        upload.go_on()
    time.sleep(0.02)


def stages(rank: int, folder: Path) -> list[Callable[[], None]]:
    """Rank 1 is slow with its shard; rank 0 notes what it finds when it completes the state."""

    def shard() -> None:
        time.sleep(UPLOAD_SECONDS * rank)
        (folder / f"shard-{rank}").touch()

    def complete() -> None:
        if rank == 0:
            names = sorted(file.name for file in folder.glob("shard-*"))
            (folder / "position").write_text(" ".join(names))

    return [lambda: None, shard, complete]


@pytest.mark.parametrize("trains_on", [True, False], ids=["while training", "at its end"])
def test_slow_upload_of_a_rank_does_not_end_the_others(tmp_path, trains_on):
    def run(rank: int) -> bool:
        upload = StateUpload()
        upload.begin(stages(rank, tmp_path))
        for _ in range(150 if trains_on else 0):
            step(upload)
        is_complete = (tmp_path / "position").exists()
        upload.settle()
        return is_complete

    assert in_processes(run, tmp_path, timeout_seconds=TIMEOUT_SECONDS)[0] is trains_on
    assert (tmp_path / "position").read_text() == "shard-0 shard-1"


def test_waiting_for_it_in_a_barrier_would(tmp_path):
    """What the above is compared with: the timeout is real."""

    def run(rank: int) -> None:
        time.sleep(UPLOAD_SECONDS * rank)
        torch.distributed.barrier()

    assert "timed out" in str(in_processes(run, tmp_path, timeout_seconds=TIMEOUT_SECONDS)[0]).lower()


def test_next_state_waits_for_the_one_before(tmp_path):
    def run(rank: int) -> list[str]:
        upload, done = StateUpload(), []
        for name in ("first", "second"):
            upload.settle()
            upload.begin([lambda: None, lambda n=name: (time.sleep(0.2 * rank), done.append(n)), lambda: None])
        upload.settle()
        return done

    assert in_processes(run, tmp_path, timeout_seconds=TIMEOUT_SECONDS) == [["first", "second"]] * 2


def test_error_of_an_upload_is_raised_with_the_next_step():
    upload = StateUpload()

    def fails() -> None:
        raise PermissionError("told to fail")

    upload.begin([lambda: None, fails, lambda: None])
    upload.join()
    with pytest.raises(PermissionError, match="told to fail"):
        _ = upload.is_busy
    with pytest.raises(PermissionError, match="told to fail"):
        upload.settle()


def test_single_process_uploads_all_stages_in_their_order_without_further_steps():
    done: list[int] = []
    upload = StateUpload()
    upload.begin([lambda n=n: done.append(n) for n in range(3)])
    upload.settle()
    assert done == [0, 1, 2]
    assert upload.is_over
