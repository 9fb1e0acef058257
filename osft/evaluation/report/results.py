"""The models of a round on its evaluation sets and on public benchmarks."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from osft.evaluation.record import Evaluation, Example, MetricChange
from osft.evaluation.report.formats import format_number
from osft.evaluation.report.svg import BETTER, INK, MUTED, PANEL, WORSE, Plot, plot_style, printable, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROLES = ("new task", "earlier task", "anchor", "self-written")
HATCHES = {"new task": "", "earlier task": "////", "anchor": "||||"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The candidate's value of a metric minus another model's."""

    value: float
    stderr: float | None
    relative: float | None
    """Divided by the other model's value; None where that is 0."""
    verdict: str
    """better, worse, or "within error" for a change of at most one standard error; empty if it is not finite."""

    @property
    def relative_stderr(self) -> float | None:
        """`stderr` in the unit of `relative`."""
        if self.stderr is None or not self.relative or not self.value:
            return None
        return abs(self.stderr * self.relative / self.value)


def models(evaluation: Evaluation) -> dict[str, str]:
    """The round's models, oldest first: key -> what the page calls it."""
    labels: dict[str, str] = {}
    for key in ("base", "champion", "candidate"):
        if key in evaluation.models:
            version = evaluation.models[key].version
            labels[key] = key if version is None else f"{key}, version {version}"
    return labels


def result_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Per set that has scores, the new task first, anchors last: `name`, `role`, `notes`, `scores` by model, `changes`.

    `changes[metric]` is what the candidate changed against the round's reference, None where it was not measured.
    """
    rows = []
    for name in evaluation.results["candidate"]:
        described = evaluation.sets[name]
        scores = {model: evaluation.results[model][name] for model in models(evaluation)}
        changes = evaluation.changes[evaluation.reference][name]
        rows.append(
            {
                "name": name,
                "role": described.role,
                "notes": described.notes,
                "scores": scores,
                "changes": {
                    "loss": _change(changes.loss, higher_is_better=False),
                    "accuracy": _change(changes.accuracy, higher_is_better=True),
                },
            }
        )
    return sorted(rows, key=lambda row: ROLES.index(row["role"]) if row["role"] in ROLES else len(ROLES))


def benchmark_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Per benchmark: `name`, `metric`, `higher_is_better`, `num_samples`, `scores` by model, and the `change`.

    The change's standard error is that of two independent measurements: the same questions make it smaller.
    """
    benchmarks = evaluation.benchmarks
    if benchmarks is None:
        return []
    rows = []
    for name, described in benchmarks.tasks.items():
        scores = {model: benchmarks.results.get(model, {}).get(name) for model in models(evaluation)}
        before, after = scores[evaluation.reference], scores["candidate"]
        change = None
        if before and after:
            errors = [score.stderr for score in (before, after) if score.stderr is not None]
            stderr = math.hypot(*errors) if len(errors) == 2 else None
            measured = MetricChange(change=after.value - before.value, relative=None, stderr=stderr)
            change = _change(measured, higher_is_better=described.higher_is_better)
        rows.append({"name": name, "scores": scores, "change": change} | dict(described))
    return rows


def examples_by_set(evaluation: Evaluation) -> dict[str, list[Example]]:
    """What the models answered, by evaluation set, the new task first."""
    found: dict[str, list[Example]] = {}
    for row in result_rows(evaluation):
        if of_set := [example for example in evaluation.examples if example.set == row["name"]]:
            found[row["name"]] = of_set
    return found


def change_plots(rows: list[dict[str, Any]], reference: str) -> list[Plot]:
    """Bars of the relative change of loss, and of the change of accuracy where it was measured."""
    plots = []
    for metric, unit, better in (("loss", "%", "left"), ("accuracy", "points", "right")):
        bars = []
        for row in rows:
            change = row["changes"][metric]
            if change is None or not change.verdict:
                continue
            height = change.relative if metric == "loss" else change.value
            error = change.relative_stderr if metric == "loss" else change.stderr
            if height is not None:
                bars.append((row["name"], row["role"], 100 * height, 100 * (error or 0.0), change.verdict))
        if bars:
            title = f"Change of {metric} against the {reference} ({unit}, {better} of 0 is better)"
            plots.append(_bars(f"{metric}-change", title, bars))
    return plots


def _change(measured: MetricChange | None, *, higher_is_better: bool) -> Change | None:
    if measured is None:
        return None
    value, stderr = measured.change, measured.stderr
    verdict = "better" if (value > 0) == higher_is_better else "worse"
    if abs(value) <= (stderr or 0.0):
        verdict = "within error"
    if not math.isfinite(value):
        verdict = ""
    return Change(value=value, stderr=stderr, relative=measured.relative, verdict=verdict)


def _bars(name: str, title: str, bars: list[tuple[str, str, float, float, str]]) -> Plot:
    """Horizontal bars: name, role, length, standard error and verdict of each."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    with plot_style():
        figure = Figure(figsize=(PANEL[0], 0.75 + 0.32 * len(bars)), layout="constrained")
        axes = figure.add_subplot(frame_on=False)
        for y, (_, role, length, error, verdict) in enumerate(bars):
            color = {"better": BETTER, "worse": WORSE}.get(verdict, MUTED)
            fill = color if role == "new task" else "white"
            axes.barh(y, length, height=0.6, facecolor=fill, edgecolor=color, hatch=HATCHES.get(role, ""), linewidth=1)
            axes.errorbar(length, y, xerr=error, color=INK, linewidth=1, capsize=2)
            _value_label(axes, length, error, y)
        axes.set_yticks(range(len(bars)), [printable(bar[0], 22) for bar in bars], color=INK)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        ends = [0.0] + [bar[2] + sign * bar[3] for bar in bars for sign in (-1, 1)]
        room = 0.28 * (max(ends) - min(ends) or 1.0)
        axes.set_xlim(min(ends) - room * (min(ends) < 0), max(ends) + room * (max(ends) > 0))
        axes.axvline(0, color=INK, linewidth=1)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        roles = dict.fromkeys(role for role in ROLES if any(bar[1] == role for bar in bars))
        legend = [
            Patch(facecolor=MUTED if r == "new task" else "white", edgecolor=MUTED, hatch=HATCHES[r], label=r)
            for r in roles
        ]
        if legend:
            figure.legend(handles=legend, loc="outside lower right", ncols=3, fontsize=7.5)
        described = ", ".join(f"{bar[0]} {format_number(bar[2], 1, signed=True)}" for bar in bars)
        return to_svg(figure, name, title, described)


def _value_label(axes: "Axes", length: float, error: float, y: int) -> None:
    axes.annotate(
        format_number(length, 1, signed=True),
        (length - error if length < 0 else length + error, y),
        xytext=(-4 if length < 0 else 4, 0),
        textcoords="offset points",
        ha="right" if length < 0 else "left",
        va="center",
        weight="bold",
        fontsize=7.5,
    )
