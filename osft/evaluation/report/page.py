"""The parts of the report put together."""

from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from osft.evaluation.record import Evaluation
from osft.evaluation.report.decision import rules_in_words
from osft.evaluation.report.drift import drift_section
from osft.evaluation.report.formats import format_duration, format_number, format_percent
from osft.evaluation.report.results import benchmark_rows, change_plots, examples_by_set, models, result_rows
from osft.evaluation.report.rounds import matrix_blocks
from osft.evaluation.report.subspace import subspace_section
from osft.evaluation.report.training import cost_of, fitted_step, training_plots
from osft.models.training_summary import TrainingSummary

if TYPE_CHECKING:
    from osft.subspace.factor_summary import FactorSummary


def render_report(
    evaluation: Evaluation,
    *,
    training: TrainingSummary | None = None,
    metrics: list[dict[str, Any]] | None = None,
    factors: "FactorSummary | None" = None,
    dataset: dict[str, Any] | None = None,
    cost: dict[str, float] | None = None,
) -> str:
    """One HTML page, without any reference to something outside it.

    `evaluation` has a decision, `training` is `training.json`, `metrics` the lines of `metrics.jsonl`, `dataset` the
    statistics in `dataset.json`, `cost` the seconds that each step of the round took. What is None is left out of the
    page.

    Raises ValueError for an evaluation without a decision, KeyError or jinja2.UndefinedError where an input lacks a
    field.
    """
    templates = PackageLoader("osft", "evaluation/report/templates")
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=format_number, percent=format_percent, duration=format_duration)
    rows, benchmarks, examples = result_rows(evaluation), benchmark_rows(evaluation), examples_by_set(evaluation)
    costs, drift = cost_of(training, metrics, cost), drift_section(evaluation, training)
    sections = {
        "decision": "Decision",
        "rounds": "All rounds",
        "results": "Results",
        "benchmarks": "Benchmarks" if benchmarks else "",
        "drift": "Drift" if drift else "",
        "training": "Training" if metrics else "",
        "subspace": "Subspace" if factors else "",
        "examples": "Examples" if examples else "",
        "cost": "Cost" if costs["tiles"] else "",
        "provenance": "Provenance",
    }
    matrix = evaluation.matrix
    page = environment.get_template("page.html.j2").render(
        evaluation=evaluation,
        sections={name: title for name, title in sections.items() if title},
        models=models(evaluation),
        rules=rules_in_words(evaluation.decided),
        rows=rows,
        change_plots=change_plots(rows, models(evaluation)[evaluation.reference]),
        matrix=matrix,
        matrix_blocks=matrix_blocks(matrix) if matrix and len(matrix.rounds) > 1 else [],
        benchmarks=benchmarks,
        examples=examples,
        drift=drift,
        training=training,
        training_plots=training_plots(metrics, training) if metrics else [],
        metrics=metrics,
        fitted=fitted_step(training),
        subspace=subspace_section(factors, training) if factors else None,
        exact=evaluation.exact,
        candidate=evaluation.results["candidate"][evaluation.task],
        dataset=dataset,
        cost=costs,
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # JSON can hold lone surrogates, a file cannot
