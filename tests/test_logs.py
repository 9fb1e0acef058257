"""What the library says while it works, where, and in which form."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from osft.process import logs

logger = logging.getLogger("osft.training.test")
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library's logger as it is before `import osft`; as it was, afterwards."""
    library = logging.getLogger("osft")
    before = library.handlers[:], library.level, library.propagate
    library.handlers[:], library.propagate = [], True
    library.setLevel(logging.NOTSET)
    monkeypatch.delenv(logs.LEVEL, raising=False)
    logs._level.cache_clear()
    yield
    library.handlers[:], level, library.propagate = before
    library.setLevel(level)


@contextmanager
def without_pytests_handlers() -> Iterator[None]:
    """The root logger as a script finds it; pytest puts its handlers there when a test's function begins."""
    root = logging.root
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def test_modules_that_are_run_as_programs_do_not_log_as_main():
    """Their `__name__` is not below `osft`, so nobody would see their lines."""
    for file in Path(logs.__file__).parents[1].rglob("*.py"):
        text = file.read_text()
        assert '__name__ == "__main__"' not in text or "getLogger(__name__)" not in text, file


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out.splitlines()


def without_time(line: str) -> str:
    assert line[10] == "T"
    assert line[19:21] == "Z "
    return line[21:]


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        (None, ["train: b", "WARNING train: c", "ERROR train: d"]),
        ("", ["train: b", "WARNING train: c", "ERROR train: d"]),
        ("debug", ["DEBUG train: a", "train: b", "WARNING train: c", "ERROR train: d"]),
        ("WARNING", ["WARNING train: c", "ERROR train: d"]),
        ("ERROR", ["ERROR train: d"]),
    ],
)
def test_the_level_is_that_of_the_environment_and_info_is_not_written_out(level, shown, monkeypatch, capsys):
    if level is not None:
        monkeypatch.setenv(logs.LEVEL, level)
    logs.configure()
    logger.debug("train: a")
    logger.info("train: b")
    logger.warning("train: c")
    logger.error("train: d")
    assert [without_time(line) for line in said(capsys)] == shown


def test_a_level_that_is_none_is_told_of_once_and_ends_nothing(monkeypatch, capsys):
    monkeypatch.setenv(logs.LEVEL, "loud")
    for _ in range(2):
        logs.configure()
    logger.info("train: b")
    told, line = said(capsys)
    assert without_time(told) == (
        "WARNING OSFT_LOG_LEVEL must be one of DEBUG, INFO, WARNING, ERROR, got 'loud': INFO is used"
    )
    assert without_time(line) == "train: b"


@pytest.mark.parametrize(
    ("context", "written"),
    [
        ({}, "train: b"),
        ({"rank": 0, "world_size": 1}, "train: b"),
        ({"rank": 3, "world_size": 4}, "[rank 3] train: b"),
        (
            {"step": "train-osft", "run_id": "0f1e2d3c-aaaa-bbbb-cccc-8a1d6e0f27b3"},
            "[train-osft 8a1d6e0f27b3] train: b",
        ),
        ({"step": "train-osft", "run_id": "7", "rank": 0, "world_size": 2}, "[train-osft 7 rank 0] train: b"),
    ],
)
def test_step_run_and_rank_are_said_as_far_as_they_are_known(context, written, capsys):
    logs.configure(**context)
    logger.info("train: b")
    (line,) = said(capsys)
    assert without_time(line) == written
    assert logs.message_of(line) == "train: b"


def test_processes_that_a_step_starts_say_step_and_run(capsys):
    logs.configure(step="train-osft", run_id="run-42")
    program = "import osft, logging; logging.getLogger('osft.x').info('train: b')"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert without_time(found.stdout) == "[train-osft 42] train: b\n"


def test_step_of_the_pipeline_is_named_in_its_lines_and_ends_with_one(capsys):
    program = """if True:
        import logging
        from osft.rounds import begin_step
        begin_step("train-osft", "0f1e-8a1d")
        logging.getLogger("osft.training").warning("train: c")
        raise ValueError("no such thing")
    """
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert without_time(found.stdout) == "[train-osft 8a1d] WARNING train: c\n"
    assert (found.stderr, found.returncode) == ("error: no such thing\n", 1)


@pytest.mark.parametrize(
    "line", ["train: b", "step 1/2  loss 1.0", "2026-11-26 15:13:20 other", "[rank 1] a", "", "WARNING: of a library"]
)
def test_line_of_another_form_is_a_message_as_it_is(line):
    assert logs.message_of(line) == line


def test_message_that_begins_like_a_prefix_is_left_whole(capsys):
    logs.configure()
    for message in ("[rank 1] a", "2026-11-26T15:13:20Z a", "100% of %s"):
        logger.warning(message)
        assert logs.message_of(said(capsys)[0]) == message


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_gets_colour_and_the_clock_and_whole_lines(monkeypatch):
    from osft.process.console import output

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(output, "_force_terminal", True)
    monkeypatch.setattr(output, "_color_system", output._color_system or 1)
    logs.configure(rank=1, world_size=2)
    path = "/a/path" * 30
    logger.info(f"train: [bold]{path}[/bold]")
    logger.warning("train: c")
    info, warning = sys.stdout.getvalue().splitlines()
    assert info.endswith(f"train: [bold]{path}[/bold]"), "neither wrapped nor read as markup"
    assert info.startswith("\x1b[2m")
    assert "[rank 1]" in info
    assert "\x1b[33mWARNING train: c\x1b[0m" in warning


def test_configured_twice_a_line_comes_once(capsys):
    logs.configure_unless_application_did()
    logs.configure()
    logs.configure(rank=1, world_size=2)
    logger.info("train: b")
    assert [without_time(line) for line in said(capsys)] == ["[rank 1] train: b"]


@without_pytests_handlers()
def test_our_programs_write_to_standard_output_alone_whatever_else_is_configured(capsys):
    """kfp's executor has a handler on the root logger of every step."""
    logging.basicConfig(format="KFP %(message)s", level=logging.INFO)
    root = logging.root.handlers[:], logging.root.level
    logs.configure()
    logger.info("train: b")
    assert [without_time(line) for line in said(capsys)] == ["train: b"]
    assert (logging.root.handlers, logging.root.level) == root


@without_pytests_handlers()
def test_progress_is_seen_where_nobody_has_configured_logging(capsys):
    logs.configure_unless_application_did()
    logs.configure_unless_application_did()
    logger.info("train: b")
    assert [without_time(line) for line in said(capsys)] == ["train: b"]


def application(**settings: object) -> io.StringIO:
    """What an application's own configuration writes to."""
    stream = io.StringIO()
    logging.basicConfig(stream=stream, format="%(name)s %(message)s", **settings)
    return stream


@pytest.mark.parametrize("first", ["application", "library"])
@pytest.mark.parametrize(
    ("level", "shown"), [("INFO", ["train: b", "train: c", "train: d"]), ("WARNING", ["train: c"])]
)
@without_pytests_handlers()
def test_application_that_has_handlers_gets_the_lines_of_its_level_and_nothing_is_doubled(first, level, shown, capsys):
    if first == "library":
        logs.configure_unless_application_did()
    stream = application(level=level)
    if first == "application":
        logs.configure_unless_application_did()
    logger.info("train: b")
    logger.warning("train: c")
    logger.info("train: d")
    assert stream.getvalue().splitlines() == [f"osft.training.test {line}" for line in shown]
    assert said(capsys) == []


@without_pytests_handlers()
def test_level_that_the_application_has_set_for_the_library_holds(capsys):
    logs.configure_unless_application_did()
    stream = application()
    logging.getLogger("osft").setLevel(logging.INFO)
    logger.info("train: b")
    logging.getLogger("osft").setLevel(logging.ERROR)
    logger.warning("train: c")
    assert stream.getvalue() == "osft.training.test train: b\n"
    assert said(capsys) == []


@without_pytests_handlers()
def test_handler_on_the_logger_of_the_library_replaces_ours(capsys):
    logs.configure_unless_application_did()
    stream = io.StringIO()
    logging.getLogger("osft").addHandler(logging.StreamHandler(stream))
    logger.info("train: b")
    assert stream.getvalue() == "train: b\n"
    assert said(capsys) == []


def test_standard_output_that_is_replaced_later_is_written_to(capsys, monkeypatch):
    logs.configure()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    logger.info("train: b")
    assert without_time(sys.stdout.getvalue()) == "train: b\n"


def test_line_of_another_process_is_passed_on_as_it_is_at_any_level(monkeypatch, capsys):
    monkeypatch.setenv(logs.LEVEL, "ERROR")
    logs.configure(step="train-osft", run_id="7")
    line = "2026-11-26T15:13:20Z [train-osft 7 rank 1] WARNING train: c"
    logs.pass_on(line)
    assert said(capsys) == [line]


def test_the_exception_of_a_record_follows_its_line(capsys):
    logs.configure()
    try:
        json.loads("{")
    except ValueError:
        logger.exception("train: d")
    first, *rest = said(capsys)
    assert without_time(first) == "ERROR train: d"
    assert rest[0] == "Traceback (most recent call last):"
