"""Sets of records by their content: sorted arrays of 16-byte hashes, in memory and as a file.

A million records take 16 MB. 16 of the 32 bytes of a SHA-256 tell 2^40 records apart with a chance of 2^-49 that any
two are taken for one.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from osft.data.records import Record
from osft.storage.atomic import atomic_path

HASH = np.dtype("S16")
"""Compares as bytes. The zeros at the end that Python does not show are there in the array's memory."""

RECORDS_FILE = "records.bin"
"""Of a prepared dataset, and of a model version's lineage: the records that it took."""

Hashes = np.ndarray
"""(n,) of dtype HASH."""

NONE = np.empty(0, HASH)


def record_hash(record: Record) -> bytes:
    """The first 16 bytes of the record's content hash."""
    return bytes.fromhex(record.content_hash[: 2 * HASH.itemsize])


def shortened(content_hashes: np.ndarray) -> Hashes:
    """What is kept of whole hashes, (n,) of 32 bytes."""
    return np.ascontiguousarray(content_hashes).view(HASH)[::2]


def union(sets: Iterable[Hashes]) -> Hashes:
    """One set of all hashes, given in any order and with duplicates.

    A second for 10 million in sets, since the stable sort merges what is sorted; 24 bytes of each in memory meanwhile.
    """
    hashes = np.concatenate([NONE, *sets])
    hashes.sort(kind="stable")
    is_first = np.ones(len(hashes), bool)
    np.not_equal(hashes[1:], hashes[:-1], out=is_first[1:])
    return hashes if is_first.all() else hashes[is_first]


def contains(known: Hashes, hashes: Hashes) -> np.ndarray:
    """(n,) bool: which of `hashes`, any array, are in the set `known`."""
    if not len(known):
        return np.zeros(len(hashes), bool)
    at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    found: np.ndarray = known[at] == hashes
    return found


def write_hashes(path: Path, hashes: Hashes) -> None:
    """Write a set, atomically: its hashes one after another, sorted, each once."""
    with atomic_path(path) as temporary:
        union([hashes]).tofile(temporary)


def read_hashes(path: Path) -> Hashes:
    """The set of a file. Raises ValueError if the file is not one."""
    content = path.read_bytes()
    hashes = np.frombuffer(content, HASH) if len(content) % HASH.itemsize == 0 else None
    if hashes is None or not (hashes[:-1] < hashes[1:]).all():
        raise ValueError(
            f"{path} is not a sorted set of {HASH.itemsize}-byte hashes: it was damaged or is another file"
        )
    return hashes
