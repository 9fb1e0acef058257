"""Heat maps with a number in every cell."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from osft.evaluation.report.svg import INK, MUTED, Plot, plot_style, printable, to_svg

CHARACTER, SCALE_WIDTH = 0.068, 2.4
"""Inches of a letter of a label, and of the scale below the cells."""
Cells = Sequence[Sequence[float | None]]
UNMEASURED = "#f1f3f5"
SEQUENTIAL = ("#ffffff", "#d3e4f5", "#93bfe5", "#4a90cc", "#0b5cad", "#083a70")
"""White for nothing, dark for much."""
DIVERGING = ("#a44f00", "#e08f3c", "#f7d9b5", "#ffffff", "#c5dcf2", "#5c9fd6", "#0b4f96")
"""Orange for worse, white for equal, blue for better: told apart by those who do not tell red from green."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How a cell's value becomes a colour."""

    label: str
    low: float
    high: float
    write: Callable[[float], str]
    """A value, as the scale's ticks show it."""
    center: float | None = None
    """The value in white of a diverging scale; None for a sequential one, which begins in white."""


def heat_map(
    name: str,
    title: str,
    cells: Cells,
    texts: Sequence[Sequence[str]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    scale: Scale,
    description: str = "",
    outlined: Collection[tuple[int, int]] = (),
    header_rows: int = 0,
    column_label: str = "",
    cell_width: float = 0.42,
) -> Plot:
    """Rows x columns of coloured cells, each with its text; None or NaN is a cell without a colour.

    An empty text marks what was not measured. `outlined` cells get a frame, a gap follows the first `header_rows`.
    `cell_width` is in inches.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    colors = SEQUENTIAL if scale.center is None else DIVERGING
    colormap = LinearSegmentedColormap.from_list("report", colors, N=65)  # odd, so that the middle is white
    norm: Any = Normalize(scale.low, scale.high)
    if scale.center is not None:
        norm = TwoSlopeNorm(scale.center, scale.low, scale.high)
    gap = 0.25 if header_rows else 0.0
    tops = [row + gap * (row >= header_rows) for row in range(len(rows))]
    row_names, column_names = [printable(row, 32) for row in rows], [printable(column, 22) for column in columns]
    longest_row, longest_column = (max(map(len, names), default=0) for names in (row_names, column_names))
    upright = CHARACTER * longest_column > cell_width
    width = 0.2 + CHARACTER * longest_row + cell_width * len(columns) + 0.4 * upright
    height = 0.3 + (0.055 * longest_column if upright else 0.1) + 0.27 * (tops[-1] + 3) + 0.2 * bool(column_label)
    with plot_style():
        figure = Figure(figsize=(max(width, 0.2 + CHARACTER * longest_row + SCALE_WIDTH), height), layout="constrained")
        axes = figure.add_subplot(frame_on=False)
        size = (len(columns), tops[-1] + 1 - tops[header_rows])
        axes.add_patch(Rectangle((0, tops[header_rows]), *size, facecolor=UNMEASURED, clip_on=False, zorder=1))
        for row, values in enumerate(cells):
            for column, value in enumerate(values):
                text, color = texts[row][column], (1.0, 1.0, 1.0)
                if value is not None and math.isfinite(value):
                    color = colormap(norm(value))[:3]
                elif not text:
                    continue
                frame = {"edgecolor": INK, "linewidth": 1.3, "zorder": 3} if (row, column) in outlined else {}
                look: dict[str, Any] = {"edgecolor": "#dfe4e9", "linewidth": 0.6, "zorder": 2} | frame
                corner = (column + 0.03, tops[row] + 0.04)
                cell = axes.add_patch(Rectangle(corner, 0.94, 0.92, facecolor=color, clip_on=False, **look))
                cell.set_in_layout(False)  # what lies within the axes needs no measuring, which takes seconds
                if text:
                    place: Any = {"x": column + 0.5, "y": tops[row] + 0.5, "ha": "center", "va": "center", "zorder": 4}
                    written = axes.text(s=text, fontsize=7, color=ink_on(color), **place)
                    written.set_in_layout(False)
        every = -(-len(columns) // 60)
        rotated: dict[str, Any] = {"rotation": 50, "ha": "left", "rotation_mode": "anchor"} if upright else {}
        axes.set_xlim(0, max(len(columns), SCALE_WIDTH / cell_width))
        axes.set_ylim(tops[-1] + 1, 0)
        axes.xaxis.tick_top()
        axes.set_xticks([i + 0.5 for i in range(0, len(columns), every)], column_names[::every], color=INK, **rotated)
        if column_label:
            axes.set_xlabel(column_label, loc="left")
            axes.xaxis.set_label_position("top")
        axes.set_yticks([top + 0.5 for top in tops], row_names, color=INK)
        axes.grid(visible=False)
        axes.tick_params(length=0, pad=2)
        bounds = (0.03, tops[-1] + 1.5, SCALE_WIDTH / cell_width - 0.06, 0.35)
        bar = figure.colorbar(
            ScalarMappable(norm, colormap),
            cax=axes.inset_axes(bounds, transform=axes.transData),
            orientation="horizontal",
        )
        solids: Any = bar.solids
        solids.set(rasterized=False, edgecolor="face")
        outline: Any = bar.outline
        outline.set_visible(False)
        ticks = [scale.low, (scale.low + scale.high) / 2 if scale.center is None else scale.center, scale.high]
        bar.set_ticks(ticks, labels=[scale.write(tick) for tick in ticks])
        bar.ax.tick_params(length=2, labelsize=7, pad=2)
        sides: tuple[Literal["left", "center", "right"], ...] = ("left", "center", "right")
        for label, side in zip(bar.ax.get_xticklabels(), sides, strict=True):
            label.set_horizontalalignment(side)
        bar.set_label(scale.label, fontsize=7.5, color=MUTED, loc="left", labelpad=2)
        return to_svg(figure, name, title, description, shrink=0.75)


def ink_on(color: Sequence[float]) -> str:
    """Black or white, whichever contrasts more with an RGB color of 0 … 1 (by WCAG 2's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "#ffffff"
