"""The tables at a run's end in a terminal of 80 columns: names may be folded, numbers are whole."""

import io
import json

import pytest
from rich.console import Console

from pipelines.show_round import show_history, show_matrix, show_round

NAMES = {
    "sarcasm-headlines-of-a-newspaper-2": "new task",
    "sarcasm-headlines": "earlier task",
    "self-written text": "self-written",
    "w": "anchor",
}
TASKS = ["film-reviews", "sarcasm-headlines", "science-questions", "a-name-that-is-longer-than-others", "e", "f"]


def rule(name: str, subject: str, value: float, bound: float) -> dict:
    return {
        "rule": name,
        "subject": subject,
        "metric": "loss",
        "against": "champion",
        "value": value,
        "stderr": 0.0123,
        "comparison": "at least",
        "bound": bound,
        "relative": True,
        "passed": True,
    }


@pytest.fixture
def evaluation() -> dict:
    task = next(iter(NAMES))
    losses = {"champion": 0.190, "candidate": 0.184}
    scores = {
        model: {name: {"loss": loss, "accuracy": 1.0, "accuracy_stderr": 0.1} for name in NAMES}
        for model, loss in losses.items()
    }
    rows = [[0.981] * (number + 1) for number in range(len(TASKS))]
    block = {"baseline": [0.5] * len(TASKS), "rows": rows}
    summary = dict.fromkeys(("average_accuracy", "backward_transfer", "forward_transfer", "average_forgetting"), 0.1)
    return {
        "task": task,
        "reference": "champion",
        "results": scores,
        "sets": {name: {"role": role} for name, role in NAMES.items()},
        "changes": {"champion": {name: {"loss": {"relative": -0.0316}} for name in NAMES}},
        "decision": {"promote": True, "rules": [rule("max_forgetting", name, 0.1234, 0.99) for name in NAMES]},
        "matrix": {"rounds": [{"task": name} for name in TASKS], "metrics": {"accuracy": block | summary}},
    }


@pytest.fixture
def folder(evaluation, tmp_path):
    (tmp_path / "round.json").write_text(json.dumps({"nothing_to_learn": ""}))
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "version.json").write_text(json.dumps({"model_name": "osft-model", "version": 2}))
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
