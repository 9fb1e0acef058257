"""Files and folders that are either complete or absent.

A process can be killed at any moment, and a machine can lose its power. What is being written lies under a name with
`.incomplete-` in it, which nothing reads, and the final name appears in one rename after the last byte is on disk.

    what happens                     what is there afterwards
    the writer raises                what was there before; the incomplete one is removed
    the writer is killed             what was there before; the incomplete one stays and is not read
    the power fails                  either the old or the whole new one: bytes, then the name, are flushed (fsync)
    the disk is full                 OSError (ENOSPC); what was there before
    two writers of one file          the later one's, whole
    two writers of one folder        the earlier one's, whole: such a folder is named by its content
    two creators of one file         the earlier one's, whole; the later one is told (`create_exclusively`)
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EMLINK, errno.EXDEV)
"""What a file system answers that cannot flush a folder, or make a hard link."""


def _incomplete(path: Path) -> Path:
    return path.with_name(f"{path.name}.incomplete-{uuid.uuid4().hex[:8]}")


@contextmanager
def atomic_path(path: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """A temporary name beside `path` for a file or folder; renamed to `path` if the block succeeds.

    An existing file is replaced, or kept if `keep_existing`. An existing folder is kept and the new one dropped: two
    writers of the same content-addressed folder are no conflict. If the block raises, nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _incomplete(path)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            return
        flush(temporary)
        if not (keep_existing and _linked(temporary, path)):
            try:
                os.replace(temporary, path)
            except OSError as error:  # another writer's folder, which came while this one was flushed
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not temporary.is_dir():
                    raise
        flush_folder(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Return when a file, or a folder with all that is in it, is on disk."""
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            if not entry.is_symlink():
                flush(entry)
        flush_folder(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Return when the names in a folder are on disk, as far as its file system can tell."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def create_exclusively(path: Path, content: bytes) -> bool:
    """Make a file that is not there yet, whole and on disk. False if it is there: one of several creators makes it.

    Creators must give different contents: on a network file system the answer to a successful request can be lost, and
    what is then found there is told to be one's own by its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _incomplete(path)
    try:
        temporary.write_bytes(content)
        flush(temporary)
        if not _linked(temporary, path):
            return _created_in_place(path, content)
        flush_folder(path.parent)
        return path.read_bytes() == content
    finally:
        temporary.unlink(missing_ok=True)


def _linked(temporary: Path, path: Path) -> bool:
    """Give a file its name if nothing has it. False if the file system has no hard links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return True
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _created_in_place(path: Path, content: bytes) -> bool:
    """As `create_exclusively`, where there are no hard links: a reader can meet the file before it is whole."""
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return path.read_bytes() == content
    flush_folder(path.parent)
    return True


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
