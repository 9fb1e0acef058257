"""What stands around a pipeline step in its pod: process 1 is Argo's emissary, its child is the launcher of Pipelines.

    python step_container.py emissary SECONDS COMMAND...

As their sources have it (argo-workflows 4: cmd/argoexec/commands/emissary.go, workflow/executor/osspecific; pipelines
2.17: backend/src/v2/component/launcher_v2.go):

    emissary    starts its child in a process group of its own, hands SIGTERM on to that group, and looks once a second
                whether a child has ended. When it ends itself, the kernel kills what is left in the PID namespace
    launcher    has no handler for SIGTERM, so it dies at once, and with it the pipe into which the step prints

SECONDS: how long after a SIGTERM the emissary looks next, which on a cluster is anything from 0 to 1.
"""

import os
import signal
import subprocess
import sys
import time
from types import FrameType


def emissary(command: list[str], notices_after: float) -> int:
    """Run the launcher; the exit code is the launcher's, or 128 + the signal that it died of."""
    next_look, pause = 0.0, 1.0
    launcher = subprocess.Popen([sys.executable, "-I", __file__, "launcher", *command], process_group=0)

    def hand_on(signum: int, frame: FrameType | None) -> None:
        nonlocal next_look, pause
        os.killpg(launcher.pid, signum)
        next_look, pause = time.monotonic() + notices_after, 0.0  # it may take a moment to die

    signal.signal(signal.SIGTERM, hand_on)
    while True:
        if time.monotonic() >= next_look:
            next_look = time.monotonic() + pause
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == launcher.pid:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        time.sleep(0.005)


def launcher(command: list[str]) -> int:
    """Run the step, and print what it prints."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as step:
        assert step.stdout is not None
        while printed := os.read(step.stdout.fileno(), 1 << 16):
            sys.stdout.buffer.write(printed)
            sys.stdout.buffer.flush()
    return step.returncode


if __name__ == "__main__":
    if sys.argv[1] == "emissary":
        sys.exit(emissary(sys.argv[3:], float(sys.argv[2])))
    sys.exit(launcher(sys.argv[2:]))
