"""The continual-learning matrix, and what it says about learning and forgetting.

`R[i][j]` is the score of the model after round i on task j, the task that round j learned; rounds and tasks are
counted from 0, and there are T of each. The baseline `b[j]` is the score of the base model, before any round. A score
is like an accuracy: higher is better, in whatever unit. **Of losses, give the negated ones** (`negated`): then every
number here keeps its sign and its meaning, with nats per token as the unit: a backward transfer of -0.1 is a loss that
rose by 0.1.

What was not measured is None, and a row may end early. A number that needs a missing score is refused with its name,
never taken from fewer tasks. The lower triangle is enough for all but forward transfer, which needs the base model's
scores and the entries right above the diagonal: the parent of each round on the task that the round learned.

Lopez-Paz & Ranzato 2017, "Gradient Episodic Memory for Continual Learning", arXiv:1706.08840, section 2.
Their baseline has random weights; here it is the pre-trained base model. Average accuracy and backward
transfer are also what Nayak et al., arXiv:2504.07097 (OSFT), report of a sequence of tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

from osft.evaluation.record import AnchorScores, ContinualMatrix, MatrixRound, MetricMatrix

Score = float | None
Scores = Mapping[str, Mapping[str, Score]]
"""Of one model: the name of an evaluation set -> metric -> value, None if not measured: "loss", "accuracy", and the
divergences "kl_base" and "kl_champion"."""
Matrix = Sequence[Sequence[Score]]
"""T rows, one a round, of up to T scores, one a task."""


def negated(matrix: Matrix) -> list[list[Score]]:
    """The matrix of scores that belongs to one of losses."""
    return [[None if value is None else -value for value in row] for row in matrix]


def average_accuracy(matrix: Matrix) -> float:
    """Mean score of the last model on all tasks: (1/T) sum_j R[T-1][j] (GEM, ACC, eq. 2).

    Raises ValueError as every function here: for no round, for a score that is needed and missing or not a finite
    number, and for a row with more than T scores.
    """
    tasks = _num_tasks(matrix)
    return sum(_score(matrix, tasks - 1, task) for task in range(tasks)) / tasks


def backward_transfer(matrix: Matrix) -> float | None:
    """What later rounds did to earlier tasks: mean over j < T-1 of R[T-1][j] - R[j][j] (GEM, BWT, eq. 3).

    Negative: forgetting. None after one round, which has no earlier task.
    """
    tasks = _num_tasks(matrix)
    changes = [_score(matrix, tasks - 1, task) - _score(matrix, task, task) for task in range(tasks - 1)]
    return _mean(changes)


def forward_transfer(matrix: Matrix, baseline: Sequence[Score]) -> float | None:
    """What earlier rounds did for a task before it was learned: mean over j > 0 of R[j-1][j] - b[j] (GEM, FWT, eq. 4).

    baseline: (T,) scores of the base model; the first is not needed. None after one round.
    """
    tasks = _num_tasks(matrix)
    if len(baseline) < tasks:
        raise ValueError(f"the baseline has {len(baseline)} scores for {tasks} tasks. Measure the base model on all")
    return _mean([_score(matrix, task - 1, task) - _baseline(baseline, task) for task in range(1, tasks)])


def forgetting(matrix: Matrix) -> list[float]:
    """Of each task but the last, how far the last model is below the best one since the task was learned.

    f[j] = max over i in j … T-2 of R[i][j], minus R[T-1][j]; (T-1,), negative where the last model is the best
    (Chaudhry et al. 2018, arXiv:1801.10112, who also count the models before round j; those have nothing to forget,
    and need not be measured).
    """
    tasks = _num_tasks(matrix)
    best = [max(_score(matrix, step, task) for step in range(task, tasks - 1)) for task in range(tasks - 1)]
    return [best[task] - _score(matrix, tasks - 1, task) for task in range(tasks - 1)]


def average_forgetting(matrix: Matrix) -> float | None:
    """Mean of `forgetting` (Chaudhry et al. 2018); None after one round."""
    return _mean(forgetting(matrix))


def learning_accuracy(matrix: Matrix) -> float:
    """Mean score on each task right after it was learned: (1/T) sum_j R[j][j] (Riemer et al. 2019, arXiv:1810.11910).

    Average accuracy is learning accuracy plus (T-1)/T of backward transfer.
    """
    tasks = _num_tasks(matrix)
    return sum(_score(matrix, task, task) for task in range(tasks)) / tasks


def describe(
    rounds: Sequence[tuple[str, int | None]], baseline: Scores, scores: Sequence[Scores], *, anchors: Sequence[str] = ()
) -> ContinualMatrix:
    """The matrix of a sequence of rounds, with every number above that the scores are enough for.

    rounds: the task that each learned, and the version of its model (None: not registered), the oldest first.
    baseline: of the base model. scores: of the model after each round. anchors: names of general sets.

    Raises ValueError for another number of scores than of rounds.
    """
    if len(scores) != len(rounds):
        raise ValueError(f"there are scores of {len(scores)} models for {len(rounds)} rounds")
    tasks = [task for task, _ in rounds]
    metrics = {}
    for metric in ("loss", "accuracy"):
        before, *rows = [[_of(model, task, metric) for task in tasks] for model in (baseline, *scores)]
        if metric == "loss" or all(isfinite(_nan(row[j])) for i, row in enumerate(rows) for j in range(i + 1)):
            metrics[metric] = _block(tasks, before, rows, lower_is_better=metric == "loss")
    return ContinualMatrix(
        rounds=tuple(MatrixRound(task=task, version=version) for task, version in rounds),
        metrics=metrics,
        anchors={anchor: _anchor(anchor, baseline, scores) for anchor in anchors},
        drift=_drifts(scores),
    )


def _block(
    tasks: Sequence[str], baseline: list[Score], rows: list[list[Score]], *, lower_is_better: bool
) -> MetricMatrix:
    """One metric's part of `describe`."""
    before, *matrix = negated([baseline, *rows]) if lower_is_better else [baseline, *rows]
    lost = _if_measured(forgetting, matrix) or []
    return MetricMatrix(
        baseline=tuple(baseline),
        rows=tuple(map(tuple, rows)),
        average_accuracy=_if_measured(average_accuracy, matrix),
        learning_accuracy=_if_measured(learning_accuracy, matrix),
        backward_transfer=_if_measured(backward_transfer, matrix),
        forward_transfer=_if_measured(forward_transfer, matrix, before),
        average_forgetting=_if_measured(average_forgetting, matrix),
        forgetting=dict(zip(tasks, lost, strict=False)),  # the last task has none
    )


def _anchor(name: str, baseline: Scores, scores: Sequence[Scores]) -> dict[str, AnchorScores]:
    found = {}
    for metric in ("loss", "accuracy"):
        before, *values = [_of(model, name, metric) for model in (baseline, *scores)]
        if any(value is not None for value in (before, *values)):
            found[metric] = AnchorScores(baseline=before, values=tuple(values))
    return found


def _drifts(scores: Sequence[Scores]) -> dict[str, tuple[Score, ...]]:
    names = dict.fromkeys(name for model in reversed(scores) for name in model)  # as the last round has them
    found = {name: tuple(_of(model, name, "kl_base") for model in scores) for name in names}
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def _of(scores: Scores, name: str, metric: str) -> Score:
    return scores.get(name, {}).get(metric)


def _nan(value: Score) -> float:
    return float("nan") if value is None else value


def _if_measured(number: Callable[..., Any], *scores: Any) -> Any:
    try:
        return number(*scores)
    except ValueError:
        return None


def _num_tasks(matrix: Matrix) -> int:
    if not matrix:
        raise ValueError("a continual-learning matrix needs at least one round")
    for number, row in enumerate(matrix):
        if len(row) > len(matrix):
            raise ValueError(f"round {number} has {len(row)} scores, but there are {len(matrix)} rounds and tasks")
    return len(matrix)


def _score(matrix: Matrix, after: int, task: int) -> float:
    value = matrix[after][task] if task < len(matrix[after]) else None
    if value is None or not isfinite(value):
        problem = "missing" if value is None else repr(value)
        raise ValueError(f"the score of the model after round {after} on task {task} is {problem}. Evaluate it again")
    return value


def _baseline(baseline: Sequence[Score], task: int) -> float:
    value = baseline[task]
    if value is None or not isfinite(value):
        raise ValueError(f"the score of the base model on task {task} is {value!r}. Evaluate it again")
    return value


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
