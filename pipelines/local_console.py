"""What a person sees of a run on this machine: its steps, what each is doing, and what came of it.

In a terminal that is a table that changes in place. In a log it is a line where a step begins, and one where it ends.
"""

import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from osft.orchestration.display import duration
from pipelines.step_log import Progress, Step, StepLog

_BAR_WIDTH = 16
_MINIMUM_SECONDS = 0.1  # between two pictures
_ANY = (Exception, SystemExit)  # the latter is how rich answers a pipe that nobody reads any more


class Display(Protocol):
    """Shows the steps."""

    def update(self, log: StepLog, now: float) -> None:
        """Show how they are."""

    def close(self, log: StepLog, now: float) -> None:
        """Show how they ended."""

    def drop(self) -> None:
        """Leave the console as it is, after a failure."""


class StepLines:
    """A line where a step begins, and one where it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun: set[str] = set()
        self._ended: set[str] = set()

    def update(self, log: StepLog, now: float) -> None:
        """Print what has begun or ended since."""
        for step in log.steps.values():
            if step.name not in self._begun:
                self._begun.add(step.name)
                self._print(f"{step.name}: started")
            if step.ended is not None and step.name not in self._ended:
                self._ended.add(step.name)
                word, style = _ending(log) if step.failed else ("done", "")
                result = "" if step.failed else step.result()
                self._print(f"{step.name}: {word} in {duration(step.seconds(now))}{result and ': '}{result}", style)

    close = update

    def drop(self) -> None:
        """Nothing is open."""

    def _print(self, line: str, style: str = "") -> None:
        self._console.print(Text(line, style), soft_wrap=True)


class LiveSteps:
    """A table in a terminal that changes in place."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._names = names
        self._spinner = Spinner("dots", style="cyan")
        self._shown = float("-inf")
        # Drawn when asked to: what a thread of its own raised would be nobody's.
        self._live = Live(console=console, auto_refresh=False)

    def update(self, log: StepLog, now: float) -> None:
        """Draw the table, unless that was done a moment ago."""
        if now - self._shown < _MINIMUM_SECONDS:
            return
        self._shown = now
        self._live.start()
        self._live.update(steps_table(log, now, waiting=self._names, running=self._spinner), refresh=True)

    def close(self, log: StepLog, now: float) -> None:
        """Leave the table of what was done."""
        self._live.update(steps_table(log, now))
        self._live.stop()

    def drop(self) -> None:
        """Show the cursor again, and nothing else."""
        self._live.update("")
        self._live.stop()


def _ending(log: StepLog) -> tuple[str, str]:
    """How a step without a result has ended, and the style of that."""
    return ("interrupted", "yellow") if log.interrupted else ("failed", "red")


def steps_table(
    log: StepLog, now: float, *, waiting: Sequence[str] = (), running: RenderableType | None = None
) -> Table:
    """The steps with their results; what is `waiting` and has not begun comes last.

    `running` marks a step that runs. Without it the run is over, and what has not ended by itself has failed.
    """
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    for step in log.steps.values():
        took = duration(step.seconds(now))
        if step.ended is not None and not step.failed:
            table.add_row(Text("✓", "green"), step.name, Text(step.result()), took)
        elif step.ended is None and running is not None:
            table.add_row(running, Text(step.name, "cyan"), _activity(step), took)
        else:
            word, style = _ending(log)
            table.add_row(Text("✗", style), Text(step.name, style), Text(word, style), took)
    for name in waiting:
        if name not in log.steps:
            table.add_row("", Text(name, "dim"), "", "")
    return table


def _activity(step: Step) -> RenderableType:
    """What a running step is doing, on one line."""
    if step.progress is None:
        return Text(step.said, "dim", no_wrap=True, overflow="ellipsis")
    return _bar(step.progress)


def _bar(progress: Progress) -> Table:
    line = Table.grid(padding=(0, 1))
    line.add_column(no_wrap=True, overflow="ellipsis")
    line.add_column(width=_BAR_WIDTH)
    line.add_column(no_wrap=True)
    amount = f"{progress.done}/{progress.total}" + (f", {progress.left} left" if progress.left else "")
    line.add_row(Text(progress.what), ProgressBar(100, 100 * progress.share, width=_BAR_WIDTH), Text(amount))
    return line


def display_for(console: Console, names: Sequence[str]) -> Display:
    """A table where one can be changed in place; `names` of the steps are known before they begin."""
    in_place = console.is_interactive and not console.is_jupyter and console.file.isatty()
    return LiveSteps(console, names) if in_place else StepLines(console)


class RunConsole:
    """Follows a run. It raises nothing that goes wrong here: the run and its log are worth more than the picture."""

    def __init__(self, console: Console, display: Display, log_file: Path) -> None:
        self._console, self._file = console, log_file
        self._display: Display | None = display
        self.log = StepLog()

    def __enter__(self) -> "RunConsole":
        self._say(Text(f"log:     {self._file}"))
        return self

    def feed(self, printed: str) -> None:
        """Show what a run's processes have printed since."""
        try:
            self.log.feed(printed, time.monotonic())
            if self._display is not None:
                self._display.update(self.log, time.monotonic())
        except _ANY:
            self._give_up()

    def ending(self) -> None:
        """Say that the run's processes have been asked to end."""
        self.log.interrupted = True
        self._say(Text("ending the step that runs; Ctrl-C once more kills it", "yellow"))

    def failed(self) -> None:
        """Say which step has failed, what it said last, and where the rest is."""
        self._close()
        step = self.log.unfinished()
        last = step.last_lines if step else self.log.outside
        what = f"{step.name} has failed" if step else "the pipeline has failed"
        self._say(Text(f"error: {what}. The last lines of what it printed:", "red"))
        for line in last:
            self._say(Text(f"  {line}"))
        self._say(Text(f"The whole log is {self._file}"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if isinstance(error, KeyboardInterrupt):
            step = self.log.unfinished()
            self._say(Text(f"interrupted{f' in {step.name}' if step else ''}. The log is {self._file}", "yellow"))

    def _close(self) -> None:
        """Leave the picture as it is."""
        try:
            if self._display is not None:
                self._display.close(self.log, time.monotonic())
        except _ANY:
            self._give_up()
        self._display = None

    def _give_up(self) -> None:
        if self._display is None:  # this was told before
            return
        with suppress(*_ANY):
            self._display.drop()
        self._display = None
        with suppress(*_ANY), self._file.open("a", encoding="utf-8") as file:
            file.write(f"the display has failed, the run continues\n{traceback.format_exc()}")
        self._say(Text(f"the display has failed, the run continues. Follow it in {self._file}", "yellow"))

    def _say(self, line: Text) -> None:
        with suppress(*_ANY):
            self._console.print(line, soft_wrap=True)
