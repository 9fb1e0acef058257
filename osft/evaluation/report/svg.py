"""Plots as SVG elements within the page, all in one look."""

import io
import re
import xml.etree.ElementTree as ET
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

_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_NUMBER = re.compile(r"-?\d+\.\d+")
_FONT = re.compile(r"font-family: [^;]*(; )?")


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
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    _make_inline(root, name)
    width = figure.get_figwidth() * 72 * PIXELS_PER_POINT
    size = f"max-width:{(1.0 if shrink else 1.2) * width:.0f}px" + (f";min-width:{shrink * width:.0f}px" * bool(shrink))
    labels = {f"{name}-title": title} | ({f"{name}-description": description} if description else {})
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-labelledby": " ".join(labels), "style": size}
    for place, (tag, (label, text)) in enumerate(zip(("title", "desc"), labels.items(), strict=False)):
        element = ET.Element(tag, {"id": label})
        element.text = printable(text, 2000)
        root.insert(place, element)
    return Plot(title, Markup(ET.tostring(root, encoding="unicode")))


def _make_inline(root: ET.Element, name: str) -> None:
    """Keep what HTML needs: no namespaces, no metadata, no style sheet of its own, ids that are used, and short."""
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = {value[1:] for value in values if value.startswith("#")}
    used |= {target for value in values for target in _REFERENCE.findall(value)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        for key, value in attributes.items():
            if key == "id":
                attributes[key] = f"{name}-{value}" if value in used else ""
            elif key == "href":
                attributes[key] = value.replace("#", f"#{name}-", 1)
            elif key == "style":
                attributes[key] = _FONT.sub("", value).replace("; ", ";").replace(": ", ":")
            elif key in ("d", "x", "y", "transform", "points"):
                attributes[key] = _NUMBER.sub(lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
            attributes[key] = attributes[key].replace("url(#", f"url(#{name}-")
        element.attrib = {
            key: value for key, value in attributes.items() if value and not value.startswith("rotate(-0")
        }
        if element.tag != "text":
            element.text = None
        element.tail = None
    for parent in list(root.iter()):
        for at, child in enumerate(list(parent)):
            while child.tag == "g" and not child.attrib and len(child) == 1:
                child = parent[at] = child[0]
        for child in [c for c in parent if c.tag in ("metadata", "style") or (c.tag == "g" and not len(c))]:
            parent.remove(child)


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
