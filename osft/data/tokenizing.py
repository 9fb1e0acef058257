"""Many records -> samples, by as many processes as there are cores to use, in the records' order.

The processes are forked, so that a caller's script is not run again in each of them, and work on chunks that they read
themselves; few of these are under way at a time, whatever the number of records. Few records stay in this process.
The first record that cannot be tokenized ends it all with its DataError; a process that is killed, for want of memory
mostly, with BrokenProcessPool. The processes end with this one, however it ends.
"""

import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from osft.data.chat import tokenize_all
from osft.data.record_spool import RecordSpool
from osft.data.template_keys import replaced_roles
from osft.process.termination import end_with_parent

CHUNK = 256
"""Records that are tokenized together."""
LEAST_CHUNKS = 8
"""For each process; less is not worth one."""
_MOST_PROCESSES = 16
"""One process reads and writes for all of them."""
_AHEAD = 2
"""Chunks under way, for each process."""
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
"""Of a container: microseconds of all cores together in a period, and the period; `max` without a limit."""


@dataclass(frozen=True, slots=True)
class TokenizedChunk:
    """Records of a spool, tokenized."""

    numbers: Sequence[int]
    """Theirs in the spool."""
    samples: list[tuple[np.ndarray, np.ndarray, str]]
    """Tokens and labels, (T,) int32 each, and the record's source."""
    replaced_roles: Counter[str]
    """`osft.data.template_keys.replaced_roles` of all of them."""


@dataclass(frozen=True, slots=True)
class Tokenizing:
    """How the records of a spool are tokenized."""

    spool: RecordSpool
    tokenizer: PreTrainedTokenizerBase
    unmask_messages: bool

    def chunks(self, numbers: Sequence[int]) -> Iterator[TokenizedChunk]:
        """The records with these numbers in the spool, in this order. Raises as `osft.data.chat.tokenize`."""
        parts = [numbers[at : at + CHUNK] for at in range(0, len(numbers), CHUNK)]
        processes = min(_usable_cores(), _MOST_PROCESSES, len(parts) // LEAST_CHUNKS)
        if processes < 2:
            yield from map(self._chunk, parts)
            return
        with ProcessPoolExecutor(
            processes, multiprocessing.get_context("fork"), initializer=_begin, initargs=(self, os.getpid())
        ) as pool:
            pending: deque[Future[TokenizedChunk]] = deque()
            try:
                for part in parts:
                    pending.append(pool.submit(_chunk, part))
                    if len(pending) >= _AHEAD * processes:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

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


def _chunk(numbers: Sequence[int]) -> TokenizedChunk:
    return _of_this_process[-1]._chunk(numbers)


def _usable_cores() -> int:
    """Those that this process may run on, or fewer where its container has less of their time."""
    cores = len(os.sched_getaffinity(0))
    limit, _, period = _CPU_LIMIT.read_text().partition(" ") if _CPU_LIMIT.is_file() else ("max", "", "")
    return cores if limit == "max" else max(1, min(cores, int(limit) // int(period)))
