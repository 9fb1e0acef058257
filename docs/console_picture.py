"""The picture of a run's console: `python -m docs.console_picture runs/logs/….log docs/run.svg`.

It is drawn from what the run has left, its log and its round, as the terminal showed it.
"""

import argparse
import io
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pipelines.local_console import steps_table
from pipelines.run_local import round_id
from pipelines.show_round import show_round
from pipelines.step_log import replay


def draw(log: Path, picture: Path, *, width: int = 80, title: str = "make run") -> None:
    """Write an SVG of the steps of the run whose log it is, and of what its round has found."""
    printed = Console(file=io.StringIO(), force_terminal=True, width=width)
    printed.print(Text(f"log:     {log}"), soft_wrap=True)
    printed.print(steps_table(replay(log.read_text(encoding="utf-8")), 0.0))
    show_round(printed, log.parents[1] / "rounds" / round_id(log))
    console = Console(file=io.StringIO(), force_terminal=True, width=width, record=True)
    console.print(Text.from_ansi(printed.file.getvalue()))  # long lines go on in the next, as in a terminal
    console.save_svg(str(picture), title=title)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=80, help="of the terminal, in characters")
    parser.add_argument("--title", default="make run", help="of the window")
    draw(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
