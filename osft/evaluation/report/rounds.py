"""What all rounds so far did: the continual-learning matrix, transfer, forgetting and drift."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from osft.evaluation import matrix as measures
from osft.evaluation.matrix import Score
from osft.evaluation.record import AnchorScores, ContinualMatrix, MatrixRound
from osft.evaluation.report.formats import format_number, format_percent
from osft.evaluation.report.heat_map import CHARACTER, Scale, heat_map
from osft.evaluation.report.svg import BETTER, INK, LINES, MUTED, PANEL, WORSE, Plot, plot_style, printable, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")
MAX_BARS = 40
"""Tasks whose forgetting is drawn; of more, those with the most."""
UNITS = {"loss": "nats per token", "accuracy": "points"}
FACTORS = {"loss": 1.0, "accuracy": 100.0}
"""From a metric to its unit."""
DIGITS = {"loss": 3, "accuracy": 1}


def matrix_blocks(matrix: ContinualMatrix) -> list[dict[str, Any]]:
    """Per metric of a matrix of several rounds: its numbers as text, the heat map and the plots over rounds."""
    blocks = []
    for metric, measured in matrix.metrics.items():
        block = dict(measured) | {"rows": [_whole_row(row, matrix) for row in measured.rows]}
        block["baseline"] = _whole_row(measured.baseline, matrix)
        history = measures_by_round(block, metric)
        plots = [_average_plot(history["average"], metric), _transfer_plot(history, metric)]
        if block["forgetting"]:
            plots += [_forgetting_plot(history, metric), _forgotten_tasks_plot(block["forgetting"], metric)]
        if drift := anchor_drifts(matrix.anchors, metric):
            plots.append(_drift_plot(drift, metric))
        names = row_names(matrix.rounds)
        blocks.append(
            block
            | {
                "metric": metric,
                "unit": UNITS[metric],
                "heat_map": _matrix_plot(matrix.rounds, names, block, metric).svg,
                "names": names,
                "write": lambda value, metric=metric: _cell(value, metric),
                "plots": plots,
                "tiles": _tiles(block, metric),
            }
        )
    return blocks


def row_names(rounds: Sequence[MatrixRound]) -> list[str]:
    """What a model is called that came out of a round."""
    versions = ["" if r.version is None else f" (v{r.version})" for r in rounds]
    return [f"{number} {r.task}{version}" for number, (r, version) in enumerate(zip(rounds, versions, strict=True), 1)]


def _whole_row(row: Sequence[Score], matrix: ContinualMatrix) -> list[Score]:
    """A score or None for every task: a row ends with what was measured."""
    return [*row, *[None] * (len(matrix.rounds) - len(row))]


def measures_by_round(block: dict[str, Any], metric: str) -> dict[str, Any]:
    """`average`, `backward` and `forward` transfer and average `forgetting` after each round; None without the scores.

    Each comes from the rounds and tasks up to it. The average is in the metric's own unit; the others are of negated
    losses, as in `osft.evaluation.matrix`. `task_forgetting` is a list of each round: forgetting of the tasks before.
    """
    rows, baseline = block["rows"], block["baseline"]
    if metric == "loss":
        rows, baseline = measures.negated(rows), measures.negated([baseline])[0]
    found: dict[str, Any] = {"average": [], "backward": [], "forward": [], "forgetting": [], "task_forgetting": []}
    for end in range(1, len(rows) + 1):
        part = [row[:end] for row in rows[:end]]
        average = _if_measured(measures.average_accuracy, part)
        found["average"].append(-average if metric == "loss" and average is not None else average)
        found["backward"].append(_if_measured(measures.backward_transfer, part))
        found["forward"].append(_if_measured(measures.forward_transfer, part, baseline[:end]))
        found["forgetting"].append(_if_measured(measures.average_forgetting, part))
        found["task_forgetting"].append(_if_measured(measures.forgetting, part) or [])
    return found


def anchor_drifts(anchors: Mapping[str, Mapping[str, AnchorScores]], metric: str) -> dict[str, list[float | None]]:
    """Per anchor with a baseline, the change after each round: relative for loss, a difference for accuracy."""
    drifts = {}
    for name, measured in anchors.items():
        of_metric = measured.get(metric)
        base = of_metric.baseline if of_metric else None
        if of_metric is None or base is None or not math.isfinite(base) or (metric == "loss" and not base):
            continue
        whole = base if metric == "loss" else 1
        drift = [(v - base) / whole if v is not None and math.isfinite(v) else None for v in of_metric.values]
        if any(value is not None for value in drift):
            drifts[name] = drift
    return drifts


def _if_measured(measure: Callable[..., T], *given: Any) -> T | None:
    try:
        return measure(*given)
    except ValueError:  # a score is missing
        return None


def _known(value: Score) -> bool:
    return value is not None and math.isfinite(value)


def _cell(value: Score, metric: str) -> str:
    if value is None:
        return ""
    return format_number(FACTORS[metric] * value, DIGITS[metric])


def _tiles(block: dict[str, Any], metric: str) -> list[tuple[str, str, str]]:
    """Value, name and meaning of the numbers that sum up the matrix."""

    def text(value: float | None, signed: bool = True) -> str:
        return format_number(None if value is None else FACTORS[metric] * value, DIGITS[metric], signed=signed)

    average = block["average_accuracy"]
    if metric == "loss" and average is not None:
        average = -average  # computed on negated losses
    return [
        (text(average, signed=False), f"average {metric}", "of the candidate on all tasks"),
        (text(block["backward_transfer"]), "backward transfer", "of later rounds to earlier tasks, below 0 is worse"),
        (text(block["forward_transfer"]), "forward transfer", "of earlier rounds to tasks not learned yet"),
        (text(block["average_forgetting"]), "average forgetting", "since each task's best version, above 0 is worse"),
    ]


def _matrix_plot(rounds: Sequence[MatrixRound], names: Sequence[str], block: dict[str, Any], metric: str) -> Plot:
    """Rounds x tasks, coloured by the change against the base model."""
    values = [block["baseline"], *block["rows"]]

    def change(value: Score, base: Score) -> float | None:
        """Above 0: better than the base model. Logarithmic for losses, where 1 -> 0.1 is as much as 10 -> 1."""
        if value is None or base is None or not (_known(value) and _known(base)):
            return None
        if metric == "accuracy":
            return value - base
        return math.log(base / value) if base > 0 and value > 0 else None

    cells = [[change(value, base) for value, base in zip(row, block["baseline"], strict=True)] for row in values]
    known = [value for row in cells for value in row if value is not None]
    low, high = min([-0.1, *known]), max([0.1, *known])
    write = {
        "loss": lambda v: format_percent(math.exp(-v) - 1, 0, signed=True),
        "accuracy": lambda v: format_number(100 * v, 0, signed=True),
    }[metric]
    unit = "change in percent" if metric == "loss" else "change in points"
    longest = max(len(r.task) for r in rounds)
    title = f"The {metric} of the model after each round (rows) on each task (columns)"
    return heat_map(
        f"matrix-{metric}",
        title,
        cells,
        [[_cell(value, metric) for value in row] for row in values],
        rows=["base model", *names],
        columns=[r.task for r in rounds],
        scale=Scale(label=f"{metric} against the base model ({unit})", low=low, high=high, center=0.0, write=write),
        description="The same numbers are in the table below the picture.",
        outlined={(task + 1, task) for task in range(len(rounds))},
        header_rows=1,
        cell_width=min(1.2, max(0.6, CHARACTER * longest))
        if len(rounds) <= 6
        else max(0.42, 0.75 - 0.02 * len(rounds)),
    )


def _panel(rounds: int) -> tuple[Any, "Axes"]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=PANEL, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("round")
    axes.set_xlim(0.8 - 0.02 * rounds, rounds + 0.2 + 0.02 * rounds)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    return figure, axes


def _line(axes: "Axes", values: Sequence[float | None], number: int, label: str, factor: float = 1.0) -> None:
    color, style = LINES[number % len(LINES)]
    heights = [math.nan if value is None else factor * value for value in values]
    looks: dict[str, Any] = {"color": color, "linestyle": style, "marker": "os^Dv"[number % 5], "markersize": 3.5}
    axes.plot(range(1, len(values) + 1), heights, linewidth=1.4, label=label, **looks)


def _average_plot(averages: list[float | None], metric: str) -> Plot:
    title = f"Average {metric} on the tasks so far ({UNITS[metric]})"
    with plot_style():
        figure, axes = _panel(len(averages))
        _line(axes, averages, 0, "average", FACTORS[metric])
        axes.set_ylim(bottom=0, top=1.1 * axes.get_ylim()[1])
        return to_svg(figure, f"average-{metric}", title)


def _transfer_plot(history: dict[str, Any], metric: str) -> Plot:
    title = f"Transfer ({UNITS[metric]}, below 0 is worse)"
    with plot_style():
        figure, axes = _panel(len(history["average"]))
        axes.axhline(0, color=INK, linewidth=0.8)
        _line(axes, history["backward"], 0, "backward", FACTORS[metric])
        _line(axes, history["forward"], 1, "forward", FACTORS[metric])
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=7.5)
        return to_svg(figure, f"transfer-{metric}", title)


def _forgetting_plot(history: dict[str, Any], metric: str) -> Plot:
    """Forgetting of every task and their average, after each round."""
    title = f"Forgetting after each round ({UNITS[metric]}, above 0 is worse)"
    by_round = history["task_forgetting"]
    with plot_style():
        figure, axes = _panel(len(by_round))
        axes.axhline(0, color=INK, linewidth=0.8)
        for task in range(len(by_round) - 1):
            of_task = [FACTORS[metric] * found[task] if task < len(found) else math.nan for found in by_round]
            label = "each task" if task == 0 else None
            marker = "." if len(by_round) <= 12 else ""
            axes.plot(range(1, len(by_round) + 1), of_task, color="#b8c2cc", linewidth=1, marker=marker, label=label)
        _line(axes, history["forgetting"], 1, "average", FACTORS[metric])
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=7.5)
        return to_svg(figure, f"forgetting-{metric}", title)


def _forgotten_tasks_plot(forgetting: dict[str, float], metric: str) -> Plot:
    """Bars of what the candidate forgot of each task."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    title = f"Forgotten of each task ({UNITS[metric]})"
    kept = sorted(forgetting, key=lambda task: forgetting[task], reverse=True)[:MAX_BARS]
    tasks = [task for task in forgetting if task in kept]
    lengths = [FACTORS[metric] * forgetting[task] for task in tasks]
    with plot_style():
        figure = Figure(figsize=(PANEL[0], 0.5 + (0.32 if len(tasks) < 8 else 0.2) * len(tasks)), layout="constrained")
        axes = figure.add_subplot(frame_on=False)
        colors = [WORSE if length > 0 else BETTER for length in lengths]
        axes.barh(range(len(tasks)), lengths, height=0.62, color=colors)
        for y, length in enumerate(lengths):
            text, side = format_number(length, DIGITS[metric], signed=True), 1 if length > 0 else -1
            at: Any = {"xytext": (3 * side, 0), "textcoords": "offset points"}
            axes.annotate(text, (length, y), ha="left" if side > 0 else "right", va="center", fontsize=7, **at)
        axes.set_yticks(range(len(tasks)), [printable(task, 22) for task in tasks], color=INK)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        low, high = min(0.0, *lengths), max(0.0, *lengths)
        room = 0.22 * (high - low or 1.0)
        axes.set_xlim(low - room * (low < 0), high + room)
        axes.xaxis.set_major_locator(MaxNLocator(4))  # small numbers are long
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        return to_svg(figure, f"forgotten-{metric}", title)


def _drift_plot(drifts: dict[str, list[float | None]], metric: str) -> Plot:
    rule = "above" if metric == "loss" else "below"
    unit = "%" if metric == "loss" else "points"
    title = f"Anchors: {metric} against the base model ({unit}, {rule} 0 is worse)"
    return line_plot(f"drift-{metric}", title, drifts, factor=100)


def line_plot(name: str, title: str, values: Mapping[str, Sequence[float | None]], *, factor: float = 1.0) -> Plot:
    """A line for each set, times `factor`, over the rounds; None is a gap."""
    with plot_style():
        figure, axes = _panel(max(map(len, values.values())))
        axes.axhline(0, color=INK, linewidth=0.8)
        for number, (label, of_set) in enumerate(values.items()):
            _line(axes, of_set, number, printable(label, 22), factor)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=7.5)
        return to_svg(figure, name, title)
