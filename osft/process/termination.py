"""Ending when asked to, by SIGTERM or an interrupt (SIGINT), from the first moment of a program on.

    what the process is doing             what it does when it is asked to end
    importing, preparing, waiting         SystemExit(143) or KeyboardInterrupt in the main thread, which cleans up on
                                          its way out. Foreign code that hangs (a decomposition, a connection being
                                          made) or swallows the exception is left behind after a moment: nothing is
                                          half-written then but what has `.incomplete-` in its name
    training in processes of its own      the signal is passed on to them, once; they save and end, and this process
                                          ends when they have
    ending                                nothing more: to be asked again cuts nothing off

Process 1 of a container needs this at once: the kernel drops a signal that process 1 has no handler for. So nothing is
imported here that takes time.

A process that was started for another one also ends with it, however that one ends (`end_with_parent`).
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from osft.process.exit_codes import INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT)
CAN_PASS_ON = sys.platform == "linux"
"""Where a process finds the processes that it has started."""
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
# Loaded beforehand: between fork and exec, where `end_with_parent` may be called, nothing should be.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_LOOK_SECONDS = 0.1
_HANGING_SECONDS = 1.0  # the main thread has not even come to raise
_LEAVING_SECONDS = 5.0  # it has, and is still there


class _Termination:
    """Handlers of the signals, and a thread that sees to it that something follows.

    The thread hears of a signal by a pipe that the C handler writes to: it does so while the main thread is in foreign
    code, too.
    """

    def __init__(self, *, may_exit: bool) -> None:
        self.asked: signal.Signals | None = None
        """The first signal that came."""
        self.workers: Callable[[], list[int]] | None = None
        """While it is set: gives the processes that train."""
        self.patience_seconds = 0.0
        """How long they may take to end."""
        self._may_exit = may_exit
        self._raised = False
        self._heard, self._told = os.pipe()
        os.set_blocking(self._told, False)
        self._handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self._wakeup = -1
        self._stopped = threading.Event()

    def start(self) -> None:
        for signum in SIGNALS:
            if self._handlers[signum] is not signal.SIG_IGN:  # as `nohup` and a shell's `&` want it
                signal.signal(signum, self._on_signal)
        self._wakeup = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        _active.append(self)
        threading.Thread(target=self._run, name="osft-termination", daemon=True).start()

    def stop(self) -> None:
        """Leave the signals as they were."""
        _active.remove(self)
        signal.set_wakeup_fd(self._wakeup)
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        os.write(self._told, b"\0")
        self._stopped.set()

    def never_exit(self) -> None:
        """From now on the process ends by itself only: what a run leaves is being put in order."""
        self._may_exit = False

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(signum)
        if self._raised or (self.workers is not None and self.workers()):
            return
        self._raised = True
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(INTERRUPTED)

    def _run(self) -> None:
        signum = -1
        while signum != 0 and not self._stopped.is_set():
            signum = os.read(self._heard, 1)[0]
            if signum in SIGNALS:
                self.asked = self.asked or signal.Signals(signum)
                self._see_to_the_end(self.asked)
        os.close(self._heard)
        os.close(self._told)

    def _see_to_the_end(self, asked: signal.Signals) -> None:
        began = busy = time.monotonic()
        told: set[int] = set()
        while not self._stopped.is_set():
            now = time.monotonic()
            workers = self.workers() if self.workers is not None else []
            for worker in workers:
                if worker not in told:
                    _send(worker, signal.SIGTERM)
                elif now - began > self.patience_seconds:
                    _send(worker, signal.SIGKILL)
            told.update(workers)
            if workers:
                busy = now
            if self._may_exit and now - busy > (_LEAVING_SECONDS if self._raised or told else _HANGING_SECONDS):
                os.write(2, f"osft: ended by {asked.name}\n".encode())
                os._exit(128 + asked)
            self._stopped.wait(_LOOK_SECONDS)


_active: list[_Termination] = []
"""Of this process: the program's, and that of a call from a program that has none."""


_masks: list[set[int]] = []
"""The signals that were blocked before a fork."""


def _hold() -> None:
    """Let no signal in between a fork and `_forget`."""
    if _active:
        _masks.append({int(signum) for signum in signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)})


def _resume() -> None:
    if _masks:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _forget() -> None:
    """In a forked process: it is not the one that is asked, and must not write to the parent's pipe."""
    if _active:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _active.clear()
    _resume()


os.register_at_fork(before=_hold, after_in_parent=_resume, after_in_child=_forget)


def end_when_asked() -> None:
    """Have this program end as it says above, from now on. Call it first, in the main thread."""
    if not _active:
        _Termination(may_exit=True).start()


@contextmanager
def passing_on(workers: Callable[[], list[int]], *, patience_seconds: float) -> Iterator[Callable[[], int | None]]:
    """Pass what asks this process to end on to `workers()`, the ids of the processes that train.

    Gives a function that tells the signal, or None. Who has not ended `patience_seconds` later is killed. Outside of
    the main thread, which has the signals, this does nothing.
    """
    if not CAN_PASS_ON or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    own = not _active
    termination = _Termination(may_exit=False) if own else _active[0]
    termination.workers, termination.patience_seconds = workers, patience_seconds
    if own:
        termination.start()
    try:
        yield lambda: termination.asked
    finally:
        termination.never_exit()
        termination.workers = None
        if own:
            termination.stop()


def children(*, running: str) -> list[int]:
    """Ids of the processes that this one has started and that run the module `running` (Linux)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text(encoding="utf-8", errors="replace")
                parent = int(status.rpartition(")")[2].split()[1])
                if parent == os.getpid() and running.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except (OSError, IndexError, ValueError):
                continue  # gone meanwhile
    return found


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel send this process SIGTERM when its parent dies, which then cannot do so itself (Linux).

    Raises SystemExit if `parent`, a process id, has died before.
    """
    if _LIBC is not None:
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if parent is not None and os.getppid() != parent:
            raise SystemExit(INTERRUPTED)


def _send(process: int, signum: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signum)
