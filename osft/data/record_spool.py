"""Records on disk, between being read in the files' order and being used in the order of their content.

Memory holds 72 bytes of each record. The records lie in a file without a name, in the folder where what is made of them
will be; it is gone with the process, however that ends. A full disk raises OSError.
"""

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from osft.data.records import Record

DIGEST = np.dtype("S32")
"""A SHA-256. Compares as bytes; the zeros at the end that Python does not show are there in the array's memory."""

Digests = np.ndarray
"""(n,) of dtype DIGEST."""


class RecordSpool:
    """All records of an iterable, read once, by their number in its order."""

    def __init__(self, records: Iterable[Record], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  open until `close`
        self._bounds = array("q", [0])
        contents, prompts = bytearray(), bytearray()
        for record in records:
            contents += bytes.fromhex(record.content_hash)
            prompts += bytes.fromhex(record.prompt_hash)
            self._bounds.append(self._bounds[-1] + self._file.write(pickle.dumps(record, pickle.HIGHEST_PROTOCOL)))
        self._file.flush()
        self.content_hashes: Digests = np.frombuffer(contents, DIGEST)
        self.prompt_hashes: Digests = np.frombuffer(prompts, DIGEST)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def read(self, numbers: Sequence[int]) -> list[Record]:
        """Some of the records. Processes that were forked can read at the same time."""
        return [self._read(number) for number in numbers]

    def _read(self, number: int) -> Record:
        begin, end = self._bounds[number], self._bounds[number + 1]
        record: Record = pickle.loads(os.pread(self._file.fileno(), end - begin, begin))  # which this process wrote
        return record

    def close(self) -> None:
        """Give the disk's space back."""
        self._file.close()
