"""One process at a time in a folder, also where the file system has no locks (NFS without lockd, FUSE).

    <folder>/.lock/<n>    the owner: machine, process, host. Its time of change is its last sign of life.
                          The highest number counts; to own the folder is to have created it

An owner renews its file every HEARTBEAT_SECONDS. Whoever wants the folder creates the file with the next number, which
one process can do (`osft.storage.atomic.create_exclusively`), when the owner has released it or is dead:

    the owner releases it              free at once
    the owner is killed                free at once for a process of the same machine and container, which sees that it
                                       is gone; elsewhere after EXPIRY_SECONDS without a sign of life
    the owner's machine dies           free after EXPIRY_SECONDS
    the owner is paused that long      taken over; when it wakes, `Lock.check` and `check_owner` raise LockLost before
                                       it writes
    two processes take over at once    one of them creates the next number, the other one waits for that
    clocks differ                      times are those of the file system: a new file's are compared with the owner's
    the file system's clock jumps      no effect: an owner is dead only if its file also stayed unchanged for two
                                       heartbeats while it was watched
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from osft.storage.atomic import create_exclusively, write_json

HEARTBEAT_SECONDS = 5.0
EXPIRY_SECONDS = 60.0
_FOLDER = ".lock"


class LockLost(RuntimeError):
    """Another process has taken a folder over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Owner:
    """The content of a lock's file."""

    machine: str
    """The machine's boot and the container: processes that have this in common see each other's numbers."""
    process: int
    started: str
    """When the process started: tells it from a later one with its number."""
    host: str
    token: str
    """Random: no two owners are equal."""
    released: bool = False


class Lock:
    """A folder that is owned."""

    def __init__(self, file: Path, owner: _Owner) -> None:
        self.file = file
        """Give it to `check_owner` in another process."""
        self._owner = owner
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="osft-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LockLost unless the folder is still owned."""
        check_owner(self.file)

    def release(self) -> None:
        """Let others have the folder."""
        self._ended.set()
        self._thread.join()
        if self.file.is_file():
            write_json(self.file, asdict(self._owner) | {"released": True})

    def _renew(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.file)
            except FileNotFoundError:  # removed by the next owner
                return
            except OSError:  # the file system is away: try again
                continue


@contextmanager
def exclusive(folder: Path, *, patience_seconds: float = 0.0) -> Iterator[Lock]:
    """Keep other processes out of `folder` until the block ends, or this process does.

    Raises RuntimeError if another one is in it, and still is after `patience_seconds`; where the other one seems to be
    dead, it is watched for two heartbeats first.
    """
    lock = _acquire(folder, patience_seconds)
    try:
        yield lock
    finally:
        lock.release()


def check_owner(file: Path) -> None:
    """Raise LockLost if the folder that `file` is the lock of was taken over."""
    _file_system_now(file.parent)  # on a network file system, makes the listing a new one
    if _newest(file.parent) != int(file.name):
        raise LockLost(
            f"{file.parent.parent} was taken over by another process, because this one gave no sign of life for "
            f"{EXPIRY_SECONDS:.0f} s. Nothing more is written there: follow the other one, or start again when it ended"
        )


def _acquire(folder: Path, patience_seconds: float) -> Lock:
    locks = folder / _FOLDER
    if locks.is_file():  # of a release that locked a file
        locks.unlink(missing_ok=True)
    locks.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_seconds
    watched = _Watched()
    while True:
        newest = _newest(locks)
        if newest == 0 or watched.is_free(locks / str(newest)):
            file, owner = locks / str(newest + 1), _this_process()
            if create_exclusively(file, json.dumps(asdict(owner), indent=2).encode()) and _newest(locks) == newest + 1:
                for other in locks.iterdir():
                    if other.name.isdigit() and int(other.name) <= newest:
                        other.unlink(missing_ok=True)
                return Lock(file, owner)
        elif time.monotonic() >= deadline and not watched.seems_dead:
            raise RuntimeError(
                f"another process is writing to {folder}: {watched.description}. Wait for it, or give another folder"
            )
        time.sleep(min(0.5, HEARTBEAT_SECONDS / 10))


class _Watched:
    """What is known of the present owner."""

    def __init__(self) -> None:
        self.seems_dead = False
        """It gave no sign of life for EXPIRY_SECONDS, and is being watched."""
        self.description = "it has just begun"
        self._state: tuple[str, int] | None = None
        self._since = 0.0

    def is_free(self, file: Path) -> bool:
        """Whether the owner has released the folder or is dead."""
        try:
            with file.open("rb") as opened:  # opening makes a network file system ask its server
                changed, content = os.fstat(opened.fileno()).st_mtime_ns, opened.read()
        except FileNotFoundError:  # the next owner has come
            return False
        if (file.name, changed) != self._state:
            self._state, self._since = (file.name, changed), time.monotonic()
        age = (_file_system_now(file.parent) - changed) / 1e9
        self.seems_dead = age > EXPIRY_SECONDS
        unchanged = time.monotonic() - self._since
        try:
            owner = _Owner(**json.loads(content))
        except (ValueError, TypeError):  # not whole yet, or damaged
            self.description = f"{file} cannot be read"
        else:
            self.description = f"process {owner.process} on {owner.host}, last sign of life {max(0.0, age):.0f} s ago"
            if owner.released or _ended(owner):
                return True
        return self.seems_dead and unchanged > 2 * HEARTBEAT_SECONDS


def _newest(locks: Path) -> int:
    """The number of the present lock; 0 if there was none yet."""
    return max((int(name) for name in os.listdir(locks) if name.isdigit()), default=0)


def _file_system_now(folder: Path) -> int:
    """The time of a folder's file system, nanoseconds."""
    probe = folder / f"time-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        return probe.stat().st_mtime_ns
    finally:
        probe.unlink(missing_ok=True)


def _this_process() -> _Owner:
    process = os.getpid()
    return _Owner(
        machine=_machine(),
        process=process,
        started=_started(process),
        host=socket.gethostname(),
        token=uuid.uuid4().hex,
    )


def _ended(owner: _Owner) -> bool:
    """Whether the owner was a process of this machine and is no more."""
    return owner.machine == _machine() and _started(owner.process) != owner.started


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(process: int) -> str:
    """When a process of this machine started; empty if there is none."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return ""
    except OSError:
        return ""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"
