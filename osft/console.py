"""Where the commands write, and how they refuse."""

import typer
from rich.console import Console
from rich.text import Text

from osft import exit_codes

output = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def refused(error: Exception) -> typer.Exit:
    """Print why nothing was started; the exit to raise."""
    return ended(error, exit_codes.REFUSED)


def ended(error: Exception, exit_code: int) -> typer.Exit:
    """Print why the command ends; the exit to raise."""
    errors.print(Text(f"error: {error}", style="red"), soft_wrap=True)
    return typer.Exit(exit_code)
