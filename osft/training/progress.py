"""Metrics on disk and progress on the terminal."""

import json
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO

from tqdm import tqdm

from osft.storage.atomic import atomic_path
from osft.training.loop import StepMetrics

logger = logging.getLogger(__name__)

_LINE_INTERVAL_SECONDS = 10.0


class Progress:
    """Appends each step to a JSON-lines file and shows it: a bar on a terminal, now and then a line in a log.

    A run that resumes after step `done` keeps the file's lines up to there.
    """

    def __init__(self, total_steps: int, metrics_file: Path, *, done: int = 0, enabled: bool) -> None:
        self._total, self._file, self._done, self._enabled = total_steps, metrics_file, done, enabled
        self._lines: IO[str] | None = None
        self._bar: tqdm | None = None
        self._started = time.monotonic()
        self._last_line = float("-inf")

    def __enter__(self) -> "Progress":
        if self._enabled:
            kept = self._file.read_text(encoding="utf-8").splitlines(keepends=True)[: self._done] if self._done else []
            with atomic_path(self._file) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")
            self._lines = self._file.open("a", encoding="utf-8", buffering=1)
            if sys.stderr.isatty():
                self._bar = tqdm(total=self._total, initial=self._done, desc="train", unit="step")
        return self

    def advance(self, metrics: StepMetrics) -> None:
        """Record one step."""
        if self._lines is None:
            return
        self._lines.write(json.dumps(asdict(metrics)) + "\n")
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{metrics.loss:.4f}", tokens_per_second=f"{metrics.tokens_per_second:.0f}")
            self._bar.update()
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_INTERVAL_SECONDS or metrics.step == self._total:
            self._last_line = now
            remaining = (now - self._started) / (metrics.step - self._done) * (self._total - metrics.step)
            shown = f"loss {metrics.loss:.4f}"
            if metrics.validation_loss is not None:
                shown += f"  validation {metrics.validation_loss:.4f}"
            if metrics.predicted_drift is not None:
                shown += f"  drift {metrics.predicted_drift:.4f}"
            logger.info(
                f"step {metrics.step}/{self._total}  {shown}  lr {metrics.learning_rate:.2e}  "
                f"{metrics.tokens_per_second:.0f} tokens/s  {remaining:.0f} s left",
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._lines is not None:
            self._lines.close()
