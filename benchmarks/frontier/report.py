"""The frontier as JSON, as tables in Markdown and as a picture, from the runs that are finished."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.frontier.bench import SCREENED_BLOCKS
from benchmarks.frontier.curves import TARGET, Curve, best_gain, mean_and_error, read_off
from benchmarks.frontier.materials import BLOCK_TOKENS, HELD_OUT_BLOCKS, OTHERS, REVIEWS_PER_STEP
from benchmarks.frontier.methods import Method
from benchmarks.frontier.plan import BEST, EXPERIMENTS, LIMITS, PICTURED, Experiment
from benchmarks.frontier.runs import Run
from benchmarks.frontier.summary import EARLIER, FULL, Results, curves_by_method, forgetting, summarize
from osft.evaluation.report.svg import LINES, log_scale, plot_style
from osft.storage.atomic import atomic_path

Row = list[str]


def write_report(
    found: Mapping[str, Results], missing: Mapping[str, Sequence[Run]], folder: Path, identity: str
) -> None:
    """Write `frontier_DEVICE.json`, `.md` and `.svg`, of the device that runs were made on: a GPU, if any was.

    found, missing: by the experiment's name, its finished runs and those that are still to do; identity: of what they
    read. The JSON has all that was measured, a line a run, for `published_runs`.
    """
    found = {experiment: results for experiment, results in found.items() if results}
    if not found:
        return
    summaries = {experiment: summarize(results) for experiment, results in found.items()}
    sequences = {experiment: forgetting(results) for experiment, results in found.items()}
    machines = [result["machine"] for results in found.values() for result in results.values()]
    name = f"frontier_{'cuda' if any(machine['gpu'] for machine in machines) else 'cpu'}"
    about = {
        "date": date.today().isoformat(),
        "identity": identity,
        "summaries": summaries,
        "sequences": sequences,
        "missing": {experiment: [str(run) for run in runs] for experiment, runs in missing.items()},
    }
    by_name = {result["name"]: result for results in found.values() for result in results.values()}
    lines = [json.dumps(_rounded(result)) for _, result in sorted(by_name.items())]
    with atomic_path(folder / f"{name}.json") as temporary:
        head = json.dumps(_rounded(about), indent=1).removesuffix("\n}")
        temporary.write_text(f'{head},\n "runs": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
    plot(found, folder / f"{name}.svg")
    lines = [
        "# The frontier: what is learned, and how far the model drifts for it",
        "",
        "Written by `python -m benchmarks.frontier`.",
        "",
        f"![Drift against learning]({name}.svg)",
        "",
    ]
    for experiment, results in found.items():
        plan = EXPERIMENTS[experiment]
        lines += [f"## {plan.title}", "", *_setting(plan, results), ""]
        ranked = sorted(summaries[experiment], key=lambda summary: summary["drift"][OTHERS[0]][0] or inf)
        texts = [*OTHERS, *([EARLIER] if len(plan.tasks) > 1 else [])]
        lines += _table(_summary_columns(texts), [_summary_row(summary, texts) for summary in ranked])
        lines += _against_others(summaries[experiment], texts)
        if len(plan.tasks) > 1 or "reviews" in plan.tasks:
            lines += _table(_sequence_columns(plan), [_sequence_row(record, plan) for record in sequences[experiment]])
        lines += _missing(missing.get(experiment, ()))
    lines += ["## How it was measured", "", *[f"- {note}" for note in _notes(machines)], ""]
    with atomic_path(folder / f"{name}.md") as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def published_runs(folder: Path, identity: str) -> dict[Run, dict[str, Any]]:
    """The results that reports in a folder have of runs that read the same: nobody need make them again."""
    found = {}
    for file in folder.glob("frontier_*.json"):
        published = json.loads(file.read_text(encoding="utf-8"))
        for result in published["runs"] if published["identity"] == identity else ():
            described = result["run"]
            method = Method(**described["method"])
            found[Run(**described | {"tasks": tuple(described["tasks"]), "method": method})] = result
    return found


def _rounded(value: Any) -> Any:
    """Numbers to six digits, which is more than any of them is worth."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def _missing(runs: Sequence[Run]) -> list[str]:
    """What is not run yet, a line for each method."""
    if not runs:
        return []
    rates: dict[str, dict[int, list[str]]] = {}
    for run in runs:
        rates.setdefault(str(run.method), {}).setdefault(run.seed, []).append(f"{run.learning_rate:g}")
    lines = [
        f"- {method}: " + "; ".join(f"seed {seed}: {', '.join(missing)}" for seed, missing in by_seed.items())
        for method, by_seed in rates.items()
    ]
    return [f"Not run yet, {len(runs)} runs, the learning rates by seed:", "", *lines, ""]


# ---- tables ----


def _summary_columns(texts: Sequence[str]) -> list[str]:
    drifts = [column for text in texts for column in (f"KL {text}", "of full's")]
    return ["method", "best gain", *drifts, "best rate", "rates tried", "seeds"]


def _table(header: Sequence[str], rows: Sequence[Row]) -> list[str]:
    lines = [list(header), ["---"] * len(header), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _number(value: Sequence[float | None], digits: int = 5) -> str:
    """A figure with its standard error."""
    mean, error = value
    if mean is None:
        return "–"
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def _summary_row(summary: dict[str, Any], texts: Sequence[str]) -> Row:
    edge = " (an edge)" if summary["at_edge"] else ""
    best = ", ".join(f"{rate:g}" for rate in dict.fromkeys(summary["best"]))
    cells = [summary["method"], f"{summary['gain']:.3f}" if summary["gain"] is not None else "–"]
    for text in texts:
        cells += [_number(summary["drift"][text]), _number(summary["relative"][str(FULL)][text], 3)]
    rates = ", ".join(f"{rate:g}" for rate in summary["rates"])
    return [*cells, f"{best}{edge}" if best else "not reached", rates, str(len(summary["seeds"]))]


def _against_others(summaries: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[str]:
    """The default's drift relative to that of the others, and the limits that it was to keep."""
    best = next((summary for summary in summaries if summary["method"] == str(BEST)), None)
    if best is None:
        return []
    rows = []
    for other, ratios in best["relative"].items():
        row = [other]
        for text in texts:
            limit = LIMITS.get((other, text)) if EARLIER in texts else None
            ratio = ratios[text][0]
            said = f"; limit {limit}, {'kept' if ratio <= limit else 'NOT kept'}" if limit and ratio is not None else ""
            row.append(_number(ratios[text], 3) + said)
        if other != str(BEST) and any(cell != "–" for cell in row[1:]):
            rows.append(row)
    heading = f"The KL of the default, {BEST}, relative to that of each other method, at equal learning:"
    return [heading, "", *_table(["relative to", *(f"KL {text}" for text in texts)], rows)]


def _sequence_columns(plan: Experiment) -> list[str]:
    columns = ["method", "rate", "seed", *(f"{task}: learned, at the end" for task in plan.tasks)]
    if len(plan.tasks) > 1:
        columns += ["earlier tasks' loss, rise", "KL, earlier tasks"]
    for text in OTHERS:
        columns += [f"KL {text}", f"{text}'s loss, rise"]
    return columns


def _sequence_row(record: dict[str, Any], plan: Experiment) -> Row:
    cells = [record["method"], f"{record['learning_rate']:g}", str(record["seed"])]
    for task, learned, kept in zip(plan.tasks, record["learned"], record["kept"], strict=True):
        right = record["right"].get(task)
        cells.append(
            f"{learned[0]:.3f}"
            + (f", {kept[0]:.3f}" if len(plan.tasks) > 1 else "")
            + (f", right {100 * right[0]:.0f} -> {100 * right[1]:.0f} %" if right else "")
        )
    if len(plan.tasks) > 1:
        cells += [_signed(record["lost"]), _number(record["moved"])]
    for text in OTHERS:
        cells += [_number(record["drift"][text]), _signed(record["rise"][text])]
    return cells


def _signed(value: Sequence[float]) -> str:
    return f"{value[0]:+.3f} ± {value[1]:.3f}"


def _setting(plan: Experiment, results: Results) -> list[str]:
    base = next(iter(results.values()))["base"]
    losses = ", ".join(f"{text} {mean_and_error(measured['loss'])[0]:.3f}" for text, measured in base.items())
    model = "the whole model" if plan.scope == "whole" else f"the last {SCREENED_BLOCKS} of 30 blocks"
    samples = f"{REVIEWS_PER_STEP} chats" if plan.tasks == ("reviews",) else f"a block of {BLOCK_TOKENS} tokens"
    return [
        f"Trained: {model}; {', then '.join(plan.tasks)}; {plan.steps} steps of {samples} for each task. "
        f"Loss of the healed base in nats per token: {losses}."
    ]


def _notes(machines: Sequence[dict[str, Any]]) -> list[str]:
    described = Counter(
        f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, {machine['threads']} threads a run; "
        f"torch {machine['torch']}, transformers {machine['transformers']}, peft {machine['peft']}"
        for machine in machines
    )
    return [
        *(f"{count} runs on {machine}" for machine, count in described.most_common()),
        "base model: SmolLM2-135M-Instruct, dequantised Q4_1, healed by 29 steps of 1,024 tokens of web text (full "
        "fine-tuning at 1e-4), float32; otherwise any training would first repair what the quantization broke",
        "every method: the same blocks in the same order, AdamW (0.9, 0.95), cosine schedule, gradients clipped to 1, "
        "float32; other seeds take other blocks",
        "tasks: manual pages of Debian's manpages-de, manpages-fr and manpages-pl; film reviews are chats whose answer "
        "is a word",
        f"held out: {HELD_OUT_BLOCKS} blocks of {BLOCK_TOKENS} tokens of each text, of other pages than the trained "
        "ones; web text and Python's standard library are never trained on, and other web text healed the model",
        "gain: fall of the held-out loss, nats per token, in a sequence the mean over all tasks at the end; KL: from "
        "the base to the tuned model in nats per token",
        f"KL is read off where the method has {100 * TARGET:.0f} % of the best gain of full fine-tuning, between the "
        "points of its runs (the update scaled by 0.25 to 1; the root of KL is interpolated), at its best rate",
        "±: standard errors over the held-out blocks (jackknife, the ratios' too)",
        "with the last blocks only, the others' output is computed once, and the softmax is over the tokens that occur",
    ]


# ---- picture ----

PICTURED_GAINS = 25
"""Points of a line."""


def plot(found: Mapping[str, Results], file: Path) -> None:
    """Drift on web text against what was learned: a line for each method, at its best rate for each gain."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    curves = {experiment: curves_by_method(results) for experiment, results in found.items()}
    compared = {experiment: by_method for experiment, by_method in curves.items() if len(by_method) > 1}
    drawn = compared or curves
    methods = [method for method in PICTURED if any(method in curves for curves in drawn.values())]
    styles: dict[Method, Any] = {method: LINES[place % len(LINES)] for place, method in enumerate(methods)}
    markers = {method: ("", "o")[place // len(LINES)] for place, method in enumerate(methods)}
    with plot_style():
        figure = Figure(figsize=(max(6.0, 4.4 * len(drawn)), 4.6), layout="constrained")
        panels = figure.subplots(1, len(drawn), squeeze=False)[0]
        for axes, (experiment, by_method) in zip(panels, drawn.items(), strict=True):
            for method in methods:
                if method in by_method:
                    color, line = styles[method]
                    gains, drifts = envelope(by_method[method])
                    axes.plot(gains, drifts, color=color, linestyle=line, marker=markers[method], markersize=3)
            log_scale(axes)
            axes.set_title(EXPERIMENTS[experiment].title, fontsize=9)
            axes.set_xlabel("learned: fall of the loss, nats per token")
        panels[0].set_ylabel("drift on web text: KL, nats per token")
        handles = [
            Line2D([], [], color=color, linestyle=line, marker=markers[method], markersize=3, label=str(method))
            for method, (color, line) in styles.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        with atomic_path(file) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def envelope(curves: Sequence[Curve]) -> tuple[list[float], list[float]]:
    """Gains, and the least drift on web text with which each is reached, the mean over the seeds that all reach it."""
    seeds = {curve.seed for curve in curves}
    gains, drifts = [], []
    best = best_gain(curves)
    for gain in np.linspace(0.2 * best, best, PICTURED_GAINS):
        read = [read_off([curve for curve in curves if curve.seed == seed], gain, OTHERS[0]) for seed in seeds]
        known = [reading.drift for reading in read if reading is not None]
        if len(known) == len(seeds):
            gains.append(float(gain))
            drifts.append(float(np.mean(known)))
    return gains, drifts
