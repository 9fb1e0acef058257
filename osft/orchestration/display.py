"""A run in a terminal, where a table changes in place, and in a log, which has a line for each change."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from osft.orchestration.pipelines import LATEST
from osft.orchestration.runs import RunStatus, follow
from osft.orchestration.schedules import Schedule
from osft.process.console import output

if TYPE_CHECKING:
    import kfp

_STYLES = {"SUCCEEDED": "green", "FAILED": "red", "RUNNING": "cyan", "CANCELED": "yellow", "CANCELING": "yellow"}


def follow_in_terminal(client: "kfp.Client", run_id: str, interval: float) -> RunStatus:
    """Show a run until it has ended. Raises: as `follow`."""
    if not output.is_terminal:
        lines = _Lines()
        return follow(client, run_id, lines.print, interval=interval)
    latest: list[RunStatus] = []

    def picture() -> Group | Text:  # asked for four times a second, so that durations run on
        return steps_table(latest[-1]) if latest else Text(f"asking for {run_id}")

    with Live(console=output, get_renderable=picture):
        return follow(client, run_id, latest.append, interval=interval)


class _Lines:
    """Prints what has changed since the last look."""

    def __init__(self) -> None:
        self._printed: dict[str, str] = {}

    def print(self, run: RunStatus) -> None:
        for step in run.steps:
            text = " ".join(filter(None, (step.state, duration(step.seconds()) if step.finished else "", step.error)))
            self._line(step.name, step.state, text)
        text = " ".join(filter(None, (run.state, duration(run.seconds()) if run.ended else "", run.error)))
        self._line(f"run {run.run_id}", run.state, text)

    def _line(self, name: str, state: str, text: str) -> None:
        if self._printed.get(name) != state:
            self._printed[name] = state
            output.print(Text(f"{datetime.now(UTC):%H:%M:%S} {name} {text}"), soft_wrap=True)


def steps_table(run: RunStatus) -> Group:
    """The steps of a run, with the errors of those that failed."""
    table = Table("step", "state", box=None)
    table.add_column("time", justify="right")
    for step in run.steps:
        table.add_row(step.name, _state(step.state), duration(step.seconds()))
    table.add_row(Text("run", style="bold"), _state(run.state), duration(run.seconds()), end_section=True)
    failed = [Text(f"{step.name}: {step.error}", style="red") for step in run.steps if step.error]
    return Group(Text(f"{run.name}  {run.run_id}", style="bold"), table, *failed, *([run.error] if run.error else []))


def runs_table(runs: list[RunStatus]) -> Table:
    """One line for each run."""
    table = Table(box=None)
    for column in ("run", "name", "state", "started", "time"):  # an id that is cut is of no use
        table.add_column(column, no_wrap=column != "name", justify="right" if column == "time" else "left")
    for run in runs:
        started = f"{run.started:%Y-%m-%d %H:%M}" if run.started else ""
        table.add_row(run.run_id, run.name, _state(run.state), started, duration(run.seconds()))
    return table


def schedules_table(schedules: list[Schedule]) -> Table:
    """One line for each schedule."""
    table = Table(box=None)
    for column in ("schedule", "state", "trigger", "version", "at a time", "catch up"):
        table.add_column(column, no_wrap=column in ("schedule", "trigger"))
    for one in schedules:
        version, catch_up = (one.pipeline_version_id or LATEST)[:8], "no" if one.no_catchup else "yes"
        table.add_row(one.name, one.state, one.trigger, version, str(one.max_concurrency), catch_up)
    return table


def duration(seconds: float | None) -> str:
    """As 1h02m, 2m03s or 4s."""
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _state(state: str) -> Text:
    return Text(state, style=_STYLES.get(state, ""))
