"""What the library says while it works: the one configuration of the logger `osft`, above that of each module.

    who configures it                     where the lines go
    nobody: a notebook, a script          standard output. As soon as the application has a handler on the root logger
                                          or on `osft`, only there, from its own level on
    an application that has configured    its handlers; nothing of ours is there
    logging before `import osft`
    our programs, with `configure`        standard output: `osft`, training processes, the pipeline's steps, run_local

A terminal gets the time, the level and the message, in colour. A file, a pipe or a pod's log gets lines of one form:

    2026-11-26T15:13:20Z data: reused runs/data/4f0c
    2026-11-26T15:13:20Z [train-osft 8a1d6e0f27b3 rank 1] WARNING train: the metrics could not be published

that is the time in UTC; in brackets, as far as they are known, the step of the pipeline, the last part of the run's id,
and the rank where there are several processes; the level unless it is INFO; the message. `message_of` reads it.

Standard output, not standard error: there the lines were always found, by scripts, by `pipelines.step_log` and by
whoever follows a job's log. Progress bars, and the reason for which a program ends, go to standard error.

    OSFT_LOG_LEVEL        DEBUG, INFO (the default), WARNING or ERROR. Another value is told of, and INFO is used: a job
                          that has waited in a queue is not ended for it
    OSFT_LOG_CONTEXT      step and run, for the processes that a step starts. Set here
"""

import functools
import logging
import os
import re
import sys
import time

LEVEL, CONTEXT = "OSFT_LOG_LEVEL", "OSFT_LOG_CONTEXT"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red"}
_PREFIX = re.compile(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ (?:\[[^\]]*\] )?(?:(?:{'|'.join(_LEVELS)}) )?")

_library = logging.getLogger("osft")


def configure(*, step: str = "", run_id: str = "", rank: int = 0, world_size: int = 1) -> None:
    """Take over the logger `osft` of this process, which is one of our programs; a second call replaces the first.

    Other loggers, the root logger too, stay as they are, and get nothing of ours. `step` and `run_id` are those of a
    pipeline; the processes that this one starts find them in their environment.
    """
    if step:
        os.environ[CONTEXT] = context_of(step, run_id)
    where = [os.environ.get(CONTEXT, ""), f"rank {rank}" if world_size > 1 else ""]
    for handler in [handler for handler in _library.handlers if isinstance(handler, _Handler)]:
        _library.removeHandler(handler)
    _library.addHandler(_Handler(" ".join(filter(None, where))))
    _library.propagate = False
    _library.setLevel(_level(os.environ.get(LEVEL, "")))


def configure_unless_application_did() -> None:
    """What `import osft` does: show progress where no other logging is configured."""
    if not _library.handlers and not logging.root.handlers:
        _library.addHandler(_DefaultHandler(os.environ.get(CONTEXT, "")))
        _library.propagate = False
        if _library.level == logging.NOTSET:
            _library.setLevel(_DefaultLevel(_level(os.environ.get(LEVEL, ""))))


def context_of(step: str, run_id: str) -> str:
    """How lines name a step of a run: with the last part of the id, which is long."""
    return f"{step} {run_id.rpartition('-')[2]}".strip()


def message_of(line: str) -> str:
    """A line of a log without what was put before the message; other lines as they are."""
    prefix = _PREFIX.match(line)
    return line[prefix.end() :] if prefix else line


def pass_on(line: str) -> None:
    """Write a line of another process's log, which has its own time and level, as it is."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@functools.cache  # a value that is none is told of once
def _level(name: str) -> int:
    if name and name.upper() not in _LEVELS:
        _library.warning(f"{LEVEL} must be one of {', '.join(_LEVELS)}, got {name!r}: INFO is used")
        return logging.INFO
    return logging.getLevelNamesMapping()[name.upper() or "INFO"]


class _PlainFormatter(logging.Formatter):
    """The form that the module's docstring describes."""

    converter = staticmethod(time.gmtime)

    def __init__(self, context: str) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%SZ")
        self._context = f"[{context}] " if context else ""

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        return f"{self.formatTime(record, self.datefmt)} {self._context}{level}{record.message}"


class _Handler(logging.Handler):
    """Writes to what `sys.stdout` is at that moment: a notebook, a test or a `with` block puts other files there."""

    def __init__(self, context: str) -> None:
        super().__init__()
        self.setFormatter(_PlainFormatter(context))
        self._context = context

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if sys.stdout.isatty():
                self._show(record)
            else:
                sys.stdout.write(f"{self.format(record)}\n")
                sys.stdout.flush()
        except Exception:
            self.handleError(record)

    def _show(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        from osft.process.console import output

        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        context = f"[{self._context}] " if self._context else ""
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        message = f"{level}{logging.Formatter().format(record)}"
        line = Text.assemble((f"{when} {context}", "dim"), (message, _STYLES.get(record.levelno, "")))
        output.print(line, soft_wrap=True)


class _DefaultLevel(int):
    """A level of the logger `osft` that the application has not chosen."""


class _DefaultHandler(_Handler):
    """Gives way to handlers of the application, which mostly come after the imports."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.root.handlers:
            if isinstance(_library.level, _DefaultLevel):
                _library.setLevel(logging.NOTSET)  # the application's holds
            # Read when this handler has returned: what is below the level that holds now does not get to the others.
            _library.propagate = logging.getLogger(record.name).isEnabledFor(record.levelno)
        elif _library.handlers == [self]:
            super().emit(record)
