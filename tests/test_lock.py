"""One process at a time in a folder, whatever the file system and whatever becomes of the owner."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from osft.storage import lock
from osft.storage.lock import LockLost, exclusive

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.04)
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 0.4)


def started(work: Callable[..., None], *arguments: object) -> multiprocessing.Process:
    process = FORK.Process(target=work, args=arguments)
    process.start()
    return process


def hold(folder: Path, machine: str = "") -> None:
    if machine:
        lock._machine = lambda: machine
    with exclusive(folder) as held:
        (folder / "held").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        held.check()
        (folder / "written").touch()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.005)


def no_locks(error: int) -> Callable[..., None]:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(error, os.strerror(error))

    return refuse


@pytest.mark.parametrize("fault", ["", "flock", "lockf", "link", "silent flock"])
def test_second_process_is_refused_by_name_on_any_file_system(fault, tmp_path, monkeypatch):
    if fault == "silent flock":
        monkeypatch.setattr(fcntl, "flock", lambda *arguments: None)
    elif fault == "link":
        monkeypatch.setattr(os, "link", no_locks(errno.EPERM))
    elif fault:
        monkeypatch.setattr(fcntl, fault, no_locks(errno.ENOLCK))
    owner = started(hold, tmp_path)
    wait_for(tmp_path / "held")
    with (
        pytest.raises(RuntimeError, match=rf"another process is writing to {tmp_path}: process {owner.pid} on "),
        exclusive(tmp_path),
    ):
        pass
    (tmp_path / "go").touch()
    owner.join()
    assert owner.exitcode == 0
    with exclusive(tmp_path):
        pass


def count(folder: Path) -> None:
    for _ in range(6):
        with exclusive(folder, patience_seconds=60):
            before = int((folder / "count").read_text())
            time.sleep(0.002)
            (folder / "count").write_text(str(before + 1))


def test_processes_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 60.0)
    (tmp_path / "count").write_text("0")
    processes = [started(count, tmp_path) for _ in range(5)]
    for process in processes:
        process.join()
    assert (tmp_path / "count").read_text() == "30"
    assert len(os.listdir(tmp_path / ".lock")) <= 2, "what is over is removed"


def test_killed_owner_of_this_machine_is_followed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 3600.0)
    owner = started(hold, tmp_path)
    wait_for(tmp_path / "held")
    os.kill(owner.pid, signal.SIGKILL)
    while Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.005)
    with exclusive(tmp_path):
        pass
    owner.join()


def test_killed_owner_of_another_machine_is_followed_after_its_expiry(tmp_path):
    owner = started(hold, tmp_path, "another")
    wait_for(tmp_path / "held")
    time.sleep(0.6)
    with pytest.raises(RuntimeError, match="another process is writing"), exclusive(tmp_path):
        pass  # longer than the expiry, but it lives
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    killed = time.monotonic()
    with exclusive(tmp_path, patience_seconds=30):
        assert time.monotonic() - killed > 0.2


def test_paused_owner_that_wakes_up_writes_nothing_more(tmp_path):
    owner = started(hold, tmp_path, "another")
    wait_for(tmp_path / "held")
    os.kill(owner.pid, signal.SIGSTOP)
    with exclusive(tmp_path, patience_seconds=30) as taken:
        (tmp_path / "go").touch()
        os.kill(owner.pid, signal.SIGCONT)
        owner.join()
        assert owner.exitcode == 1
        assert not (tmp_path / "written").exists()
        taken.check()
    with pytest.raises(LockLost, match=f"{tmp_path} was taken over by another process"):
        lock.check_owner(tmp_path / ".lock" / "1")


@pytest.mark.parametrize("hours", [-5, 5])
def test_clock_of_this_machine_does_not_matter(hours, tmp_path, monkeypatch):
    owner = started(hold, tmp_path, "another")
    wait_for(tmp_path / "held")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + hours * 3600)
    with pytest.raises(RuntimeError, match=r"last sign of life 0 s ago"), exclusive(tmp_path):
        pass
    (tmp_path / "go").touch()
    owner.join()


def test_jump_of_the_file_systems_clock_takes_nothing_from_a_living_owner(tmp_path, monkeypatch):
    owner = started(hold, tmp_path, "another")
    wait_for(tmp_path / "held")
    now = lock._file_system_now
    monkeypatch.setattr(lock, "_file_system_now", lambda folder: now(folder) + 3600 * 10**9)
    waiting = started(lambda: exclusive(tmp_path, patience_seconds=1).__enter__())
    waiting.join(0.7)
    assert waiting.is_alive(), "it watches"
    waiting.kill()
    waiting.join()
    (tmp_path / "go").touch()
    owner.join()
    assert owner.exitcode == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"machine": 1}', b"\xff"])
def test_unreadable_lock_is_held_until_it_expires(content, tmp_path):
    (tmp_path / ".lock").mkdir()
    (tmp_path / ".lock" / "3").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"\.lock/3 cannot be read"), exclusive(tmp_path):
        pass
    os.utime(tmp_path / ".lock" / "3", (1, 1))
    with exclusive(tmp_path) as held:
        assert held.file.name == "4"


def test_lock_of_an_older_release_is_replaced(tmp_path):
    (tmp_path / ".lock").write_text("")
    with exclusive(tmp_path) as held:
        assert json.loads(held.file.read_text())["process"] == os.getpid()


def test_creator_that_saw_an_older_owner_does_not_get_the_folder(tmp_path, monkeypatch):
    """It judged number 1 free, and meanwhile others owned numbers 2 and 3 and removed what came before."""
    with exclusive(tmp_path):
        pass
    (tmp_path / ".lock" / "3").write_text((tmp_path / ".lock" / "1").read_text().replace("true", "false"))
    (tmp_path / ".lock" / "1").unlink()
    numbers = iter([1])
    newest = lock._newest
    monkeypatch.setattr(lock, "_newest", lambda locks: next(numbers, None) or newest(locks))
    monkeypatch.setattr(lock._Watched, "is_free", lambda self, file: file.name == "1")
    with pytest.raises(RuntimeError, match="another process is writing"), exclusive(tmp_path):
        pass
