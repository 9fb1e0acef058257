"""The tables at a run's end in a terminal of 80 columns: names may be folded, numbers are whole."""

import io

import pytest
from rich.console import Console

from osft.evaluation.record import (
    ContinualMatrix,
    Decision,
    EvaluatedModel,
    EvaluatedSet,
    Evaluation,
    MatrixRound,
    MetricChange,
    MetricMatrix,
    RuleOutcome,
    SetChanges,
    SetScore,
)
from osft.rounds.pipeline_run import RegisteredVersion
from pipelines.show_round import show_history, show_matrix, show_round
from tests.rounds.resolved import RESOLVED

NAMES = {
    "sarcasm-headlines-of-a-newspaper-2": "new task",
    "sarcasm-headlines": "earlier task",
    "self-written text": "self-written",
    "w": "anchor",
}
TASKS = ["film-reviews", "sarcasm-headlines", "science-questions", "a-name-that-is-longer-than-others", "e", "f"]


def rule(name: str, subject: str, value: float, bound: float) -> RuleOutcome:
    return RuleOutcome(
        rule=name,
        subject=subject,
        metric="loss",
        against="champion",
        before=1.0,
        after=1.0 + value,
        value=value,
        stderr=0.0123,
        standard_errors=1.0,
        comparison="at least",
        bound=bound,
        relative=True,
        passed=True,
    )


@pytest.fixture
def evaluation() -> Evaluation:
    task, counts = next(iter(NAMES)), {"num_loss_tokens": 9, "num_samples": 9}
    losses = {"champion": 0.190, "candidate": 0.184}
    accuracy = {"accuracy": 1.0, "accuracy_stderr": 0.1, "accuracy_kind": "choice"}
    scores = {
        model: dict.fromkeys(NAMES, SetScore(loss=loss, loss_stderr=None, perplexity=1.2, **counts, **accuracy))
        for model, loss in losses.items()
    }
    change = MetricChange(change=-0.006, relative=-0.0316, stderr=None)
    rows = tuple((0.981,) * (number + 1) for number in range(len(TASKS)))
    summary = ("average_accuracy", "learning_accuracy", "backward_transfer", "forward_transfer", "average_forgetting")
    matrix = MetricMatrix(baseline=(0.5,) * len(TASKS), rows=rows, forgetting={}, **dict.fromkeys(summary, 0.1))
    return Evaluation(
        task=task,
        created="2026-11-22T18:00:00+00:00",
        models={name: EvaluatedModel(path=name, version=None) for name in ("base", "champion", "candidate")},
        reference="champion",
        sets={name: EvaluatedSet(role=role, source="", num_samples=9, notes=()) for name, role in NAMES.items()},
        results=scores,
        exact=None,
        changes={"champion": dict.fromkeys(NAMES, SetChanges(loss=change, accuracy=None))},
        drift={},
        benchmarks=None,
        examples=(),
        matrix=ContinualMatrix(
            rounds=tuple(MatrixRound(task=name, version=None) for name in TASKS),
            metrics={"accuracy": matrix},
            anchors={},
            drift={},
        ),
        decision=Decision(
            promote=True, reason="", rules=tuple(rule("max_forgetting", name, 0.1234, 0.99) for name in NAMES)
        ),
    )


@pytest.fixture
def folder(evaluation, tmp_path):
    (tmp_path / "round.json").write_text(RESOLVED.to_json())
    (tmp_path / "evaluation.json").write_text(evaluation.to_json())
    (tmp_path / "version.json").write_text(RegisteredVersion(model_name="osft-model", version=2).to_json())
    return tmp_path


def printed(show, *arguments) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    show(console, *arguments)
    return console.file.getvalue().splitlines()


def table_of(lines: list[str]) -> list[str]:
    table = [line for line in lines if line.startswith(("│", "┃"))]
    assert table
    assert max(map(len, table)) <= 80
    assert not [line for line in table if "…" in line]
    return table


def test_scores_are_whole(folder):
    rows = table_of(printed(show_round, folder))
    for number in ("0.190 -> 0.184", "-3.2%", "100% -> 100% ± 10%"):
        assert sum(number in row for row in rows) == len(NAMES)


def test_names_are_whole_over_the_lines(folder):
    rows = table_of(printed(show_round, folder))
    column = "".join(row.split("│")[1].strip() for row in rows if row.startswith("│")).replace(" ", "")
    assert column == "".join(NAMES).replace(" ", "")


def test_matrix_of_six_tasks_is_whole(evaluation):
    rows = table_of(printed(show_matrix, evaluation))
    assert sum(row.count(" 98.1 ") for row in rows) == 1 + 2 + 3 + 4 + 5 + 6


def test_decisions_are_whole(folder, tmp_path, mlflow):
    lines = printed(show_history, [folder], "a-model-that-nobody-registered", mlflow)
    decisions = lines[: next(number for number, line in enumerate(lines) if "matrix" in line)]
    rows = table_of(decisions)
    assert sum("12.34 % │ at least 99.00 % │ passed" in row for row in rows) == len(NAMES)
    assert sum("promote" in row for row in rows) == 1
