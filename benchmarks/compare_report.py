"""What `benchmarks.compare` found: numbers from the runs' rounds, as JSON, Markdown and a figure."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import sqrt
from operator import ge, lt
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.sequence import METHODS, Settings
from osft.atomic import atomic_path, write_json
from osft.evaluation import matrix

MEASURES: dict[str, tuple[str, Callable[[list[list[Any]]], float | None]]] = {
    "learning": ("learning accuracy", matrix.learning_accuracy),
    "average": ("average accuracy", matrix.average_accuracy),
    "transfer": ("backward transfer", matrix.backward_transfer),
    "forgetting": ("forgetting", matrix.average_forgetting),
}
Summary = dict[str, Any]


def summarize(run: dict[str, Any], tasks: Sequence[str], base: dict[str, Any]) -> Summary:
    """The numbers of one run: of accuracies (0 to 1) and of losses (negated, in nats per answer token).

    `matrix[i][j]` is the score after round i on task j, for j <= i. `errors` are standard errors of the accuracy's
    measures, from the number of held-out records, taking two models' errors on the same records as independent.
    """
    rounds = run["rounds"]
    scores = [[after["report"][task] for task in tasks[: index + 1]] for index, after in enumerate(rounds)]
    summary: Summary = {key: run[key] for key in ("method", "learning_rate", "seed")}
    for kind, sign in (("accuracy", 1), ("loss", -1)):
        values = [[sign * score[kind] for score in row] for row in scores]
        summary[kind] = {"matrix": values} | {name: measure(values) for name, (_, measure) in MEASURES.items()}
    variances = [[score["accuracy_stderr"] ** 2 for score in row] for row in scores]
    diagonal = [variances[task][task] for task in range(len(tasks))]
    changed = sqrt(sum(diagonal[:-1]) + sum(variances[-1][:-1])) / max(1, len(tasks) - 1)
    summary["errors"] = {
        "learning": sqrt(sum(diagonal)) / len(tasks),
        "average": sqrt(sum(variances[-1])) / len(tasks),
        "transfer": changed,
        "forgetting": changed,
    }
    anchors = [-after["anchor"]["loss"] for after in rounds]
    selection = rounds[-1]["selection"]
    return summary | {
        "selection_loss": mean(selection[task]["loss"] for task in tasks),
        "selection_accuracy": mean(selection[task]["accuracy"] for task in tasks),
        "anchor": anchors,
        "anchor_drift": matrix.anchor_drift(anchors, -base["anchor"]["loss"]),
        "trainable_parameters": rounds[0]["trainable_parameters"],
        "step_seconds": mean(after["step_seconds"] for after in rounds),
        "load_seconds": mean(after["load_seconds"] for after in rounds),
        "peak_bytes": max(after["peak_bytes"] for after in rounds),
    }


def _of(summaries: Sequence[Summary], method: str, rate: float) -> list[Summary]:
    return [summary for summary in summaries if (summary["method"], summary["learning_rate"]) == (method, rate)]


def choose_rates(summaries: Sequence[Summary]) -> dict[str, float]:
    """Each method's rate with the lowest loss on the selection records, the mean over all tasks and seeds."""
    chosen: dict[str, float] = {}
    for method in dict.fromkeys(summary["method"] for summary in summaries):
        rates = dict.fromkeys(s["learning_rate"] for s in summaries if s["method"] == method)
        chosen[method] = min(rates, key=lambda rate: mean(s["selection_loss"] for s in _of(summaries, method, rate)))
    return chosen


def average_seeds(summaries: Sequence[Summary], method: str, rate: float) -> Summary:
    """The mean of a method's runs at one rate. The errors are those of one run: seeds share the held-out records."""
    runs = _of(summaries, method, rate)
    averaged: Summary = {"method": method, "learning_rate": rate, "seeds": len(runs)}
    for kind in ("accuracy", "loss"):
        averaged[kind] = {name: mean(run[kind][name] for run in runs) for name in MEASURES}
    averaged["errors"] = {name: sqrt(mean(run["errors"][name] ** 2 for run in runs)) for name in MEASURES}
    plain = ("selection_loss", "selection_accuracy", "anchor_drift", "step_seconds", "load_seconds", "peak_bytes")
    averaged |= {name: mean(run[name] for run in runs) for name in plain}
    return averaged | {"trainable_parameters": runs[0]["trainable_parameters"]}


def compare_with_ours(best: dict[str, Summary]) -> list[str]:
    """A sentence for each other method: what OSFT learned and forgot beside it, each at its chosen rate."""
    ours = best.get("osft")
    if ours is None:
        return []
    sentences = []
    for method, theirs in best.items():
        if theirs is ours:
            continue
        parts = []
        for name, unit in (("learning", "learning accuracy"), ("forgetting", "forgetting")):
            difference = ours["accuracy"][name] - theirs["accuracy"][name]
            error = sqrt(ours["errors"][name] ** 2 + theirs["errors"][name] ** 2)
            parts.append(
                f"{unit} {_points(ours['accuracy'][name])} against {_points(theirs['accuracy'][name])} points "
                f"({100 * difference:+.1f} ± {100 * error:.1f})"
            )
        sentences.append(
            f"OSFT beside {METHODS[method]}: {parts[0]}, {parts[1]}; loss right after learning "
            f"{-ours['loss']['learning']:.3f} against {-theirs['loss']['learning']:.3f} nats, its rise until the end "
            f"{ours['loss']['forgetting']:+.3f} against {theirs['loss']['forgetting']:+.3f}; the anchor's loss changed "
            f"by {-ours['anchor_drift']:+.3f} against {-theirs['anchor_drift']:+.3f} nats."
        )
    return sentences


def beyond_guessing(result: dict[str, Any], summaries: Sequence[Summary], chosen: dict[str, float]) -> str:
    """Which tasks each method learned at its chosen rate: by more than a standard error above the most frequent
    answer, right after learning, with every seed. What was not learned cannot be forgotten."""
    found = []
    for method, rate in chosen.items():
        learned = []
        for index, task in enumerate(result["tasks"]):
            share = result["most_frequent_answer"][task]
            error = sqrt(share * (1 - share) / result["base"]["report"][task]["num_samples"])
            scores = [summary["accuracy"]["matrix"][index][index] for summary in _of(summaries, method, rate)]
            if min(scores) > share + error:
                learned.append(task)
        found.append(f"{METHODS[method]}: {', '.join(learned) or 'none'}")
    return (
        "Tasks that were learned, by more than a standard error above always giving the most frequent answer: "
        f"{'; '.join(found)}. On the others only the form of the answer was learned, and nothing else can be forgotten."
    )


def judge(best: dict[str, Summary]) -> dict[str, dict[str, Any]]:
    """What is expected of OSFT beside full fine-tuning: the difference in points, and whether it is as expected."""
    if not {"osft", "full"} <= set(best):
        return {}
    expected = {
        "OSFT forgets less than full fine-tuning": ("forgetting", lt),
        "OSFT learns no less than full fine-tuning": ("learning", ge),
    }
    ours, full = best["osft"], best["full"]
    return {
        sentence: {
            "difference": 100 * (ours["accuracy"][name] - full["accuracy"][name]),
            "standard_error": 100 * sqrt(ours["errors"][name] ** 2 + full["errors"][name] ** 2),
            "met": holds(ours["accuracy"][name], full["accuracy"][name]),
        }
        for sentence, (name, holds) in expected.items()
    }


def _verdict(sentence: str, found: dict[str, Any]) -> str:
    unclear = abs(found["difference"]) <= found["standard_error"]
    return (
        f"{sentence}: {found['difference']:+.1f} ± {found['standard_error']:.1f} points, "
        f"{'met' if found['met'] else 'NOT met'}{', within the standard error' if unclear else ''}"
    )


# ---- writing ----


def write_report(result: dict[str, Any], folder: Path) -> None:
    """Add the summaries to `result` and write it as `compare_DEVICE.json`, `.md` and `.svg`."""
    tasks, base = result["tasks"], result["base"]
    summaries = [summarize(run, tasks, base) for run in result["runs"]]
    chosen = choose_rates(summaries)
    best = {method: average_seeds(summaries, method, rate) for method, rate in chosen.items()}
    expected = judge(best)
    result |= {"summaries": summaries, "chosen_rates": chosen, "expected": expected}
    name = f"compare_{result['settings']['device']}"
    write_json(folder / f"{name}.json", result)
    plot(summaries, chosen, folder / f"{name}.svg")
    lines = [
        "# A sequence of tasks: what is learned, what is forgotten",
        "",
        "Written by `python -m benchmarks.compare`. Each method at its best learning rate:",
        "",
        *_table(BEST_COLUMNS, [_best_row(summary) for summary in best.values()]),
        f"![Forgetting against learning]({name}.svg)",
        "",
        *[f"- {sentence}" for sentence in compare_with_ours(best)],
        f"- {beyond_guessing(result, summaries, chosen)}",
        "",
        *(["Expected:", "", *[f"- {_verdict(*item)}" for item in expected.items()], ""] if expected else []),
        "How it was measured:",
        "",
        *[f"- {note}" for note in _notes(result)],
        "",
        "## After each task",
        "",
        "Accuracy on the held-out records of each task in %, and the loss of the answers in nats per token.",
        "",
        *_table(["model", *tasks, "anchor loss"], _matrix_rows(result, summaries, chosen)),
        "## Every run",
        "",
        "Bold: the chosen rate.",
        "",
        *_table(RUN_COLUMNS, [_run_row(summary, chosen) for summary in summaries]),
    ]
    with atomic_path(folder / f"{name}.md") as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


BEST_COLUMNS = (
    "method", "rate", "learning accuracy", "average accuracy", "backward transfer", "forgetting",
    "loss after learning", "rise of the loss", "anchor's loss", "trained", "peak MiB",
)  # fmt: skip
RUN_COLUMNS = (
    "method", "rate", "seed", "selection loss", "selection accuracy", "learning accuracy", "average accuracy",
    "backward transfer", "forgetting", "loss after learning", "rise of the loss", "anchor's loss", "s/step",
)  # fmt: skip


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _measure_cells(summary: Summary) -> list[str]:
    """Accuracy's measures with their errors, in points, then those of the loss and the anchor, in nats."""
    accuracy, loss = summary["accuracy"], summary["loss"]
    cells = [f"{_points(accuracy[name])} ± {_points(summary['errors'][name])}" for name in MEASURES]
    return [*cells, f"{-loss['learning']:.3f}", f"{loss['forgetting']:+.3f}", f"{-summary['anchor_drift']:+.3f}"]


def _best_row(summary: Summary) -> list[str]:
    return [
        METHODS[summary["method"]],
        f"{summary['learning_rate']:g}",
        *_measure_cells(summary),
        f"{summary['trainable_parameters'] / 1e6:.1f}M",
        f"{summary['peak_bytes'] / 2**20:.0f}",
    ]


def _run_row(summary: Summary, chosen: dict[str, float]) -> list[str]:
    rate = f"{summary['learning_rate']:g}"
    return [
        METHODS[summary["method"]],
        f"**{rate}**" if summary["learning_rate"] == chosen[summary["method"]] else rate,
        str(summary["seed"]),
        f"{summary['selection_loss']:.3f}",
        _points(summary["selection_accuracy"]),
        *_measure_cells(summary),
        f"{summary['step_seconds']:.2f}",
    ]


def _matrix_rows(result: dict[str, Any], summaries: Sequence[Summary], chosen: dict[str, float]) -> list[list[str]]:
    tasks = result["tasks"]
    scores = [result["base"]["report"][task] for task in tasks]
    cells = [f"{_points(score['accuracy'])} ({score['loss']:.3f})" for score in scores]
    shares = [_points(result["most_frequent_answer"][task]) for task in tasks]
    rows = [["always the most frequent answer", *shares, "–"]]
    rows += [["base model", *cells, f"{result['base']['anchor']['loss']:.3f}"]]
    for summary in summaries:
        if summary["learning_rate"] != chosen[summary["method"]]:
            continue
        for index, task in enumerate(tasks):
            both = zip(summary["accuracy"]["matrix"][index], summary["loss"]["matrix"][index], strict=True)
            cells = [f"{_points(accuracy)} ({-loss:.3f})" for accuracy, loss in both]
            title = f"{METHODS[summary['method']]}, seed {summary['seed']}, after {task}"
            cells += ["–"] * (len(tasks) - len(cells))
            rows.append([title, *cells, f"{-summary['anchor'][index]:.3f}"])
    return rows


def _notes(result: dict[str, Any]) -> list[str]:
    machine, settings = result["machine"], result["settings"]
    defaults = asdict(Settings()) | {"tasks": list(Settings().tasks), "content": settings["content"]}
    changed = [
        f"{name} {', '.join(value) if isinstance(value, list) else value}"
        for name, value in settings.items()
        if value != defaults[name]
    ]
    seconds = sum(r["train_seconds"] + r["load_seconds"] for run in result["runs"] for r in run["rounds"])
    return [
        f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; torch "
        f"{machine['torch']}, transformers {machine['transformers']}, peft {machine['peft']}; {result['date']}",
        f"other settings than the defaults: {'; '.join(changed) or 'none'}",
        f"{settings['model']}; {settings['train_samples']} training samples of each task in steps of "
        f"{settings['batch_size']}, AdamW, cosine schedule after {settings['warmup_steps']} steps of warm-up, no "
        f"weight decay; float32, checkpoints in {settings['checkpoint_dtype']}",
        f"OSFT with unfrozen share {settings['unfreeze_rank_ratio']}, split anew before each task; LoRA of rank "
        f"{settings['lora_rank']} and alpha {settings['lora_alpha']} on the same weights, merged after each task",
        "rates: of those in the last table the one with the lowest loss over all tasks at the end, on "
        f"{settings['selection_samples']} held-out records of each task; all else is measured on "
        f"{settings['report_samples']} others of each task",
        "learning accuracy: mean accuracy on each task right after it was learned; average accuracy: on all tasks at "
        "the end; backward transfer: mean change since a task was learned; forgetting: mean distance from the best "
        "model since then (osft/evaluation/matrix.py); all in points",
        "±: the standard error that the number of records gives, two models taken as independent, which is too much "
        "where they err on the same records",
        "loss: nats per token of the right answers; its rise is the forgetting of the negated loss; anchor's loss: the "
        f"change from base model to end on {settings['anchor_samples']} passages of {settings['anchor']}",
        f"memory: of training, above the process before the model was loaded; loading, splitting and training took "
        f"{seconds / 60:.0f} minutes in all, and the seconds of a step are an indication only, of a machine that "
        "does other work, too",
    ]


def plot(summaries: Sequence[Summary], chosen: dict[str, float], file: Path) -> None:
    """Forgetting against learning, of accuracy and of loss: a mark a run, with its rate, filled at the chosen one."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = (
        ("accuracy", 100, 100, "learning accuracy, points (right is better)", "forgetting, points (down is better)"),
        ("loss", -1, 1, "loss after learning, nats (right is better)", "its rise until the end, nats (down is better)"),
    )
    colors = dict(zip(METHODS, ("#1f77b4", "#d62728", "#2ca02c"), strict=True))
    with matplotlib.rc_context({"svg.hashsalt": "osft", "font.size": 9}):
        figure = Figure(figsize=(9.0, 4.2), layout="constrained")
        for axes, (kind, learning_scale, scale, learned, forgotten) in zip(figure.subplots(1, 2), panels, strict=True):
            axes.axhline(0, color="#999999", linewidth=0.8)
            for summary in summaries:
                method, rate = summary["method"], summary["learning_rate"]
                x, y = learning_scale * summary[kind]["learning"], scale * summary[kind]["forgetting"]
                best, color = rate == chosen[method], colors[method]
                if kind == "accuracy":
                    errors = [scale * summary["errors"][name] for name in ("learning", "forgetting")]
                    axes.errorbar(x, y, xerr=errors[0], yerr=errors[1], color=color, alpha=0.3, linewidth=1)
                axes.plot(x, y, "o", color=color, markerfacecolor=color if best else "white")
                axes.annotate(f"{rate:g}", (x, y), xytext=(4, 4), textcoords="offset points", size=8, color=color)
            axes.set_xlabel(learned)
            axes.set_ylabel(forgotten)
            axes.margins(0.15)
            if learning_scale < 0:
                axes.invert_xaxis()
        handles = [
            Line2D([], [], marker="o", linestyle="", color=colors[method], label=METHODS[method]) for method in chosen
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
        with atomic_path(file) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
