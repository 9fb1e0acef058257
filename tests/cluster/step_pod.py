"""A step in a pod as Argo and Pipelines make it: in a PID namespace of its own, below `step_container`."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")
_CONTAINER = Path(__file__).with_name("step_container.py")


def why_no_namespace() -> str:
    """Why none can be made, which takes root on most machines; "" if one can."""
    tried = subprocess.run([*_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip() if tried.returncode else ""


class StepPod:
    """One attempt, and what it printed. `outlives_sigterm`: seconds from SIGTERM to the end of all its processes."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, outlives_sigterm: float) -> None:
        self.log = ""
        self._process = subprocess.Popen(
            [*_NAMESPACE, sys.executable, "-I", str(_CONTAINER), "emissary", str(outlives_sigterm), *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.log += line

    def terminate(self) -> float:
        """SIGTERM to process 1, as the kubelet sends it. Returns when, by the monotonic clock."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        (process_1,) = children.read_text().split()
        now = time.monotonic()
        os.kill(int(process_1), signal.SIGTERM)
        return now

    def wait(self, seconds: float) -> int:
        """The exit code of process 1."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the step did not end within {seconds} s:\n{self.log}") from None
        self._reader.join()
        return code

    def kill(self) -> None:
        """All that is left of it."""
        self._process.kill()
        self._process.wait()
