"""Who follows a job on a cluster holds a lease on it; a job that nobody follows any more ends by itself.

A step that is cancelled may die before it can delete its job: KFP's launcher and the kernel leave it less than a
second, and the API may be slow. So it renews a file of the output folder as long as it lives, and rank 0 looks whether
that changes:

    the step is killed, and retried       the retried one finds the job and renews: nothing has happened
    it is cancelled and cannot delete     after `minutes` without a renewal the run saves its state and ends with
                                          ABANDONED, which the operator takes for the job's end
    the store does not answer             what cannot be read is not known to be old: that time does not count

Only changes of the file are compared, by one clock each: those of different machines need not agree.
"""

import logging
import os
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

from osft import storage

logger = logging.getLogger(__name__)

MINUTES = "OSFT_LEASE_MINUTES"
"""Environment of a job's processes: how long nobody may follow it. Without it there is no lease."""
_FILE = "lease"
_LOOKS = 8  # and renewals, in the time of a lease
_MOST_SECONDS = 30.0  # between two


class Lease:
    """Renews the lease on the job that writes to the folder or URI `output`, until the block ends."""

    def __init__(self, output: Path | str, *, minutes: float) -> None:
        self._address = storage.join(output, _FILE)
        self._interval = min(_MOST_SECONDS, minutes * 60 / _LOOKS)
        self._holder = uuid.uuid4().hex
        self._ended = threading.Event()

    def __enter__(self) -> "Lease":
        # No other thread waits for this one: who is asked to end has no time for a store that does not answer.
        threading.Thread(target=self._run, name="osft-lease", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()

    def _run(self) -> None:
        renewals, failed = 0, False
        while True:
            renewals += 1
            try:
                storage.write(self._address, f"{self._holder} {renewals}\n".encode())
                failed = False
            except Exception as error:  # of any store's client
                if not failed:
                    logger.warning(f"train: the lease on the job cannot be renewed, trying again: {error}")
                failed = True
            if self._ended.wait(self._interval):
                return


class LeaseWatch:
    """Looks whether the lease on the run that writes to `output` is renewed, in a thread of its own."""

    def __init__(self, output: Path | str, *, minutes: float) -> None:
        self._address, self._seconds = storage.join(output, _FILE), minutes * 60
        self._interval = min(_MOST_SECONDS, self._seconds / _LOOKS)
        self._content: bytes | None = None
        self._silent = 0.0
        self.is_lost = False
        """Whether nobody has renewed it for `minutes`."""

    @classmethod
    def of_this_process(cls, output: Path | str) -> "LeaseWatch | None":
        """The watch that the environment asks for, started; None without one."""
        minutes = float(os.environ.get(MINUTES, 0))
        if not minutes:
            return None
        watch = cls(output, minutes=minutes)
        threading.Thread(target=watch._run, name="osft-lease", daemon=True).start()
        return watch

    def _run(self) -> None:
        looked = time.monotonic()
        while not self.is_lost:
            time.sleep(self._interval)
            now = time.monotonic()
            self.look(now - looked)
            looked = now
        logger.warning(f"train: nobody has followed this run for {self._silent / 60:.0f} min, so it saves and ends")

    def look(self, seconds: float) -> None:
        """Read the file, `seconds` after the last look."""
        try:
            content = storage.read(self._address)
        except Exception as error:  # of any store's client
            logger.warning(f"train: the lease on this run cannot be read, trying again: {error}")
            return
        self._silent = self._silent + seconds if content == self._content else 0.0
        self._content = content
        self.is_lost = self._silent >= self._seconds
