"""A container as a real local process with everything that it starts (Linux: processes are found in /proc).

What differs from a container: no image, no volumes, no working directory of its own and no limits; and process 1 of a
real container ignores a SIGTERM that it has no handler for, where a local process dies of it.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.cluster.pod_logs import ContainerLog
from tests.cluster.timestamps import nanoseconds_text

# What a process started keeps its environment, even in a session of its own, as torchrun's workers are.
MARKER = "STAND_IN_CONTAINER"
STOP_SECONDS = 5.0


def marked_processes(marker: str) -> list[int]:
    """The living processes of the containers whose marker begins with `marker`."""
    wanted = f"{MARKER}={marker}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes()  # empty for a zombie
        except OSError:
            continue  # gone meanwhile, or another user's
        if environment.startswith(wanted) or b"\0" + wanted in environment:
            found.append(int(entry.name))
    return found


def kill_marked(marker: str) -> None:
    """SIGKILL until none is left; one may fork while the others die."""
    deadline = time.monotonic() + STOP_SECONDS
    while (processes := marked_processes(marker)) and time.monotonic() < deadline:
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.002)


class Container:
    """One run of a container: started when made; `poll()` until it gives the exit code."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: ContainerLog, marker: str
    ) -> None:
        self.log, self.marker = log, marker
        self.started = time.time()
        self.finished: float | None = None
        self.exit_code: int | None = None
        self.reason = ""
        self.message = ""
        self._process: subprocess.Popen[bytes] | None = None
        log.path.touch()
        if not command:
            self._fail_to_start("the stand-in has no images: a container needs a command")
            return
        try:
            self._process = subprocess.Popen(
                command,
                env={**environment, MARKER: marker},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self._fail_to_start(f"exec: {command[0]!r}: {error.strerror}")
            return
        assert self._process.stdout is not None
        self._pump = threading.Thread(target=self._write_log, args=(self._process.stdout,), daemon=True)
        self._pump.start()

    def _fail_to_start(self, message: str) -> None:
        """As containerd reports it: exit code 128, which counts as worth a new try."""
        self.exit_code, self.reason, self.message, self.finished = 128, "StartError", message, self.started
        self.log.closed = True

    def _write_log(self, output: IO[bytes]) -> None:
        with self.log.path.open("ab", buffering=0) as file, output:
            for line in output:
                file.write(f"{nanoseconds_text()} ".encode() + line.removesuffix(b"\n") + b"\n")
        self.log.closed = True

    def poll(self) -> int | None:
        """The exit code once the main process is dead; what it left running is dead by then too, and the log whole."""
        if self.exit_code is None and self._process is not None:
            code = self._process.poll()
            if code is not None:
                kill_marked(self.marker)
                self._pump.join(STOP_SECONDS)
                self.finished = time.time()
                self.exit_code = 128 - code if code < 0 else code
                self.reason = self.reason or ("Error" if self.exit_code else "Completed")
        return self.exit_code

    def send(self, number: int) -> None:
        """A signal to the main process only, as the kubelet sends SIGTERM."""
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self, reason: str = "") -> None:
        """SIGKILL to all of it. `reason`: what the state says then, such as OOMKilled."""
        if self.exit_code is None:
            self.reason = reason
            kill_marked(self.marker)

    def last_lines(self, lines: int = 80, size: int = 2048) -> str:
        """What a termination message from the log holds: at most `lines` lines and `size` bytes."""
        text = b"\n".join(line.partition(b" ")[2] for line in self.log.path.read_bytes().splitlines()[-lines:])
        return text[-size:].decode(errors="replace") + ("\n" if text else "")
