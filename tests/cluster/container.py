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
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

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


class ContainerLog:
    """What a container prints: a line of the file is its time in nanoseconds (RFC 3339), a space and the text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.closed = False
        """Nothing will be written any more."""
        path.touch()

    def copy_from(self, output: IO[bytes]) -> None:
        """Write each line of `output` with its time, until its end."""
        with self.path.open("ab", buffering=0) as file, output:
            for line in output:
                seconds, nanoseconds = divmod(time.time_ns(), 10**9)
                now = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z "
                file.write(now.encode() + line.removesuffix(b"\n") + b"\n")
        self.closed = True

    def read(self, position: int) -> tuple[list[bytes], int]:
        """The whole lines from a position in the file on, and the position after them."""
        with self.path.open("rb") as file:
            file.seek(position)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        return whole.splitlines(keepends=True), position + len(whole)

    def last_lines(self) -> str:
        """What a termination message from the log holds: at most 80 lines and 2048 bytes."""
        lines, _ = self.read(0)
        return b"".join(line.partition(b" ")[2] for line in lines[-80:])[-2048:].decode(errors="replace")


class Container:
    """One run of a container: started when made; `poll()` until it gives the exit code.

    Raises OSError if the command cannot be started.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: ContainerLog, marker: str
    ) -> None:
        self.log, self.marker = log, marker
        self.exit_code: int | None = None
        self.reason = ""
        self._process = subprocess.Popen(
            command,
            env={**environment, MARKER: marker},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._pump = threading.Thread(target=log.copy_from, args=(self._process.stdout,), daemon=True)
        self._pump.start()

    def poll(self) -> int | None:
        """The exit code once the main process is dead; what it left running is dead by then too, and the log whole."""
        if self.exit_code is None:
            code = self._process.poll()
            if code is not None:
                kill_marked(self.marker)
                self._pump.join(STOP_SECONDS)
                self.exit_code = 128 - code if code < 0 else code
        return self.exit_code

    def terminate(self) -> None:
        """SIGTERM to the main process only, as the kubelet sends it."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL to all of it. The main process does not show its environment while it is in an exec."""
        self._process.kill()
        kill_marked(self.marker)
