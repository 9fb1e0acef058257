"""Hashes of what files hold, so that they are told apart by content and not by name.

A file is read once in a process: its hash is kept for as long as it is the same file of the same size and times of
change. Files of a large model are read by several threads, with a progress bar if it takes long.
"""

import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

_PARALLEL = 8
"""Files that are hashed at once; hashlib and reading let other threads run."""
_JUST_CHANGED_NS = 2 * 10**9
"""A file can be changed again within one tick of the clock: what is younger than this is not kept."""
_kept: dict[tuple[str, int, int, int, int, int], str] = {}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        key = (str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if key in _kept:
            return _kept[key]
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if abs(time.time_ns() - status.st_mtime_ns) > _JUST_CHANGED_NS:
        _kept[key] = found
    return found


def files_sha256(files: Iterable[Path]) -> dict[Path, str]:
    """`file_sha256` of each file, by several threads."""
    sizes = {file: file.stat().st_size for file in files}
    found = {}
    with (
        # Seconds of delay: a small model needs no line.
        tqdm(total=sum(sizes.values()), desc="hash", unit="B", unit_scale=True, mininterval=2.0, delay=5.0) as bar,
        ThreadPoolExecutor(_PARALLEL, thread_name_prefix="osft-hash") as pool,
    ):
        for file, digest in zip(sizes, pool.map(file_sha256, sizes), strict=True):
            found[file] = digest
            bar.update(sizes[file])
    return found


def folder_sha256(folder: Path, *, hidden: bool = True) -> str:
    """SHA-256 over the relative names and the bytes of a folder's files, with or without hidden ones."""
    names = {file: file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()}
    wanted = [file for file, name in names.items() if hidden or not any(part.startswith(".") for part in name.parts)]
    return named_sha256({names[file].as_posix(): digest for file, digest in files_sha256(wanted).items()})


def named_sha256(digests: dict[str, str]) -> str:
    """SHA-256 over names and the hashes that belong to them, in their order."""
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests.items()).encode()).hexdigest()
