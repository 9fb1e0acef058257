"""The training run's curves, and what the round cost."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from osft.evaluation.report.formats import format_duration, format_number
from osft.evaluation.report.svg import BETTER, EDGE, PANEL, WORSE, Plot, log_scale, plot_style, thinned, to_svg
from osft.models.training_summary import FittedStep, TrainingSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHED_FROM = 40
"""Steps from which the loss is drawn with its moving average, and points lose their markers."""


def training_plots(metrics: list[dict[str, Any]], training: TrainingSummary | None) -> list[Plot]:
    """Loss, learning rate, gradient norm and throughput against the step; the drift where it was measured."""
    return [
        _loss_plot(metrics),
        *_drift_plots(metrics),
        _curve(metrics, "learning_rate", "Learning rate"),
        _gradient_plot(metrics, _clip(training)),
        _curve(metrics, "tokens_per_second", "Throughput (tokens per second)"),
    ]


def _clip(training: TrainingSummary | None) -> float:
    """The gradient norm that is clipped to; 0 for none."""
    clip = training.config["max_grad_norm"] if training else None
    return clip if isinstance(clip, int | float) else 0.0


def fitted_step(training: TrainingSummary | None) -> dict[str, Any] | None:
    """The fields of `FittedStep` and its `plot`; None of a run without."""
    fitted = training.fitted_step if training else None
    return None if fitted is None else dict(fitted) | {"plot": _fitted_plot(fitted)}


def cost_of(
    training: TrainingSummary | None, metrics: list[dict[str, Any]] | None, cost: dict[str, float] | None
) -> dict[str, Any]:
    """`tiles` (value, label) and `parts` (name, seconds, share of the longest) of what is known."""
    parts, tiles = dict(cost or {}), []
    if cost:
        tiles.append((format_duration(sum(cost.values())), "for all steps of the round"))
    if training:
        train_seconds = training.train_seconds
        if metrics:  # of a run that was taken up again, training.json times the last part only
            train_seconds = max(train_seconds, sum(line["step_seconds"] for line in metrics))
        seconds = {"load": training.load_seconds, "train": train_seconds, "save": training.save_seconds}
        parts |= {f"training process: {part}": value for part, value in seconds.items()}
        tiles += _training_tiles(training, train_seconds, sum(seconds.values()) / 3600)
    longest = max(parts.values(), default=0) or 1
    return {"tiles": tiles, "parts": [(name, seconds, seconds / longest) for name, seconds in parts.items()]}


def _training_tiles(training: TrainingSummary, train_seconds: float, hours: float) -> list[tuple[str, str]]:
    processes = training.world_size
    unit = "CPU process-hours" if training.device == "cpu" else "GPU-hours"
    held = f"{unit}: {processes} {'process' if processes == 1 else 'processes'} for {format_duration(3600 * hours)}"
    throughput = training.tokens / train_seconds if train_seconds else None
    return [
        (format_duration(train_seconds), "training time"),
        (format_number(training.tokens), f"tokens in {format_number(training.steps)} steps"),
        (format_number(throughput), "tokens per second"),
        (f"{processes * hours:.3g}", held),
        (f"{training.peak_memory_bytes / 2**30:.2f} GiB", "peak memory of a process"),
    ]


def _curve(metrics: list[dict[str, Any]], field: str, title: str) -> Plot:
    """One curve from zero upwards."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with plot_style():
        figure, axes = _panel()
        _draw(axes, metrics, [line[field] for line in metrics])
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}" if value < 1 else f"{value:,.0f}"))
        axes.set_ylim(bottom=0)
        return to_svg(figure, field.replace("_", "-"), title)


def _loss_plot(metrics: list[dict[str, Any]]) -> Plot:
    losses = [line["loss"] for line in metrics]
    with plot_style():
        figure, axes = _panel()
        if len(metrics) > SMOOTHED_FROM:
            _draw(axes, metrics, losses, color="#a9c6e3")
            _draw(axes, metrics, _moving_average(losses), label="moving average")
        else:
            _draw(axes, metrics, losses)
        validated = [line for line in metrics if line.get("validation_loss") is not None]
        if validated:
            steps, heights = ([line[field] for line in validated] for field in ("step", "validation_loss"))
            axes.plot(steps, heights, color=WORSE, marker="D", markersize=3.5, linestyle="--", label="held-out data")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        _tokens_axis(axes, metrics)
        return to_svg(figure, "training-loss", "Loss (nats per loss token)")


def _drift_plots(metrics: list[dict[str, Any]]) -> list[Plot]:
    """What training predicted of its drift, and what it measured on the text that it distilled."""
    curves = {"predicted_drift": "predicted", "distillation_loss": "measured on self-written text"}
    found = {name: [line for line in metrics if line.get(name) is not None] for name in curves}
    if not any(found.values()):
        return []
    with plot_style():
        figure, axes = _panel()
        for (name, lines), color in zip(found.items(), (BETTER, WORSE), strict=True):
            if lines:
                _draw(axes, lines, [line[name] for line in lines], color=color, label=curves[name])
        axes.legend()
        axes.set_ylim(bottom=0)
        return [to_svg(figure, "training-drift", "Drift from the start (nats per token)")]


def _fitted_plot(fitted: FittedStep) -> Plot:
    """Gain against drift, from no update to the whole of it."""
    tried = sorted(fitted.tried, key=lambda one: one.scale)
    with plot_style():
        figure, axes = _panel("drift (nats per token)")
        drifts, gains = ([0.0, *(getattr(one, field) for one in tried)] for field in ("drift", "gain"))
        errors = [0.0, *(one.standard_error for one in tried)]
        axes.errorbar(drifts, gains, yerr=errors, color=BETTER, marker="o", markersize=3, linewidth=1.4)
        for one in tried:
            weight = "bold" if one.scale == fitted.scale else "normal"
            place = (one.drift, one.gain)
            axes.annotate(f"{one.scale:g}", place, xytext=(4, 4), textcoords="offset points", fontweight=weight)
        if fitted.max_drift < 2 * max(drifts):
            axes.axvline(fitted.max_drift, color=WORSE, linestyle="--", linewidth=1, label="bound")
            axes.legend()
        axes.axhline(0, color=EDGE, linewidth=0.8)
        return to_svg(figure, "fitted-step", "Gain against drift, by the part of the update (nats per token)")


def _gradient_plot(metrics: list[dict[str, Any]], clip: float) -> Plot:
    norms = [line["grad_norm"] for line in metrics]
    with plot_style():
        figure, axes = _panel()
        _draw(axes, metrics, norms)
        if clip:
            axes.axhline(clip, color=WORSE, linestyle="--", linewidth=1, label=f"clipped to {clip:g}")
            axes.legend()
        if all(norm > 0 for norm in norms):
            log_scale(axes)
        return to_svg(figure, "gradient-norm", "Gradient norm (before clipping)")


def _panel(label: str = "step") -> tuple[Any, "Axes"]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=PANEL, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=label == "step"))
    return figure, axes


def _draw(
    axes: "Axes", metrics: list[dict[str, Any]], values: Sequence[float], *, color: str = BETTER, label: str = ""
) -> None:
    shown = thinned(len(metrics))
    marker = "o" if len(metrics) <= SMOOTHED_FROM else ""
    steps, heights = [metrics[i]["step"] for i in shown], [values[i] for i in shown]
    axes.plot(steps, heights, color=color, marker=marker, markersize=3, linewidth=1.4, label=label or None)


def _moving_average(values: Sequence[float], weight: float = 0.1) -> list[float]:
    """Exponential moving average."""
    averages = [values[0]]
    for value in values[1:]:
        averages.append((1 - weight) * averages[-1] + weight * value)
    return averages


def _tokens_axis(axes: "Axes", metrics: list[dict[str, Any]], ticks: int = 4) -> None:
    """A second axis on top: the tokens processed up to a step."""
    last = len(metrics) - 1
    marked = [metrics[i] for i in sorted({round(last * i / (ticks - 1)) for i in range(ticks)})]
    top = axes.secondary_xaxis("top")
    top.set_xticks([line["step"] for line in marked], [f"{line['tokens']:,}" for line in marked])
    top.spines["top"].set_visible(True)
    top.set_xlabel("tokens", fontsize=7.5)
    top.tick_params(labelsize=7.5)
