"""Many records -> samples, by as many processes as there are cores to use, in the records' order.

The processes are forked, so that a caller's script is not run again in each of them, and work on chunks that they read
themselves; few of these are under way at a time, whatever the number of records. Few records stay in this process.
The first record that cannot be tokenized ends it all with its DataError; a process that is killed, for want of memory
mostly, with BrokenProcessPool. The processes end with this one, however it ends.

What has been tokenized is kept in files until the caller is done with all of it, so that after a kill only the rest has
to be: a chunk's file is there whole or not at all, two preparations of the same records write the same ones, and one
whose files the other has removed makes them again.
"""

import json
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from osft.data.chat import tokenize_all
from osft.data.record_spool import RecordSpool
from osft.data.sample_table import SAMPLES, Row, rows_of, to_batch
from osft.data.template_keys import replaced_roles
from osft.process.termination import end_with_parent
from osft.storage.atomic import atomic_path

CHUNK = 256
"""Records that are tokenized together."""
LEAST_CHUNKS = 8
"""For each process; less is not worth one."""
_MOST_PROCESSES = 16
"""One process reads and writes for all of them."""
_ROLES = b"replaced_roles"
_AHEAD = 2
"""Chunks under way, for each process."""
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
"""Of a container: microseconds of all cores together in a period, and the period; `max` without a limit."""


@dataclass(frozen=True, slots=True)
class TokenizedChunk:
    """Records of a spool, tokenized."""

    numbers: Sequence[int]
    """Theirs in the spool."""
    samples: list[Row]
    replaced_roles: Counter[str]
    """`osft.data.template_keys.replaced_roles` of all of them."""

    def save(self, file: Path) -> None:
        """Write it to a file, whole or not at all."""
        schema = SAMPLES.with_metadata({_ROLES: json.dumps(self.replaced_roles)})
        with atomic_path(file) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
            writer.write_batch(to_batch(self.samples))

    @classmethod
    def load(cls, file: Path, numbers: Sequence[int]) -> "TokenizedChunk | None":
        """What was saved for these numbers, or None."""
        try:
            with pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped) as reader:
                samples = rows_of(reader.get_batch(0))
                roles: Counter[str] = Counter(json.loads(reader.schema.metadata[_ROLES]))
        except FileNotFoundError:
            return None
        return cls(numbers, samples, roles)


@dataclass(frozen=True, slots=True)
class Tokenizing:
    """How the records of a spool are tokenized."""

    spool: RecordSpool
    tokenizer: PreTrainedTokenizerBase
    unmask_messages: bool
    kept: Path
    """Folder for the files of the chunks: of these records, tokenized so, and nothing else."""

    def chunks(self, numbers: Sequence[int]) -> Iterator[TokenizedChunk]:
        """The records with these numbers in the spool, in this order. Raises as `osft.data.chat.tokenize`."""
        parts = [numbers[at : at + CHUNK] for at in range(0, len(numbers), CHUNK)]
        if len(parts) < LEAST_CHUNKS:
            yield from map(self._chunk, parts)
            return
        self.kept.mkdir(parents=True, exist_ok=True)
        processes = min(_usable_cores(), _MOST_PROCESSES, len(parts) // LEAST_CHUNKS)
        if processes < 2:
            for at, part in enumerate(parts):
                self._save(at, part)
                yield self._saved(at, part)
            return
        with ProcessPoolExecutor(
            processes, multiprocessing.get_context("fork"), initializer=_begin, initargs=(self, os.getpid())
        ) as pool:
            pending: deque[Future[None]] = deque()
            begun = 0
            try:
                for at, part in enumerate(parts):
                    while begun < min(len(parts), at + _AHEAD * processes):
                        pending.append(pool.submit(_save, begun, parts[begun]))
                        begun += 1
                    pending.popleft().result()
                    yield self._saved(at, part)
            finally:
                for future in pending:
                    future.cancel()

    def _save(self, at: int, numbers: Sequence[int]) -> None:
        """Tokenize chunk `at` if that has not been done yet."""
        if not self._file(at).exists():
            chunk = self._chunk(numbers)
            with suppress(FileNotFoundError):  # another preparation is done, and has removed the folder
                chunk.save(self._file(at))

    def _saved(self, at: int, numbers: Sequence[int]) -> TokenizedChunk:
        return TokenizedChunk.load(self._file(at), numbers) or self._chunk(numbers)

    def _file(self, at: int) -> Path:
        return self.kept / f"{at:08d}.arrow"

    def _chunk(self, numbers: Sequence[int]) -> TokenizedChunk:
        records = self.spool.read(numbers)
        samples = tokenize_all(records, self.tokenizer, unmask_messages=self.unmask_messages)
        template = self.tokenizer.get_chat_template() if self.tokenizer.chat_template else ""
        return TokenizedChunk(
            numbers,
            [
                (np.array(sample.input_ids, np.int32), np.array(sample.labels, np.int32), record.source)
                for sample, record in zip(samples, records, strict=True)
            ],
            Counter(name for record in records for name in replaced_roles(template, record)),
        )


_of_this_process: list[Tokenizing] = []
"""In a forked process: what it works at."""


def _begin(tokenizing: Tokenizing, parent: int) -> None:
    signal.set_wakeup_fd(-1)  # which would tell the parent of signals that are for this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, ends this process
    end_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own
    _of_this_process.append(tokenizing)


def _save(at: int, numbers: Sequence[int]) -> None:
    _of_this_process[-1]._save(at, numbers)


def _usable_cores() -> int:
    """Those that this process may run on, or fewer where its container has less of their time."""
    cores = len(os.sched_getaffinity(0))
    limit, _, period = _CPU_LIMIT.read_text().partition(" ") if _CPU_LIMIT.is_file() else ("max", "", "")
    return cores if limit == "max" else max(1, min(cores, int(limit) // int(period)))
