"""What a model version says of itself on its page in MLflow: Markdown for whoever chooses a model."""

from osft.evaluation.gate import KL
from osft.evaluation.record import ContinualMatrix, Decision, Evaluation, MetricChange, RuleOutcome

_MAX_LENGTH = 5000  # MLflow's column for it
_ROLES = ("new task", "earlier task", "anchor")


def describe_version(evaluation: Evaluation, *, parent_version: int | None) -> str:
    """What the model learned, from which one, its scores before and after, and the decision; at most 5000 characters.

    `parent_version` is None if the round started from the base model. What the evaluation lacks (a matrix, benchmarks,
    a decision) is left out. Where rows do not fit, the last ones are, and counted.
    """
    base = evaluation.models["base"].path
    start = f"version {parent_version}, which comes from" if parent_version is not None else "the base model"
    head = [
        f"**Learned {_text(evaluation.task)}** by Orthogonal Subspace Fine-Tuning of {start} `{_name(base)}`.",
        *_decision(evaluation.decision),
        *_matrix(evaluation.matrix),
    ]
    rows = [*_set_rows(evaluation), *_benchmark_rows(evaluation)]
    before = evaluation.reference
    table = [f"| measured on | metric | {before} | this version | change |", "|---|---|---|---|---|"]
    shown = len(rows)
    while True:
        left_out = [f"{len(rows) - shown} more rows are in report.html of the round."] if shown < len(rows) else []
        text = "\n\n".join([*head, "\n".join([*table, *rows[:shown]]), *left_out])
        if len(text) <= _MAX_LENGTH or not shown:
            return text[:_MAX_LENGTH]
        shown -= 1


def _decision(decision: Decision | None) -> list[str]:
    if decision is None:
        return []
    if decision.promote:
        return [f"**Passed the gate**: {len(decision.rules)} of {len(decision.rules)} rules."]
    failed = [rule for rule in decision.rules if not rule.passed]
    reasons = [
        f"- {rule.rule} on {_text(rule.subject)}: {rule.metric} {_number(rule.before)} → "
        f"{_number(rule.after)}, {rule.comparison} {_bound(rule)} wanted"
        for rule in failed[:10]
    ]
    return ["\n".join([f"**Refused by the gate**: {_text(decision.reason)[:1000]}", "", *reasons]).rstrip()]


def _matrix(matrix: ContinualMatrix | None) -> list[str]:
    """The summary of all rounds so far, by accuracy where it was measured."""
    if matrix is None or len(matrix.rounds) < 2:
        return []
    metric = "accuracy" if "accuracy" in matrix.metrics else "loss"
    block = matrix.metrics[metric]
    numbers = {"backward transfer": block.backward_transfer, "average forgetting": block.average_forgetting}
    measured = [f"{name} {value:+.4f}" for name, value in numbers.items() if value is not None]
    if not measured:
        return []
    return [f"After {len(matrix.rounds)} rounds, by {metric}: {', '.join(measured)}."]


def _set_rows(evaluation: Evaluation) -> list[str]:
    """A row for each set and metric, the new task first."""
    before, after = evaluation.results[evaluation.reference], evaluation.results["candidate"]
    changes = evaluation.changes[evaluation.reference]
    scored = [(name, described) for name, described in evaluation.sets.items() if name in after]
    rows = []
    for name, described in sorted(scored, key=lambda item: _ROLES.index(item[1].role)):
        for metric in ("loss", "accuracy"):
            was, now, change = (getattr(of[name], metric) for of in (before, after, changes))
            if now is not None and change is not None:
                numbers = f"{_number(was)} | {_number(now)} | {_change(change)}"
                rows.append(f"| {_text(name)} ({described.role}) | {metric} | {numbers} |")
    return rows


def _benchmark_rows(evaluation: Evaluation) -> list[str]:
    benchmarks = evaluation.benchmarks
    if benchmarks is None:
        return []
    before, after = benchmarks.results[evaluation.reference], benchmarks.results["candidate"]
    return [
        f"| {_text(name)} (benchmark) | {task.metric} | {_number(before[name].value)} | "
        f"{_number(after[name].value)} | {after[name].value - before[name].value:+.4f} |"
        for name, task in benchmarks.tasks.items()
    ]


def _change(change: MetricChange) -> str:
    share = "" if change.relative is None else f" ({change.relative:+.1%})"
    return f"{change.change:+.4f}{share}"


def _bound(rule: RuleOutcome) -> str:
    if rule.metric == KL:
        return f"{rule.bound:g} nats per token"
    kind = "gained" if rule.rule == "min_gain" else "lost"
    return f"{rule.bound:.1%} {kind}" if rule.relative else f"{rule.bound:g} {kind}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _name(path: str) -> str:
    """The last part of a path or URI (who reads the page does not know the volume), or a Hugging Face id as it is."""
    return path.rstrip("/").rpartition("/")[2] if path.startswith("/") or "://" in path else path


def _text(text: str) -> str:
    """A name or a reason as one line that ends no cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
