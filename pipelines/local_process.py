"""The compiled pipeline by kfp.local, in a process of its own.

kfp.local prints to its process's standard output, and so do the steps that it starts. Here all that is one stream,
which goes to a file; who started it sees it as well. The process and the steps are one process group, so that all of
them are told to end.
"""

import codecs
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from pipelines.local_console import RunConsole

_GRACE_SECONDS = 150.0  # to save the training state in, as for a pod
_LOOK_SECONDS = 0.2


def new_log(folder: Path) -> Path:
    """An empty file for the log of a run that begins now; no other run has it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        file = folder / (time.strftime("%Y-%m-%d-%H-%M-%S") + (f"-{number}" if number > 1 else "") + ".log")
        with suppress(FileExistsError):
            file.touch(exist_ok=False)
            return file
    raise FileExistsError(f"{folder} has 1,000 logs of this second")


def execute(pipeline: str, arguments: dict[str, Any], root: Path, log: Path, shown: "RunConsole") -> int:
    """Run a compiled pipeline to its end. Returns 0, or another number if a step fails.

    What is raised meanwhile, such as KeyboardInterrupt, ends the pipeline's processes first: they may save what they
    have. A second interrupt kills them.
    """
    from osft.process.termination import end_with_parent

    with (
        log.open("ab", buffering=0) as file,
        subprocess.Popen(
            [sys.executable, "-u", "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=end_with_parent,
        ) as process,
    ):
        assert process.stdin is not None
        try:
            with process.stdin as given:
                work = {"pipeline": pipeline, "arguments": arguments, "root": str(root)}
                given.write(json.dumps(work).encode())
            _follow(process, file, shown)
            return process.wait()
        except BaseException as error:
            asked = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
            with suppress(ProcessLookupError):
                os.killpg(process.pid, asked)
            shown.ending()
            _follow(process, file, shown, until=time.monotonic() + _GRACE_SECONDS)
            raise
        finally:
            with suppress(OSError):  # all have ended: the rule
                os.killpg(process.pid, signal.SIGKILL)


def _follow(
    process: subprocess.Popen[bytes], file: BinaryIO, shown: "RunConsole", *, until: float = float("inf")
) -> None:
    """Copy what is printed, until nobody can print any more."""
    assert process.stdout is not None
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while time.monotonic() < until:
        if not select.select([process.stdout], [], [], _LOOK_SECONDS)[0]:
            shown.feed("")  # time goes on
            continue
        printed = os.read(process.stdout.fileno(), 1 << 16)
        if not printed:
            return
        file.write(printed)
        shown.feed(decoder.decode(printed))


def main() -> None:
    """Execute what the standard input holds, as JSON."""
    work = json.load(sys.stdin)
    signal.signal(signal.SIGTERM, _end_all)
    from kfp import components, local

    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=work["root"], raise_on_error=True)
    run = components.load_component_from_text(work["pipeline"])
    signal.signal(signal.SIGINT, _leave_to_the_step)
    try:
        run(**work["arguments"])
    except RuntimeError as error:
        sys.exit(str(error))


def _end_all(signum: int, frame: FrameType | None) -> None:
    """Who started this process has asked for its end, or has died."""
    signal.signal(signum, signal.SIG_DFL)
    os.killpg(0, signum)


def _leave_to_the_step(signum: int, frame: FrameType | None) -> None:
    """The step that runs is interrupted, too. What it says before it ends is still read; then the run has failed."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # no step runs
        raise KeyboardInterrupt from None


if __name__ == "__main__":
    main()
