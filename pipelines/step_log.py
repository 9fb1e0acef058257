"""The steps of a run on this machine, found in what kfp.local and the steps print.

kfp.local writes a line with the time where a step begins and ends. What the step prints is indented by four spaces
between them, with the input of kfp's executor as JSON, each state of a progress bar on a line of its own. Time, step
and level that our lines begin with (`osft.process.logs`) are left out here.
"""

import re
from collections import deque
from dataclasses import dataclass, field

from osft.process.logs import message_of

LAST_LINES = 20

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|[\x00-\x08\x0b-\x1f\x7f]")
_OF_KFP = re.compile(r"(\d\d):(\d\d):(\d\d\.\d{3}) - [A-Z]+ - (.*)")
_BEGINS = re.compile(r"Executing task '(.+)'")
_ENDS = re.compile(r"Task '(.+)' finished with status (SUCCESS|FAILURE)")
_INDENT = " " * 4
_EXECUTOR, _INPUT = "[KFP Executor ", "Got executor_input:"
_BAR = re.compile(r"(?P<what>.*?):? *\d+%\|.*\| (?P<done>\S+)/(?P<total>\S+) \[[^<\]]*(?:<(?P<left>[\d:]+))?")
_TRAINING_STEP = re.compile(r"step (?P<done>\d+)/(?P<total>\d+)  loss (?P<loss>\S+)(?:.*  (?P<left>\d+) s left)?")
_OWN = re.compile(r"[a-z][a-z0-9 _-]*: \S")
_RESULTS = {
    "resolve-round": re.compile(r"round: (.* learns .*|nothing to learn.*)"),
    "prepare-data": re.compile(r"data: (.+?)(?:; dropped 0 duplicates and 0 samples .*)?$"),
    "precompute-svd": re.compile(r"factors: (.+?)(?: \(\S+\))?$"),
    "evaluate-model": re.compile(r"(gate: .+)"),
    "register-model": re.compile(r"registry: (.+)"),
    "promote-model": re.compile(r"registry: (.+)"),
}
"""Step -> the line that says what came of it. Where it prints none, the last of its own lines does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far something is."""

    what: str
    done: str
    total: str
    """As they are shown, with prefixes: 1.2M."""
    share: float
    left: str
    """Time; empty if it is not known."""


@dataclass(kw_only=True, slots=True)
class Step:
    """One step that has begun."""

    name: str
    began: float
    ended: float | None = None
    """In seconds of the clock that `StepLog.feed` is given."""
    failed: bool = False
    progress: Progress | None = None
    said: str = ""
    """The last line that is ours, not a library's."""
    found: str = ""
    """The line of `_RESULTS`."""
    losses: list[str] = field(default_factory=list)
    """Of the first training step that was printed, and of the last one."""
    training_steps: str = ""
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    """Without dumps, and of each progress bar the last state only."""

    def seconds(self, now: float) -> float:
        """How long it took, or has been running."""
        return (now if self.ended is None else self.ended) - self.began

    def result(self) -> str:
        """What came of it, in a line; empty if it has printed none."""
        if self.losses and not self.found:
            return f"{self.training_steps} steps, training loss {self.losses[0]} -> {self.losses[-1]}"
        return self.found or self.said


class StepLog:
    """Takes the text of a run's log in pieces, and knows its steps. A line that it does not know changes nothing."""

    def __init__(self) -> None:
        self.steps: dict[str, Step] = {}
        self.interrupted = False
        """Whether the run was asked to end: a step that fails then is no failure."""
        self.outside: deque[str] = deque(maxlen=LAST_LINES)
        """The last lines that no step has printed."""
        self._running: Step | None = None
        self._in_input = False
        self._rest = ""

    def feed(self, text: str, now: float) -> None:
        """Read what has been printed since, at the time `now`."""
        *lines, self._rest = re.split(r"\r\n|\r|\n", self._rest + text)
        for line in lines:
            self._read(_CONTROL.sub("", line).rstrip(), now)

    def unfinished(self) -> Step | None:
        """The step that failed, or else one that is running."""
        failed = [step for step in self.steps.values() if step.failed]
        return failed[-1] if failed else self._running

    def _read(self, line: str, now: float) -> None:
        if of_kfp := _OF_KFP.match(line):
            self._read_of_kfp(of_kfp[4], now)
        elif self._running is not None and line.startswith(_INDENT):
            self._read_of_step(self._running, line.removeprefix(_INDENT))
        elif line:
            self.outside.append(line)

    def _read_of_kfp(self, message: str, now: float) -> None:
        self._in_input = False
        if begins := _BEGINS.match(message):
            self._running = self.steps[begins[1]] = Step(name=begins[1], began=now)
        elif (ends := _ENDS.match(message)) and ends[1] in self.steps:
            step = self.steps[ends[1]]
            step.ended, step.failed, step.progress = now, ends[2] == "FAILURE", None
            self._running = None

    def _read_of_step(self, step: Step, line: str) -> None:
        if line.startswith(_EXECUTOR):
            self._in_input = line.endswith(_INPUT)
        elif self._in_input and line.startswith(("{", " ", "}")):
            self._in_input = line != "}"
        elif line:
            self._in_input = False
            self._read_own(step, message_of(line))

    def _read_own(self, step: Step, line: str) -> None:
        progress = progress_in(line)
        before = progress_in(step.last_lines[-1]) if step.last_lines else None
        if progress and before and progress.what == before.what:
            step.last_lines.pop()
        step.last_lines.append(line)
        if progress:
            step.progress = progress
            if training := _TRAINING_STEP.match(line):
                step.losses, step.training_steps = [*step.losses[:1], training["loss"]], training["total"]
        elif _OWN.match(line):
            step.progress, step.said = None, line
            pattern = _RESULTS.get(step.name)
            if pattern is not None and (found := pattern.match(line)):
                step.found = found[1]


def progress_in(line: str) -> Progress | None:
    """What a line says of progress: a state of a bar of tqdm, or a training step; None if nothing."""
    if training := _TRAINING_STEP.match(line):
        done, total, left = training["done"], training["total"], training["left"]
        return Progress(
            what=f"loss {training['loss']}",
            done=done,
            total=total,
            share=int(done) / max(int(total), 1),
            left=f"{left} s" if left else "",
        )
    if bar := _BAR.match(line):
        share = int(line[: line.index("%|")].rpartition(" ")[2].rpartition(":")[2]) / 100
        return Progress(
            what=bar["what"].strip(), done=bar["done"], total=bar["total"], share=share, left=bar["left"] or ""
        )
    return None


def replay(text: str) -> StepLog:
    """The steps of a whole log, with the times that kfp.local has written down."""
    log, day, clock = StepLog(), 0, 0.0
    for line in text.splitlines(keepends=True):
        if of_kfp := _OF_KFP.match(_CONTROL.sub("", line)):
            time = int(of_kfp[1]) * 3600 + int(of_kfp[2]) * 60 + float(of_kfp[3])
            day += time < clock - day * 86400  # past midnight
            clock = day * 86400 + time
        log.feed(line, clock)
    return log
