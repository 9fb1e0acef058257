"""Whether the storage root, where it is a folder that is mounted here, has locks, durable writes and room."""

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.filesize import decimal

from osft import storage
from osft.doctor.finding import Finding, NotChecked, error, ok, separated, warning
from osft.doctor.subject import Subject
from osft.process.errors import explained
from osft.storage.atomic import create_exclusively, flush, flush_folder
from osft.storage.lock import exclusive
from osft.storage.paths import check_writable

_CREATORS = 8
_SLOW_FLUSH_SECONDS = 1.0
_SMALL = 20e9
"""Bytes below which even a model of 1B has hardly room: weights, exact weights, the training state twice."""


def check_storage_folder(subject: Subject) -> Iterator[Finding]:
    """Is the storage root writable, do locks and fsync work there, is there room?"""
    root = subject.configuration.storage_root
    if storage.is_remote(root):
        yield ok("storage folder", f"none: storage_root is {root}")
        return
    about = f"storage_root {root}"
    if not Path(root).is_dir():
        if subject.has_cluster or subject.configuration.launcher != "local":
            raise NotChecked(f"{root} is not mounted here: run osft doctor in a pod that mounts the claim")
        try:
            check_writable("storage_root", root)
        except ValueError as reason:
            yield error(about, *separated(reason))
        else:
            yield ok(about, "is made by the first round")
        return
    yield from probe(Path(root), about)


def probe(root: Path, about: str) -> Iterator[Finding]:
    """Try a folder out, in one of its own that is removed again."""
    folder = root / f".osft-doctor-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
    except OSError as failure:
        remedy = "Make it writable for the pods' user (fs_group, run_as_user of the job; the volume's own permissions)"
        yield error(about, f"cannot be written to: {explained(failure, path=str(root))}", remedy)
        return
    try:
        yield _creation(folder, about)
        yield _lock(folder, about)
        yield _durability(folder, about)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(root).free
    if free < _SMALL:
        yield warning(about, f"has {decimal(free)} free", "Free some (osft clean), or enlarge the volume")
    else:
        yield ok(about, f"has {decimal(free)} free")


def _creation(folder: Path, about: str) -> Finding:
    """Of several creators of one file one must win: the lock and the champion rest on it."""
    with ThreadPoolExecutor(_CREATORS) as pool:
        made = list(pool.map(lambda n: create_exclusively(folder / "one", str(n).encode()), range(_CREATORS)))
    if sum(made) != 1:
        remedy = "Use a file system on which a file is created by one only (NFS 4, CephFS, EFS, a local disk)"
        return error(about, f"{sum(made)} of {_CREATORS} creators of one file were told that they made it", remedy)
    return ok(about, "a file is created by one only")


def _lock(folder: Path, about: str) -> Finding:
    with exclusive(folder):
        try:
            with exclusive(folder):
                pass
        except RuntimeError:
            return ok(about, "a folder is locked for others")
    return error(about, "a folder that is locked was locked again", "Use another file system: NFS 4, CephFS, EFS")


def _durability(folder: Path, about: str) -> Finding:
    file = folder / "flushed"
    file.write_bytes(os.urandom(1 << 20))
    began = time.monotonic()
    try:
        flush(file)
        flush_folder(folder)
    except OSError as failure:
        remedy = "Mount it with a file system that can flush (fsync), or keep everything in an object store"
        return error(about, f"cannot flush a file: {explained(failure, path=str(folder))}", remedy)
    seconds = time.monotonic() - began
    if seconds > _SLOW_FLUSH_SECONDS:
        remedy = "Expect slow saves: use faster storage, or a larger save_state_steps"
        return warning(about, f"takes {seconds:.1f} s to flush 1 MB to the disk", remedy)
    return ok(about, f"flushes 1 MB in {seconds * 1000:.0f} ms")
