"""Where the commands write, and how they refuse."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from osft.process import exit_codes
from osft.process.errors import explained, one_line

output = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


@contextmanager
def failures(*, connection_lost: int = exit_codes.FAILED) -> Iterator[None]:
    """End the command with one line for what its user can cause and cure (`errors`); a bug keeps its traceback.

    The exit code is the error's own if it has one, `connection_lost` where another machine does not answer, REFUSED for
    what was given and cannot be used, and FAILED for what went wrong on the way.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        told = explained(error)
        if told is None:
            raise
        raise ended(told, getattr(told, "exit_code", _exit_code(told, connection_lost))) from None


def _exit_code(error: Exception, connection_lost: int) -> int:
    if isinstance(error, ConnectionError):
        return connection_lost
    return exit_codes.REFUSED if isinstance(error, ValueError | FileNotFoundError) else exit_codes.FAILED


def ended(error: Exception, exit_code: int) -> typer.Exit:
    """Print why the command ends; the exit to raise."""
    errors.print(Text(f"error: {one_line(error)}", style="red"), soft_wrap=True)
    return typer.Exit(exit_code)
