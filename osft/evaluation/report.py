"""The report of one training run: a self-contained HTML page with the decision first and what led to it behind.

`render_report` takes what the steps of a pipeline leave behind: the evaluation's result, `training.json` and
`metrics.jsonl` of the run, the factor set and the dataset's statistics. Names, paths, prompts and answers are
untrusted: the template escapes them, and plots go through an XML tree before they are inlined.
"""

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from osft.subspace.factor_store import FactorSet

NEW_TASK, ANCHOR, INK, MUTED, GRID = "#0b5cad", "#9aa7b4", "#1f2328", "#59636e", "#e6eaef"
BLOCK_STYLES = (("#08306b", "-"), ("#2f7fc1", "--"), ("#e07b00", "-."))
"""Colour and line style of the first, the middle and the last block."""
MAX_POINTS = 600
"""Points of a plotted curve; more would only make the page larger."""
MAX_ANNOTATED_BLOCKS = 36
"""Heat map columns up to which the cells are wide enough for their numbers."""


def render_report(
    evaluation: dict[str, Any],
    *,
    training: dict[str, Any] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    factors: "FactorSet | None" = None,
    dataset: dict[str, Any] | None = None,
) -> str:
    """One HTML page, without any reference to something outside it.

    `evaluation` holds the evaluation sets, the results of the base and the candidate model, the decision and
    examples; `training` is `training.json`, `metrics` the lines of `metrics.jsonl`, `dataset` the statistics in
    `dataset.json`. What is None is left out of the page. Raises KeyError or jinja2.UndefinedError where an
    input lacks a field.
    """
    templates = PackageLoader("osft", "evaluation")
    environment = Environment(loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(number=format_number, percent=format_percent, duration=format_duration)
    rows = result_rows(evaluation)
    page = environment.get_template("report.html.j2").render(
        evaluation=evaluation,
        rows=rows,
        failed_rules=[rule for rule in evaluation["decision"]["rules"] if not rule["passed"]],
        loss_change_plot=_loss_change_plot(rows),
        training=training,
        training_plot=_training_plot(metrics, training) if metrics else None,
        metrics=metrics,
        subspace=_subspace(factors, training) if factors else None,
        dataset=dataset,
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # JSON can hold lone surrogates, a file cannot


def result_rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Per evaluation set, new tasks first: `name`, `role`, `base`, `candidate` and `change`, the relative change of
    loss (None where the base's loss is 0 or one of the two is not finite).
    """
    rows = []
    for name, described in evaluation["sets"].items():
        base, candidate = (evaluation["results"][model][name] for model in ("base", "candidate"))
        before, after = base["loss"], candidate["loss"]
        change = after / before - 1 if before and math.isfinite(before) and math.isfinite(after) else None
        rows.append({"name": name, "role": described["role"], "base": base, "candidate": candidate, "change": change})
    return sorted(rows, key=lambda row: row["role"] != "new task")


def format_number(value: float | None, digits: int = 0) -> str:
    """`1,234.50`, with a true minus sign; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def format_percent(value: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """`0.421` -> `42.1 %`, or `+42.1 %` if signed; a dash for None."""
    if value is None:
        return "–"
    text = f"{100 * value:{'+' if signed else ''},.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−") + "\N{NO-BREAK SPACE}%"


def format_duration(seconds: float) -> str:
    """`23.4 s`, `3 min 24 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def block_and_kind(target: str) -> tuple[int, str] | None:
    """`model.layers.3.self_attn.q_proj` -> (3, "q_proj"); None for a name without a block number."""
    block = re.search(r"(?:^|\.)(\d+)(?:\.|$)", target)
    return (int(block[1]), target.rsplit(".", 1)[-1]) if block else None


def relative_update_sizes(updates: dict[str, float], weights: dict[str, float]) -> dict[tuple[int, str], float]:
    """(block, kind) -> Frobenius norm of the update over that of the weight, from both norms of each target.

    Several weights of one block and kind (experts) count as one: the root of the sum of their squares.
    """
    sums: dict[tuple[int, str], list[float]] = {}
    for target, update in updates.items():
        place = block_and_kind(target)
        if place and target in weights:
            total = sums.setdefault(place, [0.0, 0.0])
            total[0] += update**2
            total[1] += weights[target] ** 2
    return {place: math.sqrt(update / weight) for place, (update, weight) in sums.items() if weight}


def _subspace(factors: "FactorSet", training: dict[str, Any] | None) -> dict[str, Any]:
    """What the subspace section shows."""
    import numpy as np

    spectra = {target: factors.singular_values(target).double().numpy() for target in factors.weights}
    frozen = {target: len(values) - factors.weights[target]["rank"] for target, values in spectra.items()}
    energy = {target: float(np.sum(values**2)) for target, values in spectra.items()}
    frozen_energy = sum(float(np.sum(values[: frozen[target]] ** 2)) for target, values in spectra.items())
    norms = {target: math.sqrt(total) for target, total in energy.items()}
    updates = {target: layout["update_norm"] for target, layout in training["rank_layout"].items()} if training else {}
    sizes = relative_update_sizes(updates, norms)
    return {
        "key": factors.key,
        "unfreeze_rank_ratio": factors.unfreeze_rank_ratio,
        "free_subspace": factors.free_subspace,
        "num_weights": len(spectra),
        "frozen_energy": frozen_energy / sum(energy.values()) if sum(energy.values()) else None,
        "spectra_plot": _spectra_plot(spectra, frozen),
        "updates_plot": _updates_plot(sizes) if sizes else None,
        "largest_update": max(sizes.items(), key=lambda item: item[1]) if sizes else None,
    }


@contextmanager
def _plot_style() -> Iterator[None]:
    import matplotlib

    style: dict[Any, Any] = {
        "font.size": 9,
        "text.color": INK,
        "text.parse_math": False,  # a $ in a name is a dollar sign
        "axes.edgecolor": ANCHOR,
        "axes.labelcolor": MUTED,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "svg.hashsalt": "osft",  # equal inputs give equal pages
        "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and takes the page's font
    }
    with matplotlib.rc_context(style):
        yield


def _svg(figure: "Figure", name: str, title: str) -> Markup:
    """The figure as an inline SVG element whose ids begin with `name`, as ids are global in a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML needs no namespaces
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        for key, value in attributes.items():
            if key == "id":
                attributes[key] = f"{name}-{value}"
            elif key == "href":
                attributes[key] = value.replace("#", f"#{name}-", 1)
            else:
                attributes[key] = value.replace("url(#", f"url(#{name}-")
        element.attrib = attributes
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in ("metadata", "style")]:  # the style would be the whole page's
            parent.remove(child)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-labelledby": f"{name}-title"}
    heading = ET.Element("title", {"id": f"{name}-title"})
    heading.text = title
    root.insert(0, heading)
    return Markup(ET.tostring(root, encoding="unicode"))


def _printable(text: str, width: int = 44) -> str:
    """`text` on one line, at most `width` characters, without what XML cannot hold."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _thinned(length: int) -> list[int]:
    """At most MAX_POINTS indices of a curve with `length` points, both ends included."""
    points = min(length, MAX_POINTS)
    return [round(i * (length - 1) / max(1, points - 1)) for i in range(points)]


def _loss_change_plot(rows: list[dict[str, Any]]) -> Markup | None:
    """Bars of the relative change of loss; the new task solid, anchors hatched."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    known = [row for row in rows if row["change"] is not None]
    if not known:
        return None
    anchor_look = {"facecolor": "#dfe5eb", "edgecolor": MUTED, "hatch": "////"}
    looks: dict[bool, Any] = {True: {"color": NEW_TASK}, False: anchor_look}
    with _plot_style():
        figure = Figure(figsize=(10, 0.9 + 0.42 * len(known)), layout="constrained")
        axes = figure.add_subplot(frame_on=False)
        for y, row in enumerate(known):
            change = 100 * row["change"]
            axes.barh(y, change, height=0.62, linewidth=0.8, **looks[row["role"] == "new task"])
            axes.annotate(
                format_percent(row["change"], signed=True),
                (change, y),
                xytext=(-5 if change < 0 else 5, 0),
                textcoords="offset points",
                ha="right" if change < 0 else "left",
                va="center",
                weight="bold",
            )
        axes.set_yticks(range(len(known)), [_printable(row["name"]) for row in known], color=INK)
        axes.set_ylim(len(known) - 0.5, -0.5)
        low, high = min(0.0, *(100 * r["change"] for r in known)), max(0.0, *(100 * r["change"] for r in known))
        room = 0.12 * (high - low or 1.0)
        axes.set_xlim(low - room, high + room)
        axes.axvline(0, color=INK, linewidth=1)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("relative change of loss (%): left of zero is better than the base model")
        legend = [Patch(label="new task", **looks[True]), Patch(label="anchor", **looks[False])]
        figure.legend(handles=legend, loc="outside upper right", ncols=2, frameon=False)
        return _svg(figure, "loss-change", "Relative change of loss per evaluation set")


def _training_plot(metrics: list[dict[str, Any]], training: dict[str, Any] | None) -> Markup:
    """Loss, learning rate, gradient norm and throughput against the step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shown = [metrics[i] for i in _thinned(len(metrics))]
    steps = [line["step"] for line in shown]
    marker = "o" if len(steps) <= 40 else ""

    def curve(axes: "Axes", field: str, title: str, *, color: str = NEW_TASK) -> None:
        axes.plot(steps, [line[field] for line in shown], color=color, marker=marker, markersize=3.5, linewidth=1.4)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    with _plot_style():
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        loss, learning_rate, grad_norm, throughput = figure.subplots(2, 2).flat
        smoothed = _moving_average([line["loss"] for line in metrics]) if len(metrics) > 40 else None
        curve(loss, "loss", "Loss (nats per loss token)", color="#a9c6e3" if smoothed else NEW_TASK)
        if smoothed:
            loss.plot(steps, [smoothed[i] for i in _thinned(len(metrics))], color=NEW_TASK, label="moving average")
            loss.legend(frameon=False)
        _tokens_axis(loss, metrics)

        curve(learning_rate, "learning_rate", "Learning rate")
        learning_rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        learning_rate.set_ylim(bottom=0)

        curve(grad_norm, "grad_norm", "Gradient norm (before clipping)")
        clip = training["config"]["max_grad_norm"] if training else 0
        if clip:
            grad_norm.axhline(clip, color="#b35900", linestyle="--", linewidth=1, label=f"clipped to {clip:g}")
            grad_norm.legend(frameon=False)
        if all(line["grad_norm"] > 0 for line in shown):
            _log_scale(grad_norm)

        curve(throughput, "tokens_per_second", "Throughput (tokens per second)")
        throughput.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        throughput.set_ylim(bottom=0)
        return _svg(figure, "training", "Loss, learning rate, gradient norm and throughput against the step")


def _log_scale(axes: "Axes") -> None:
    """Logarithmic y with plain numbers; with ticks between the powers of ten where there are few of those."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _moving_average(values: Sequence[float], weight: float = 0.1) -> list[float]:
    """Exponential moving average."""
    averages = [values[0]]
    for value in values[1:]:
        averages.append((1 - weight) * averages[-1] + weight * value)
    return averages


def _tokens_axis(axes: "Axes", metrics: list[dict[str, Any]], ticks: int = 5) -> None:
    """A second axis on top: the tokens processed up to a step."""
    last = len(metrics) - 1
    marked = [metrics[i] for i in sorted({round(last * i / (ticks - 1)) for i in range(ticks)})]
    top = axes.secondary_xaxis("top")
    top.set_xticks([line["step"] for line in marked], [f"{line['tokens']:,}" for line in marked])
    top.spines["top"].set_visible(True)
    top.set_xlabel("tokens", fontsize=8)
    top.tick_params(labelsize=8)


def _representatives(names: Iterable[str]) -> dict[str, dict[int, str]]:
    """Kind -> block -> target for up to four kinds, in the model's order, and the first, middle and last block."""
    found: dict[str, dict[int, str]] = {}
    for target in names:
        if place := block_and_kind(target):
            found.setdefault(place[1], {}).setdefault(place[0], target)
    kinds = list(found)
    chosen = [kinds[i] for i in sorted({round(i * (len(kinds) - 1) / 3) for i in range(4)})] if kinds else []
    return {
        kind: {block: found[kind][block] for block in sorted({b[0], b[len(b) // 2], b[-1]})}
        for kind in chosen
        if (b := sorted(found[kind]))
    }


def _spectra_plot(spectra: dict[str, Any], frozen: dict[str, int]) -> Markup | None:
    """Singular values of representative weights and where they are split."""
    from matplotlib.figure import Figure

    chosen = _representatives(spectra)
    if not chosen:
        return None
    with _plot_style():
        figure = Figure(figsize=(10, 2.9), layout="constrained")
        panels = figure.subplots(1, len(chosen), squeeze=False)[0]
        for axes, (kind, targets) in zip(panels, chosen.items(), strict=True):
            for (block, target), (color, line) in zip(targets.items(), BLOCK_STYLES, strict=False):
                values = spectra[target]
                points = [i for i in _thinned(len(values)) if values[i] > 0]  # a log scale has no 0
                heights = [values[i] for i in points]
                axes.plot([i + 1 for i in points], heights, color=color, linestyle=line, label=f"block {block}")
            split, size = frozen[target], len(values)
            axes.axvspan(split + 0.5, size + 0.5, facecolor="#fff1d6", zorder=0)
            axes.axvline(split + 0.5, color="#b35900", linewidth=1, linestyle=":")
            axes.set_xlim(0.5, size + 0.5)
            _log_scale(axes)
            axes.set_title(_printable(kind, 24))
            axes.set_xlabel(f"{split} frozen | {size - split} unfrozen")
        panels[0].set_ylabel("singular value")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
        return _svg(figure, "spectra", "Singular values of weights of the first, the middle and the last block")


def _updates_plot(sizes: dict[tuple[int, str], float]) -> Markup:
    """Heat map of the relative update sizes, kinds x blocks."""
    import numpy as np
    from matplotlib.figure import Figure

    blocks, kinds = sorted({block for block, _ in sizes}), list(dict.fromkeys(kind for _, kind in sizes))
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for (block, kind), size in sizes.items():
        grid[kinds.index(kind), blocks.index(block)] = 100 * size
    largest = np.nanmax(grid) or 1.0  # of a run that changed nothing
    with _plot_style():
        figure = Figure(figsize=(10, 1.1 + 0.3 * len(kinds)), layout="constrained")
        axes = figure.add_subplot(frame_on=False)
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(grid), cmap="Blues", vmin=0, vmax=largest, edgecolor="white", lw=0.8
        )
        for row, column in np.argwhere(np.isfinite(grid)) if len(blocks) <= MAX_ANNOTATED_BLOCKS else ():
            value = grid[row, column]
            place, color = (column + 0.5, row + 0.5), "white" if value > 0.55 * largest else INK
            axes.annotate(f"{value:.2f}", place, ha="center", va="center_baseline", fontsize=6.5, color=color)
        every = -(-len(blocks) // 40)
        axes.set_xticks(np.arange(0, len(blocks), every) + 0.5, [str(block) for block in blocks[::every]])
        axes.set_yticks(np.arange(len(kinds)) + 0.5, [_printable(kind, 24) for kind in kinds], color=INK)
        axes.set_ylim(len(kinds), 0)
        axes.set_xlabel("block")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        scale: Any = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=14)
        scale.solids.set(rasterized=False, edgecolor="face")
        scale.outline.set_visible(False)
        scale.set_label("update / weight (%)")
        return _svg(figure, "updates", "Size of each layer's update relative to its weight, in percent")
