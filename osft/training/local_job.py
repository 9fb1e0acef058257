"""Training as a process of this machine, behind the same protocol as a job on a cluster."""

import os
import shlex
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime

from osft.process.termination import end_with_parent
from osft.training.job import JobStatus, Phase

_LAST_LINES = 40
_GRACE_SECONDS = 150.0  # to save the training state in: the agent itself waits 120 s for its processes


class LocalJob:
    """`osft train` in a process of its own. It ends with the process that started it, however that one ends."""

    def __init__(self, arguments: list[str]) -> None:
        self._command = [sys.executable, "-u", "-m", "osft", *arguments]
        self._process: subprocess.Popen[str] | None = None
        self._started = datetime.now(UTC)
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._read_to_the_end = threading.Event()

    def describe(self) -> str:
        """The command."""
        return shlex.join(self._command) + "\n"

    def submit(self) -> None:
        """Start the process."""
        # The caller logs what it follows; the process must not make an MLflow run of its own as well.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        self._started = datetime.now(UTC)
        self._process = subprocess.Popen(
            self._command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=end_with_parent,
        )

    def status(self) -> JobStatus:
        """Running until it ends; a failure's reason is the exit code and the last lines."""
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return JobStatus(phase=Phase.RUNNING, since=self._started)
        if code == 0:
            return JobStatus(phase=Phase.SUCCEEDED, since=datetime.now(UTC))
        end = f"exit code {code}" if code > 0 else f"signal {-code}"
        self._read_to_the_end.wait(timeout=5)
        lines = "\n".join(self._last_lines)
        return JobStatus(phase=Phase.FAILED, since=datetime.now(UTC), reason=f"training ended with {end}\n{lines}")

    def logs(self, stop: threading.Event) -> Iterator[str]:
        """What the process prints, to its end: a full pipe would stop it."""
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last_lines.append(line.rstrip("\n"))
            yield line.rstrip("\n")
        self._read_to_the_end.set()

    def cancel(self) -> None:
        """SIGTERM, so that it saves its state; SIGKILL if it takes too long."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
