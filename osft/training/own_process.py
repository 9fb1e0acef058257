"""Steps that use GPUs, in processes that give them back by ending. When one of several fails, the others are ended."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from osft.process import logs
from osft.process.termination import end_with_parent

_POLL_SECONDS = 0.05
_RAISED: dict[str, type[Exception]] = {
    error.__name__: error for error in (ValueError, FileNotFoundError, ConnectionError, PermissionError, OSError)
}
"""What a user can cause, and is raised again as what it was; a program error prints its traceback and ends the step."""


def in_own_process(module: str, work: dict[str, Any]) -> dict[str, Any]:
    """Run `python -m MODULE WORK.json OUTCOME.json`, which calls `answer`; the result.

    Raises what the other process raised, and RuntimeError if it ended otherwise.
    """
    return in_own_processes(module, [work])[0]


def in_own_processes(module: str, works: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As `in_own_process`, a process for each of `works` at once; the results in their order."""
    with tempfile.TemporaryDirectory(prefix="osft-step-") as folder, ExitStack() as running:
        started: list[tuple[subprocess.Popen[bytes], Path]] = []
        for number, work in enumerate(works):
            given, outcome = Path(folder, f"work-{number}.json"), Path(folder, f"outcome-{number}.json")
            given.write_text(json.dumps(work), encoding="utf-8")
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", module, str(given), str(outcome)], preexec_fn=end_with_parent
            )
            running.callback(_end, process)
            started.append((process, outcome))
        waiting = list(started)
        while waiting:
            for process, outcome in [one for one in waiting if one[0].poll() is not None]:
                waiting.remove((process, outcome))
                _result(module, process.returncode, outcome)  # raises before the others have ended
            if waiting:
                time.sleep(_POLL_SECONDS)
        return [_result(module, process.returncode, outcome) for process, outcome in started]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process that still runs: this one is asked to end, or another one failed."""
    process.kill()
    process.wait()


def _result(module: str, code: int, outcome: Path) -> dict[str, Any]:
    """What a process that has ended answered. Raises what it raised."""
    if not outcome.is_file():
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise RuntimeError(f"{module} ended with {ended}; what it printed last says why")
    found = json.loads(outcome.read_text(encoding="utf-8"))
    if "error" in found:
        raise _RAISED[found["error"]](found["message"])
    result: dict[str, Any] = found["result"]
    return result


def answer(step: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """What the module of such a process does: the step with what it was given, and writing down what came of it."""
    logs.configure()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt at a terminal goes to the parent, too, which ends this
    given, outcome = (Path(argument) for argument in sys.argv[1:])
    try:
        found: dict[str, Any] = {"result": step(json.loads(given.read_text(encoding="utf-8")))}
    except tuple(_RAISED.values()) as error:
        kind = next(name for name in (base.__name__ for base in type(error).__mro__) if name in _RAISED)
        found = {"error": kind, "message": str(error)}
    outcome.write_text(json.dumps(found), encoding="utf-8")
