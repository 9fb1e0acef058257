"""What a round found, learned and forgot, as tables in the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from osft.evaluation.record import Evaluation, RuleOutcome
from osft.evaluation.report.formats import format_number
from osft.models.training_summary import SavedUpdate, TrainingSummary
from osft.rounds.pipeline_run import RegisteredVersion
from osft.rounds.resolution import ResolvedRound

if TYPE_CHECKING:
    from mlflow import MlflowClient


def show_round(console: Console, folder: Path) -> None:
    """Print what is in a round's folder: scores, the decision, the version; or that there was nothing to learn."""
    resolved = ResolvedRound.read(folder / "round.json")
    if resolved.nothing_to_learn:
        console.print(f"round:   {resolved.nothing_to_learn}", soft_wrap=True)
        return
    evaluation = Evaluation.read(folder / "evaluation.json")
    registered = RegisteredVersion.read(folder / "version.json")
    console.print(_scores(evaluation))
    console.print(f"drift:   {_drift(evaluation)}", soft_wrap=True)
    decision = evaluation.decided
    console.print(f"gate:    {'passed' if decision.promote else 'refused'}")
    for rule in decision.rules:
        if not rule.passed:
            console.print(f"         {rule_text(rule)}", soft_wrap=True)
    training = folder / "train" / "training.json"
    saved = TrainingSummary.read(training).saved if training.is_file() else None
    if saved and saved.rounding_error is not None:
        console.print(f"saved:   {_saved(saved, evaluation)}", soft_wrap=True)
    aliases = "candidate and champion" if decision.promote else "candidate and challenger; the champion did not move"
    console.print(f"version: {registered.model_name} {registered.version} ({aliases}), `make ui` shows it in MLflow")
    console.print(f"report:  {folder / 'report.html'}", soft_wrap=True)


def show_matrix(console: Console, evaluation: Evaluation) -> None:
    """Print the continual-learning matrix up to a round, and what it says."""
    matrix = evaluation.matrix
    assert matrix is not None, "it is written with one"
    tasks = [row.task for row in matrix.rounds]
    kind, unit = ("accuracy", 100) if "accuracy" in matrix.metrics else ("loss", 1)
    block, digits = matrix.metrics[kind], 1 if unit == 100 else 3
    shown = f"{kind}, {'%' if unit == 100 else 'nats per token'}"
    table = Table(title=f"continual-learning matrix: {shown}, on held-out data")
    rows = [("base", block.baseline)] + [(f"after {task}", row) for task, row in zip(tasks, block.rows, strict=True)]
    # Names may go on in the next line, those of the columns rather than those of the rows; a number may not.
    longest = max(len(format_number(v and unit * v, digits)) for _, scores in rows for v in scores)
    all_fit = max(len(name) for name, _ in rows) + (longest + 3) * len(tasks) + 4 <= console.width
    table.add_column("model", no_wrap=all_fit, overflow="fold")
    for task in tasks:
        table.add_column(task, justify="right", overflow="fold", min_width=longest)
    for name, scores in rows:
        values = [*scores, *[None] * (len(tasks) - len(scores))]
        table.add_row(name, *(format_number(None if v is None else unit * v, digits) for v in values))
    console.print(table)
    for name in ("average_accuracy", "backward_transfer", "forward_transfer", "average_forgetting"):
        value = getattr(block, name)
        if value is not None:
            console.print(f"{name.replace('_', ' ') + ':':20}{format_number(unit * value, digits)}")


def show_history(console: Console, rounds: list[Path], model_name: str, mlflow: "MlflowClient") -> None:
    """Print the decisions of rounds that ended, the matrix after the last one, and where the champion comes from."""
    from osft.tracking import lineage, registry
    from osft.tracking.lineage_command import tree_of

    console.rule("all rounds")
    evaluations = [Evaluation.read(folder / "evaluation.json") for folder in rounds]
    table = Table(title="decisions of the gate")
    for column in ("round", "rule"):
        table.add_column(column, overflow="fold")
    for column in ("number", "bound", ""):
        table.add_column(column, no_wrap=True)
    for number, evaluation in enumerate(evaluations, start=1):
        decision = evaluation.decided
        for rule in decision.rules:
            value, bound = _amount(rule, rule.value), f"{rule.comparison} {_amount(rule, rule.bound)}"
            passed = "passed" if rule.passed else "failed"
            table.add_row(f"{number} {evaluation.task}", f"{rule.rule} {rule.subject}", value, bound, passed)
        table.add_row("", "[bold]decision", "", "", "[bold]" + ("promote" if decision.promote else "refuse"))
        table.add_section()
    if evaluations:
        console.print(table)
        show_matrix(console, evaluations[-1])
        console.print(f"report:  {rounds[-1] / 'report.html'}", soft_wrap=True)
    champion = registry.champion(mlflow, model_name)
    if champion is not None:
        console.print(tree_of(mlflow, model_name, lineage.history(mlflow, model_name, champion)), soft_wrap=True)


def rule_text(rule: RuleOutcome) -> str:
    """One rule of the gate in words."""
    tolerance = "" if rule.stderr is None else f" ± {_amount(rule, rule.stderr)}"
    return (
        f"{rule.rule} of {rule.subject} ({rule.metric}, against {rule.against}): "
        f"{_amount(rule, rule.value)}{tolerance}, must be {rule.comparison} {_amount(rule, rule.bound)}"
    )


def _saved(saved: SavedUpdate, evaluation: Evaluation) -> str:
    """What the rounding of the served weights did to the update."""
    if saved.rounding == "none":
        return f"in {saved.dtype}, which holds the update"
    exact = evaluation.exact
    cost = f" (loss {exact.loss:.3f} on {evaluation.task})" if exact else ""
    return (
        f"in {saved.dtype}, rounded ({saved.rounding}), which loses {saved.update_lost:.0%} of the update; "
        f"the next round starts from the exact weights{cost}"
    )


def _drift(evaluation: Evaluation) -> str:
    """How far the model moved from the base model on what it should keep, in words."""
    roles = {name: described.role for name, described in evaluation.sets.items()}
    drifts = evaluation.drift.get("base", {})
    kept = {name: found for name, found in drifts.items() if found and roles[name] in ("anchor", "self-written")}
    if not kept:
        return "not measured"
    amounts = [
        f"{name} {found.kl:.4f}" + ("" if found.stderr is None else f" ± {found.stderr:.4f}")
        for name, found in kept.items()
    ]
    return f"{', '.join(amounts)} nats per token (KL) from the base model"


def _amount(rule: RuleOutcome, value: float) -> str:
    """A number of a rule, in its unit."""
    in_percent = rule.relative or rule.metric == "accuracy"
    return f"{100 * value:.2f} %" if in_percent else f"{value:.4f}"


def _scores(evaluation: Evaluation) -> Table:
    reference = evaluation.reference
    models = (reference, "candidate")
    table = Table(title=f"{evaluation.task}: {reference} -> candidate, on held-out data")
    table.add_column("evaluation set", overflow="fold")
    table.add_column("role", overflow="fold")
    for column in ("loss", "change", "accuracy"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in evaluation.results["candidate"]:
        described = evaluation.sets[name]
        scores = [evaluation.results[model][name] for model in models]
        change = evaluation.changes[reference][name].loss.relative
        accuracy = "-"
        if scores[-1].accuracy is not None:
            accuracy = " -> ".join(f"{score.accuracy:.0%}" for score in scores)
            accuracy += f" ± {scores[-1].accuracy_stderr:.0%}"
        losses = " -> ".join(f"{score.loss:.3f}" for score in scores)
        table.add_row(name, described.role, losses, "-" if change is None else f"{change:+.1%}", accuracy)
    return table
