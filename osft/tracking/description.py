"""What a model version says of itself on its page in MLflow: Markdown for whoever chooses a model."""

from collections.abc import Mapping
from typing import Any

from osft.evaluation.gate import KL

_MAX_LENGTH = 5000  # MLflow's column for it
_ROLES = ("new task", "earlier task", "anchor")


def describe_version(evaluation: Mapping[str, Any], *, parent_version: int | None) -> str:
    """What the model learned, from which one, its scores before and after, and the decision; at most 5000 characters.

    `evaluation` is the content of `evaluation.json`; `parent_version` is None if the round started from the base model.
    What it lacks (a matrix, benchmarks, a decision) is left out. Where rows do not fit, the last ones are, and counted.
    """
    base = evaluation["models"]["base"]["path"]
    start = f"version {parent_version}, which comes from" if parent_version is not None else "the base model"
    head = [
        f"**Learned {_text(evaluation['task'])}** by Orthogonal Subspace Fine-Tuning of {start} `{_name(base)}`.",
        *_decision(evaluation.get("decision")),
        *_matrix(evaluation.get("matrix")),
    ]
    rows = [*_set_rows(evaluation), *_benchmark_rows(evaluation)]
    before = evaluation["reference"]
    table = [f"| measured on | metric | {before} | this version | change |", "|---|---|---|---|---|"]
    shown = len(rows)
    while True:
        left_out = [f"{len(rows) - shown} more rows are in report.html of the round."] if shown < len(rows) else []
        text = "\n\n".join([*head, "\n".join([*table, *rows[:shown]]), *left_out])
        if len(text) <= _MAX_LENGTH or not shown:
            return text[:_MAX_LENGTH]
        shown -= 1


def _decision(decision: Mapping[str, Any] | None) -> list[str]:
    if decision is None:
        return []
    if decision["promote"]:
        return [f"**Passed the gate**: {len(decision['rules'])} of {len(decision['rules'])} rules."]
    failed = [rule for rule in decision["rules"] if not rule["passed"]]
    reasons = [
        f"- {rule['rule']} on {_text(rule['subject'])}: {rule['metric']} {_number(rule['before'])} → "
        f"{_number(rule['after'])}, {rule['comparison']} {_bound(rule)} wanted"
        for rule in failed[:10]
    ]
    return ["\n".join([f"**Refused by the gate**: {_text(decision['reason'])[:1000]}", "", *reasons]).rstrip()]


def _matrix(matrix: Mapping[str, Any] | None) -> list[str]:
    """The summary of all rounds so far, by accuracy where it was measured."""
    if matrix is None or len(matrix["rounds"]) < 2:
        return []
    metric = "accuracy" if "accuracy" in matrix["metrics"] else "loss"
    block = matrix["metrics"][metric]
    names = {"backward_transfer": "backward transfer", "average_forgetting": "average forgetting"}
    measured = [f"{shown} {block[name]:+.4f}" for name, shown in names.items() if block.get(name) is not None]
    if not measured:
        return []
    return [f"After {len(matrix['rounds'])} rounds, by {metric}: {', '.join(measured)}."]


def _set_rows(evaluation: Mapping[str, Any]) -> list[str]:
    """A row for each set and metric, the new task first."""
    before = evaluation["results"][evaluation["reference"]]
    after = evaluation["results"]["candidate"]
    scored = [(name, described) for name, described in evaluation["sets"].items() if name in after]
    sets = sorted(scored, key=lambda item: _ROLES.index(item[1]["role"]))
    changes = evaluation["changes"][evaluation["reference"]]
    return [
        f"| {_text(name)} ({described['role']}) | {metric} | {_number(before[name][metric])} | "
        f"{_number(after[name][metric])} | {_change(changes[name][metric])} |"
        for name, described in sets
        for metric in ("loss", "accuracy")
        if after[name].get(metric) is not None and changes[name].get(metric) is not None
    ]


def _benchmark_rows(evaluation: Mapping[str, Any]) -> list[str]:
    benchmarks = evaluation.get("benchmarks")
    if benchmarks is None:
        return []
    before, after = benchmarks["results"][evaluation["reference"]], benchmarks["results"]["candidate"]
    return [
        f"| {_text(name)} (benchmark) | {task['metric']} | {_number(before[name]['value'])} | "
        f"{_number(after[name]['value'])} | {after[name]['value'] - before[name]['value']:+.4f} |"
        for name, task in benchmarks["tasks"].items()
    ]


def _change(change: Mapping[str, Any]) -> str:
    relative = change.get("relative")
    share = "" if relative is None else f" ({relative:+.1%})"
    return f"{change['change']:+.4f}{share}"


def _bound(rule: Mapping[str, Any]) -> str:
    if rule["metric"] == KL:
        return f"{rule['bound']:g} nats per token"
    kind = "gained" if rule["rule"] == "min_gain" else "lost"
    return f"{rule['bound']:.1%} {kind}" if rule["relative"] else f"{rule['bound']:g} {kind}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _name(path: str) -> str:
    """The last part of a path or URI (who reads the page does not know the volume), or a Hugging Face id as it is."""
    return path.rstrip("/").rpartition("/")[2] if path.startswith("/") or "://" in path else path


def _text(text: str) -> str:
    """A name or a reason as one line that ends no cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
