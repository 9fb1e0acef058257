"""The records of a data source that no ancestor of a model has learned, as one file addressed by their content.

Records are told apart by their own content: neither the file that they stand in nor their order nor how often they
come matters. Memory holds 24 bytes of each new line, the records themselves go through a temporary file.
"""

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

import numpy as np

from osft import storage
from osft.data.record_hashes import HASH, Hashes, contains, record_hash
from osft.data.records import DataError, Record
from osft.rounds.sources import Source
from osft.storage.atomic import atomic_path
from osft.tracking.lineage import DataManifest

_CHUNK = 1 << 11
"""Records whose hashes are looked up together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRecords:
    """What `find_new_records` found."""

    data: DataManifest
    location: str
    """Path or URI of the JSON lines, in the order of their hashes; empty if there are too few."""
    files: frozenset[str]
    """What the new records were read from, as their sources name it."""
    conversions: Mapping[str, int]
    """What was converted and ignored (`osft.data.records.report_lines`)."""


def find_new_records(source: Source, known: Hashes, folder: str, *, min_new_samples: int = 1) -> NewRecords:
    """Read a source, and write its distinct records that are not in `known` to `folder`/<hash>.jsonl.

    `folder` is a path or URI. With fewer than `min_new_samples` new records nothing is written. The name is the hash of
    the records' hashes; a file that is there is left alone, and one is complete or absent.

    Raises as the source: FileNotFoundError for what is not there, DataError for a bad record; and DataError if the new
    records have one prompt in all, of which nothing could be held out.
    """
    with tempfile.TemporaryFile() as spool:
        spooled = _spool(source, known, spool)
        distinct, first = np.unique(spooled.hashes, return_index=True)
        data = source.manifest(num_records=spooled.num_records, num_new=len(distinct))
        if len(distinct) < max(1, min_new_samples):
            return NewRecords(data=data, location="", files=spooled.files, conversions=source.conversions)
        if len(spooled.prompts) < 2:
            raise DataError(
                f"{source.uri}: the {len(distinct)} new records have one prompt in all, and a round needs one to learn "
                "and one to measure. Give more records, or set min_new_samples=2 to wait for them"
            )
        location = storage.join(folder, f"{hashlib.sha256(distinct.tobytes()).hexdigest()[:32]}.jsonl")
        if storage.find(location) is None:
            with atomic_path(storage.local(location)) as temporary, temporary.open("wb") as lines:
                for at in first.tolist():
                    begin, end = spooled.bounds[at], spooled.bounds[at + 1]
                    lines.write(os.pread(spool.fileno(), end - begin, begin))
            storage.publish(location)
    return NewRecords(data=data, location=location, files=spooled.files, conversions=source.conversions)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spooled:
    """The n records that are not known."""

    hashes: Hashes
    """(n,)"""
    bounds: "array[int]"
    """(n + 1,): where their lines begin and end, in bytes."""
    files: frozenset[str]
    prompts: frozenset[str]
    """Hashes of two of their prompts, or of the only one."""
    num_records: int
    """How many there were in all, with those that are known."""


def _spool(source: Source, known: Hashes, spool: IO[bytes]) -> _Spooled:
    """Write the records that are not known."""
    hashes, bounds, num_records = bytearray(), array("q", [0]), 0
    files, prompts = set[str](), set[str]()
    for chunk in _chunks(source.records()):
        num_records += len(chunk)
        of_chunk = np.array([record_hash(record) for record in chunk], HASH)
        is_known = contains(known, of_chunk)
        hashes += of_chunk[~is_known].tobytes()
        for record, skip in zip(chunk, is_known.tolist(), strict=True):
            if not skip:
                files.add(record.source.rpartition(":")[0])
                if len(prompts) < 2:
                    prompts.add(record.prompt_hash)
                written = spool.write(json.dumps(record.to_dict(), ensure_ascii=False).encode() + b"\n")
                bounds.append(bounds[-1] + written)
    if not num_records:
        raise DataError(f"{source.uri} holds no record. Give at least one")
    spool.flush()
    return _Spooled(
        hashes=np.frombuffer(hashes, HASH),
        bounds=bounds,
        files=frozenset(files),
        prompts=frozenset(prompts),
        num_records=num_records,
    )


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
