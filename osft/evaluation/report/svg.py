"""Plots as SVG elements within the page, all in one look."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BETTER, WORSE = "#0b5cad", "#b35900"
INK, MUTED, EDGE, GRID = "#1f2328", "#59636e", "#9aa7b4", "#e6eaef"
LINES = (("#0b5cad", "-"), ("#e07b00", "--"), ("#3b7d3b", "-."), ("#8a4fa3", ":"), ("#59636e", (0, (5, 1, 1, 1))))
"""Colours and styles of the lines of a plot: told apart without colour, too."""
PANEL = (4.5, 2.8)
"""Inches of a plot that stands beside others, or alone on a phone."""
PIXELS_PER_POINT = 1.39
"""At full size: text of 9 points is as large as the page's."""
MAX_POINTS = 600
"""Points of a plotted curve; more would only make the page larger."""

_SVG = re.compile(r'<svg [^>]*viewBox="(?P<box>[^"]+)"[^>]*>(?P<drawing>.*)', re.DOTALL)
_TAG = re.compile(r"<[^<>]+>")
_ID = re.compile(r'(\bid="|href="#|url\(#)')


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture and what it shows, in words that stand above it."""

    title: str
    svg: Markup


@contextmanager
def plot_style() -> Iterator[None]:
    """matplotlib's settings for figures made within."""
    import matplotlib

    style: dict[Any, Any] = {
        "font.size": 8.5,
        "font.sans-serif": ["DejaVu Sans"],  # measures the text; the page brings its own
        "text.color": INK,
        "text.parse_math": False,  # a $ in a name is a dollar sign
        "axes.edgecolor": EDGE,
        "axes.labelcolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "legend.frameon": False,
        "xtick.color": EDGE,
        "xtick.labelcolor": MUTED,
        "ytick.color": EDGE,
        "ytick.labelcolor": MUTED,
        "svg.hashsalt": "osft",  # equal inputs give equal pages
        "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and takes the page's font
    }
    with matplotlib.rc_context(style):
        yield


def to_svg(figure: "Figure", name: str, title: str, description: str = "", *, shrink: float = 0.0) -> Plot:
    """The figure as an inline SVG element whose ids begin with `name`, as ids are global in a page.

    `title` and `description` are read aloud in its place; names in them may be anything. It is as wide as there is
    room, up to 1.2 times its full size; `shrink` is the part of its full size below which it scrolls instead.
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    found = _SVG.search(buffer.getvalue())
    assert found is not None
    # Within tags only: a label may hold anything but `<`.
    drawing = _TAG.sub(lambda tag: _ID.sub(rf"\1{name}-", tag[0]), found["drawing"])
    width = figure.get_figwidth() * 72 * PIXELS_PER_POINT
    size = f"max-width:{(1.0 if shrink else 1.2) * width:.0f}px" + (f";min-width:{shrink * width:.0f}px" * bool(shrink))
    labels = {f"{name}-title": title} | ({f"{name}-description": description} if description else {})
    texts = Markup().join(
        Markup('<{0} id="{1}">{2}</{0}>').format(tag, label, printable(text, 2000))
        for tag, (label, text) in zip(("title", "desc"), labels.items(), strict=False)
    )
    root = f'<svg viewBox="{found["box"]}" role="img" aria-labelledby="{" ".join(labels)}" style="{size}">'
    return Plot(title, Markup(root) + texts + Markup(drawing))


def printable(text: str, width: int = 44) -> str:
    """`text` on one line, at most `width` characters, without what XML cannot hold."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def thinned(length: int) -> list[int]:
    """At most MAX_POINTS indices of a curve with `length` points, both ends included."""
    points = min(length, MAX_POINTS)
    return [round(i * (length - 1) / max(1, points - 1)) for i in range(points)]


def log_scale(axes: "Axes") -> None:
    """Logarithmic y with plain numbers; with ticks between the powers of ten where there are few of those."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
