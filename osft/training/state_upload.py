"""Uploading a training state while training continues, and agreeing that all ranks have.

A collective operation in which some ranks wait while another one uploads would hit its timeout on a slow store. So an
upload runs in a thread of each rank, and the ranks tell each other after each training step, in an operation that none
is late for, whether one of them still uploads. Where nothing can be done before the upload is over, they do so over and
over again (`settle`). (`torch.distributed.checkpoint.async_save` to a URI is such a collective operation.)

    stage       rank 0 removes what an earlier start left; every rank uploads its files; rank 0 completes the state
    next        begins on every rank when none is busy any more
    an error    is raised on its rank with the next step, and ends the run, which resumes from the state before
"""

import threading
import time
from collections.abc import Callable, Sequence

import torch

_LOOK_SECONDS = 0.1


class StateUpload:
    """The uploads of one rank. All ranks call `begin`, `go_on` and `settle` alike."""

    def __init__(self) -> None:
        self._stages: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether this rank uploads. Raises what went wrong while it did."""
        is_alive = self._thread is not None and self._thread.is_alive()
        if self._error is not None:  # looked at last: it is set before the thread ends
            raise self._error
        return is_alive

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to upload, as far as this rank knows."""
        return not self._stages and not self.is_busy

    def begin(self, stages: Sequence[Callable[[], None]]) -> None:
        """Upload in stages. The ones before must be settled."""
        assert self.is_over
        self._stages = list(stages) if torch.distributed.is_initialized() else [lambda: _all(stages)]
        self.go_on()

    def go_on(self) -> None:
        """Begin the next stage, if there is one: no rank is busy."""
        if self._stages and not self.is_busy:
            self._thread = threading.Thread(
                target=self._run, args=(self._stages.pop(0),), name="osft-state", daemon=True
            )
            self._thread.start()

    def settle(self) -> None:
        """Return when all ranks have uploaded everything."""
        while not _no_rank(not self.is_over):
            if _no_rank(self.is_busy):
                self.go_on()
            time.sleep(_LOOK_SECONDS)

    def join(self) -> None:
        """Where this rank is the only one: return when it has uploaded everything, or failed."""
        if self._thread is not None and not torch.distributed.is_initialized():
            self._thread.join()

    def _run(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except BaseException as error:
            self._error = error


def _all(stages: Sequence[Callable[[], None]]) -> None:
    for stage in stages:
        stage()


def _no_rank(flag: bool) -> bool:
    """Whether `flag` is False on every rank."""
    if not torch.distributed.is_initialized():
        return not flag
    everyone: list[bool] = [True] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, flag)
    return not any(everyone)
