"""What a person sees of a run: in a terminal, in a log, of a failure, and where the display itself fails."""

import errno
import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipelines import local_console
from pipelines.local_console import LiveSteps, RunConsole, StepLines, display_for, steps_table
from pipelines.step_log import StepLog, replay
from tests.pipelines.test_step_log import RESULTS, recorded

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=80)


def terminal() -> Console:
    return Console(force_terminal=True, width=80, height=24, file=io.StringIO(), _environ={})


def shown(console: Console) -> str:
    return CONTROL.sub("", console.file.getvalue())


def until(words: str) -> StepLog:
    """A run's log up to a line, of which the beginning is given."""
    text = recorded("run")
    return replay(text[: text.index(f"    {words}")])


def picture(log: StepLog, now: float = 0.0, **settings) -> list[str]:
    console = terminal()
    console.print(steps_table(log, now, **settings))
    return [line.rstrip() for line in shown(console).splitlines()]


def test_log_has_a_line_where_a_step_begins_and_one_where_it_ends(tmp_path):
    console = plain_console()
    with RunConsole(console, display_for(console, ()), tmp_path / "a.log") as run:
        for line in recorded("run").splitlines(keepends=True):
            run.feed(line)
    first, *lines = console.file.getvalue().splitlines()
    assert first == f"log:     {tmp_path / 'a.log'}"
    assert [line for line in lines if "started" in line] == [f"{name}: started" for name in RESULTS]
    assert [re.sub(r" in \d+s", "", line) for line in lines if "done" in line] == [
        f"{name}: done: {result}" for name, result in RESULTS.items()
    ]
    assert len(lines) == 2 * len(RESULTS)
    assert not set("\x1b\r%") & set(console.file.getvalue()), "neither control characters nor bars"


def test_ended_run_is_a_table_within_the_terminals_width():
    lines = picture(replay(recorded("run")))
    assert max(map(len, lines)) <= 80
    assert lines[:2] == [
        "✓ resolve-round  120 of 120 records are new; the base model learns           19s",
        "                 larger-number",
    ]
    text = " ".join(" ".join(lines).split())
    for name in ("precompute-svd", "train-osft", "evaluate-model"):
        assert f"✓ {name} {RESULTS[name]}" in text


def test_running_step_has_its_bar_and_those_that_wait_come_last():
    log = until("step 8/8")
    began = log.steps["train-osft"].began
    lines = picture(log, began + 75, waiting=list(RESULTS), running="*")
    assert lines[-3:] == ["  evaluate-model", "  register-model", "  promote-model"]
    assert re.fullmatch(r"\* train-osft +loss 5\.7637 ━+[╸╺]?━* 1/8, 4 s left +1m15s", lines[-4])


def test_running_step_without_a_bar_says_what_it_said_last():
    log = replay("10:00:00.000 - INFO - Executing task 'train-osft'\n    train: resumes from " + "a/" * 60 + "\n")
    (line,) = picture(log, 36000.0, running="*")
    assert line.startswith("* train-osft train: resumes from a/a/")
    assert line.endswith("… 0s")
    assert len(line) == 80


def test_terminal_draws_the_last_picture_in_place():
    console = terminal()
    with RunConsole(console, LiveSteps(console, list(RESULTS)), Path("a.log")) as run:
        run.feed(recorded("run"))
    drawn = console.file.getvalue()
    assert "\x1b[?25l" in drawn
    assert drawn.endswith("\x1b[?25h"), "the cursor is there again"
    last = shown(console).splitlines()[-len(picture(replay(recorded("run")))) :]
    assert last[0].startswith("✓ resolve-round")
    assert "champion" in last[-1]


def test_steps_that_were_not_run_are_not_left_in_the_picture():
    console = terminal()
    with RunConsole(console, LiveSteps(console, list(RESULTS)), Path("a.log")) as run:
        run.feed("10:00:00.000 - INFO - Executing task 'resolve-round'\n    round: nothing to learn: a has 0 records\n")
        run.feed("10:00:01.000 - INFO - Task 'resolve-round' finished with status SUCCESS\n")
    last = shown(console).rstrip().splitlines()[-1]
    assert last.startswith("✓ resolve-round nothing to learn: a has 0 records")


@pytest.mark.parametrize("make", [LiveSteps, StepLines])
def test_failure_names_the_step_and_shows_its_last_lines_and_the_log(make):
    console = terminal()
    display = LiveSteps(console, list(RESULTS)) if make is LiveSteps else StepLines(console)
    with RunConsole(console, display, Path("runs/logs/a.log")) as run:
        run.feed(recorded("refused"))
        run.failed()
    assert "\x1b[31merror: resolve-round has failed." in console.file.getvalue()
    lines = shown(console).splitlines()
    assert lines[-2].startswith("  error: tiny descends from /given/model, not from /given/model2.")
    assert lines[-1] == "The whole log is runs/logs/a.log"
    assert "executor_input" not in shown(console)


def test_failure_outside_of_all_steps_shows_what_was_printed_last():
    console = plain_console()
    with RunConsole(console, StepLines(console), Path("a.log")) as run:
        run.feed("Traceback (most recent call last):\nImportError: no kfp\n")
        run.failed()
    assert "error: the pipeline has failed" in shown(console)
    assert "  ImportError: no kfp" in shown(console)


@pytest.mark.parametrize("make", [LiveSteps, StepLines])
def test_interrupt_says_where_and_no_failure(make):
    console = terminal()
    display = LiveSteps(console, list(RESULTS)) if make is LiveSteps else StepLines(console)
    with pytest.raises(KeyboardInterrupt), RunConsole(console, display, Path("runs/logs/a.log")) as run:
        run.ending()
        run.feed(recorded("interrupted"))
        raise KeyboardInterrupt
    assert shown(console).splitlines()[-1] == "interrupted in train-osft. The log is runs/logs/a.log"
    assert "failed" not in shown(console)


class Broken:
    """A display that fails when it is to show something."""

    def update(self, log: StepLog, now: float) -> None:
        raise ZeroDivisionError("no picture")

    close = update

    def drop(self) -> None:
        raise ZeroDivisionError("nor an end")


def test_live_table_that_fails_leaves_the_terminal_as_it_was(tmp_path, monkeypatch):
    console = terminal()
    with RunConsole(console, LiveSteps(console, list(RESULTS)), tmp_path / "a.log") as run:
        run.feed("")
        monkeypatch.setattr(local_console, "duration", lambda seconds: 1 / 0)
        time.sleep(0.2)
        run.feed(recorded("refused"))
        run.feed("more")
        run.failed()
    assert console.file.getvalue().count("the display has failed") == 1
    assert console.file.getvalue().count("\x1b[?25h") == 1
    assert "error: resolve-round has failed" in shown(console), "what is printed is still followed"


def test_display_that_fails_ends_neither_the_run_nor_its_log(tmp_path):
    console, log = plain_console(), tmp_path / "a.log"
    with RunConsole(console, Broken(), log) as run:
        run.feed("this is what it fails at\n")
        run.feed(recorded("refused"))
        run.failed()
    assert "the display has failed, the run continues" in console.file.getvalue()
    assert "ZeroDivisionError: no picture" in log.read_text()
    assert "error: resolve-round has failed" in console.file.getvalue()


def test_console_that_cannot_be_written_to_ends_nothing(tmp_path):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "no space left")

    console = Console(file=Full(), width=80)
    with RunConsole(console, StepLines(console), tmp_path / "a.log") as run:
        run.feed(recorded("refused"))
        run.failed()
