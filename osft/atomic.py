"""Files and folders that are either complete or absent.

A process can be killed at any moment. What it was writing lies under a name with `.incomplete-` in it, which
nothing reads, and the final name appears in one rename after the last byte is on disk.
"""

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _incomplete(path: Path) -> Path:
    return path.with_name(f"{path.name}.incomplete-{uuid.uuid4().hex[:8]}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for a file or folder; renamed to `path` if the block succeeds.

    An existing file is replaced. An existing folder is kept and the new one dropped: two writers of the same
    content-addressed folder are no conflict. If the block raises, nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _incomplete(path)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            return
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path, *, patience_seconds: float = 0.0) -> Iterator[None]:
    """Keep other processes out of `folder` until the block ends, or this process does.

    Raises RuntimeError if another one is in it, and still is after `patience_seconds`: the lock of a process whose
    machine died stays on a network file system for a while.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_seconds
    with (folder / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise RuntimeError(
                        f"another process is writing to {folder}. Wait for it, or give another folder"
                    ) from None
                time.sleep(0.5)
        yield


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
