"""Following a run from the process that started it.

Training runs in processes of its own and writes a line of `metrics.jsonl` after each step; a thread of the calling
process reads what has been added and calls the callbacks. They are live objects: closures, plots and state work, and
nothing needs to be pickled.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any

from osft import storage
from osft.training.metrics_file import MetricsFile
from osft.training.mirror import INTERVAL_SECONDS, STOP_FILE

logger = logging.getLogger(__name__)

_LAST_LOOKS = 3


class Request(IntEnum):
    """What is asked of a run after a training step, ordered by weight: the ranks agree on the largest of theirs.

    Whoever follows the run asks by a file (`osft.training.mirror.STOP_FILE`), which holds the number.
    """

    NOTHING = 0
    SAVE_STATE = 1
    INTERRUPT = 2
    """Save the state and end; the same call resumes."""
    STOP = 3
    """End training, with a model."""
    ABANDON = 4
    """As INTERRUPT, for nobody follows the run: not to be restarted by who runs it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingContext:
    """What a callback is told."""

    output_dir: Path | str
    """A URI (str) where a run is followed in an object store, not in its folder."""
    step: int = 0
    epoch: float = 0.0
    loss: float | None = None
    """Nats per loss token."""
    learning_rate: float | None = None
    validation_loss: float | None = None
    checkpoints: tuple[Path | str, ...] = ()
    """The models that were just written, below output_dir."""
    metrics: dict[str, Any]
    """The whole line of `metrics.jsonl`."""

    @property
    def numbers(self) -> dict[str, int | float]:
        """What there is to plot of the step, over `step` and `metrics["timestamp"]`."""
        axes = ("step", "timestamp")
        return {k: v for k, v in self.metrics.items() if isinstance(v, int | float) and k not in axes}


class TrainingCallback:
    """Override what you need. Called in the process and the order of the caller, a step at a time.

    Raise StopTraining to end training after the step at hand: the final model is written as if it were the last one.
    Any other exception ends training too and is raised from `osft()`; the training state is saved, and the same call
    resumes from there.
    """

    def on_train_begin(self, context: TrainingContext) -> None:
        """Before the first step of this call."""

    def on_step_end(self, context: TrainingContext) -> None:
        """After each optimizer step."""

    def on_log(self, context: TrainingContext) -> None:
        """After each optimizer step, as on_step_end: every step is logged."""

    def on_evaluate(self, context: TrainingContext) -> None:
        """After a step at which the validation loss was measured."""

    def on_save(self, context: TrainingContext) -> None:
        """After models were written."""

    def on_epoch_end(self, context: TrainingContext) -> None:
        """After an epoch's last step."""

    def on_train_end(self, context: TrainingContext) -> None:
        """After the last step of this call, also if training failed."""


HOOKS = tuple(name for name in vars(TrainingCallback) if name.startswith("on_"))
"""What a callback may be asked for; one that was written for training_hub may lack some and have others."""


CALLBACK_RAISED = "raised by a callback, which ended the training; its state is saved"
"""A note on the exception: what a callback raises reaches the caller as it is."""


class StopTraining(Exception):
    """Raised by a callback to end training early."""


class Follower:
    """Calls the callbacks for each line that is added to the metrics of a run, until the block ends.

    `output` is the run's folder, or its URI in an object store, where metrics arrive every 10 s. `after` is the step
    that the run resumes from; lines up to it are not new. `interval_seconds` is the time between two looks: 0.5, or 10
    for a URI. A look that fails is told and repeated; it never ends the block. On leaving, what remains is delivered,
    and an exception of a callback is raised, whatever became of the block.
    """

    def __init__(
        self,
        output: Path | str,
        callbacks: Sequence[TrainingCallback],
        *,
        after: int,
        interval_seconds: float | None = None,
    ) -> None:
        self._remote = storage.is_remote(output)
        self._output = str(output) if self._remote else Path(output)
        self._metrics = MetricsFile(self._output, after=after)
        self._callbacks = list(callbacks)
        self._interval = interval_seconds or (INTERVAL_SECONDS if self._remote else 0.5)
        self._last = TrainingContext(output_dir=self._output, step=after, metrics={})
        self._error: BaseException | None = None
        self._request = Request.NOTHING
        self._problems: set[str] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="osft-callbacks", daemon=True)
        self.heard: datetime | None = None
        """When something new was found last."""
        self.looked: datetime | None = None
        """When a look succeeded last: what is silent since then may only be unreadable."""

    @property
    def step(self) -> int:
        """The last step that was seen."""
        return self._last.step

    def __enter__(self) -> "Follower":
        self._call("on_train_begin", self._last)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        for _ in range(_LAST_LOOKS):
            if self._look():
                break
            time.sleep(self._interval / 2)
        self._call("on_train_end", self._last)
        if self._error is not None:
            raise self._error from None

    def _run(self) -> None:
        while not self._done.wait(self._interval):
            self._look()

    def _look(self) -> bool:
        """Deliver the lines that were added. Whether everything could be read, and written."""
        lines: list[dict[str, Any]] = []
        read = self._try(lambda: lines.extend(self._metrics.new_lines()))
        if read:
            self.looked = datetime.now(UTC)
            if self._metrics.has_grown:
                self.heard = self.looked
        for metrics in lines:
            self._deliver(metrics)
            self._try(self._leave_request)
        return self._try(self._leave_request) and read

    def _try(self, action: Callable[[], None]) -> bool:
        """Do what may fail while the run itself is well, and tell a failure once."""
        try:
            action()
        except Exception as error:  # of a file system, or of any object store's client
            problem = f"{type(error).__name__}: {error}"
            if problem not in self._problems:
                logger.warning(f"train: the run cannot be followed, trying again: {problem}")
            self._problems.add(problem)
            return False
        return True

    def _deliver(self, metrics: dict[str, Any]) -> None:
        self._last = TrainingContext(
            output_dir=self._output,
            step=metrics["step"],
            epoch=metrics["epoch"],
            loss=metrics["loss"],
            learning_rate=metrics["learning_rate"],
            validation_loss=metrics["validation_loss"],
            checkpoints=tuple(self._below(path) for path in metrics["checkpoints"]),
            metrics=metrics,
        )
        self._call("on_step_end", self._last)
        self._call("on_log", self._last)
        if metrics["validation_loss"] is not None:
            self._call("on_evaluate", self._last)
        if metrics["checkpoints"]:
            self._call("on_save", self._last)
        if metrics["epoch"] == int(metrics["epoch"]):
            self._call("on_epoch_end", self._last)

    def _below(self, path: str) -> Path | str:
        return storage.join(self._output, path) if self._remote else Path(self._output, path)

    def _call(self, hook: str, context: TrainingContext) -> None:
        """Call a hook of each callback. One that raises is not called any more, the others (who log) are."""
        for callback in list(self._callbacks):
            try:
                call = getattr(callback, hook, None)
                if call is not None:
                    call(context)
            except StopTraining:
                self._request = max(self._request, Request.STOP)
            except Exception as error:
                self._callbacks.remove(callback)
                error.add_note(CALLBACK_RAISED)
                self._error = self._error or error
                self._request = max(self._request, Request.INTERRUPT)

    def _leave_request(self) -> None:
        """Ask the run to end, if a callback wants that. Left once: a run that starts removes what it finds."""
        if self._request != Request.NOTHING:
            storage.write(storage.join(self._output, STOP_FILE), str(self._request).encode())
            self._request = Request.NOTHING
