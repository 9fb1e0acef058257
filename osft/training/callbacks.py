"""Following a run from the process that started it.

Training runs in processes of its own and writes a line of `metrics.jsonl` after each step; a thread of the calling
process reads what has been added and calls the callbacks. They are live objects: closures, plots and state work, and
nothing needs to be pickled.
"""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from osft import storage
from osft.training.mirror import INTERVAL_SECONDS, METRICS, STOP_FILE
from osft.training.wishes import INTERRUPT, STOP


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
    goes on from there.
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


class StopTraining(Exception):
    """Raised by a callback to end training early."""


class Follower:
    """Calls the callbacks for each line that is added to the metrics of a run, until the block ends.

    `output` is the run's folder, or its URI in an object store, where metrics arrive every 10 s. `after` is the step
    that the run goes on from; lines up to it are not new. `interval_seconds` is the time between two looks: 0.5, or 10
    for a URI. On leaving, what remains is delivered, and an exception of a callback is raised, whatever became of the
    block.
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
        self._callbacks = list(callbacks)
        self._interval = interval_seconds or (INTERVAL_SECONDS if self._remote else 0.5)
        self._offset = 0
        self._last = TrainingContext(output_dir=self._output, step=after, metrics={})
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="osft-callbacks", daemon=True)

    def __enter__(self) -> "Follower":
        if self._callbacks:
            self._call("on_train_begin", self._last)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread.ident is None:  # there were no callbacks
            return
        self._done.set()
        self._thread.join()
        self._deliver()
        self._call("on_train_end", self._last)
        if self._error is not None:
            raise self._error from None

    def _run(self) -> None:
        while not self._done.wait(self._interval):
            self._deliver()

    def _deliver(self) -> None:
        for metrics in self._new_lines():
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

    def _new_lines(self) -> list[dict[str, Any]]:
        """The complete lines that were added since the last call, of steps that were not seen yet."""
        added = self._published() if self._remote else self._appended()
        complete = added[: added.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [line for line in map(json.loads, complete.splitlines()) if line["step"] > self._last.step]

    def _appended(self) -> bytes:
        file = Path(self._output, METRICS)
        if not file.is_file():
            return b""
        with file.open("rb") as lines:
            if file.stat().st_size < self._offset:
                self._offset = 0  # a run that goes on drops the steps behind its state
            lines.seek(self._offset)
            return lines.read()

    def _published(self) -> bytes:
        """All lines: a store replaces files as a whole, and the last one may have been another start's."""
        try:
            return storage.read(storage.join(self._output, METRICS)) or b""
        except OSError as error:
            print(f"train: the metrics could not be read, trying again later: {error}", flush=True)
            return b""

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
                self._ask(STOP)
            except Exception as error:
                self._callbacks.remove(callback)
                self._error = self._error or error
                self._ask(INTERRUPT)

    def _ask(self, wish: int) -> None:
        storage.write(storage.join(self._output, STOP_FILE), str(wish).encode())
