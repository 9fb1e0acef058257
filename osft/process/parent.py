"""Processes that end with the one that started them, however that one ends."""

import ctypes
import os
import signal
import sys

from osft.process.exit_codes import INTERRUPTED

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
# Loaded beforehand: between fork and exec, where the function may be called, nothing should be.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel send this process SIGTERM when its parent dies, which then cannot do so itself (Linux).

    Raises SystemExit if `parent`, a process id, has died before.
    """
    if _LIBC is not None:
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if parent is not None and os.getppid() != parent:
            raise SystemExit(INTERRUPTED)
