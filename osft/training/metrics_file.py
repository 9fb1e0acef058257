"""Reading `metrics.jsonl` while it is written: by another process, on a network file system, in an object store.

What is read may be cut, old, or not there for a while, and what was read may be replaced:

    the file cannot be read               raised; the next look is another try
    its last line has no end              it is read with the next look
    a line is damaged                     it is looked at again and again; those behind it are given
    the file is shorter, or another one   it is read from its beginning: a run that resumes drops what is behind its
                                          state. Steps that were given are not given again
"""

import json
import logging
from pathlib import Path
from typing import Any

from osft import storage
from osft.training.mirror import METRICS

logger = logging.getLogger(__name__)

_KINDS = {"step": int, "epoch": int | float, "checkpoints": list}
_OTHERS = ("loss", "learning_rate", "validation_loss")
_COMPARED_BYTES = 512


class MetricsFile:
    """The metrics of the run in the folder or URI `output`, of the steps after `after`."""

    def __init__(self, output: Path | str, *, after: int) -> None:
        self._remote = storage.is_remote(output)
        self._location = storage.join(output, METRICS)
        self._offset = 0
        self._before = b""  # the bytes that ended there when it was read
        self._step = after
        self._told: set[bytes] = set()
        self.has_grown = False
        """Whether the last look found anything new, be it a step that was given before: the run is alive."""

    def new_lines(self) -> list[dict[str, Any]]:
        """The complete lines that were added since the last call. Raises OSError, or what the store's client raises."""
        content = self._read()
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        parsed = [_parsed(line) for line in lines]
        sound = parsed.index(None) if None in parsed else len(lines)  # the lines before the first damaged one
        self.has_grown = any(parsed[:sound])
        read = b"".join(lines[:sound])
        self._offset += len(read)
        self._before = (self._before + read)[-_COMPARED_BYTES:]
        found = []
        for line, metrics in zip(lines, parsed, strict=True):
            if metrics is None:
                self._tell(line)
            elif metrics["step"] > self._step:
                self._step = metrics["step"]
                self.has_grown = True
                found.append(metrics)
        return found

    def _read(self) -> bytes:
        """What follows the bytes that were read before."""
        if self._remote:
            content = storage.read(self._location) or b""
            if content[: self._offset].endswith(self._before) and len(content) >= self._offset:
                return content[self._offset :]
            self._offset, self._before = 0, b""
            return content
        try:
            with Path(self._location).open("rb") as file:
                file.seek(self._offset - len(self._before))
                content = file.read()
                if not content.startswith(self._before):
                    self._offset, self._before = 0, b""
                    file.seek(0)
                    content = file.read()
        except FileNotFoundError:
            return b""
        return content[len(self._before) :]

    def _tell(self, line: bytes) -> None:
        if line not in self._told:
            self._told.add(line)
            logger.warning(f"train: a damaged line of {self._location} is passed over: {line[:80]!r}")


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The metrics of a line, or None if it is damaged."""
    try:
        metrics = json.loads(line)
    except ValueError:
        return None
    if not isinstance(metrics, dict) or not all(isinstance(metrics.get(name), kind) for name, kind in _KINDS.items()):
        return None
    return metrics if all(name in metrics for name in _OTHERS) else None
