"""The picture of a report: `python -m docs.screenshot REPORT.html docs/report.png`."""

import argparse
from pathlib import Path

from docs.browser import browser


def take_screenshot(report: Path, picture: Path, *, width: int = 1100, height: int | None = None) -> None:
    """Write a PNG of an HTML file, down to `height` CSS pixels, by default all of it."""
    with browser() as page:
        page.open(report, width=width)
        picture.write_bytes(page.screenshot(height=height))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1100, help="of the window, in CSS pixels")
    parser.add_argument("--height", type=int, help="down to which the page is taken; all of it by default")
    take_screenshot(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
