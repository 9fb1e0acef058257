"""The numbers of the continual-learning matrix, against ones worked out by hand."""

import math

import pytest

from osft.evaluation import matrix

# After three rounds; above the diagonal what forward transfer needs.
R = [[0.8, 0.3, 0.1], [0.9, 0.7, 0.4], [0.6, 0.5, 0.9]]
LOWER = [[0.8], [0.9, 0.7], [0.6, 0.5, 0.9]]
BASELINE = [0.2, 0.1, 0.3]


def test_average_accuracy_is_the_mean_of_the_last_row():
    assert matrix.average_accuracy(R) == pytest.approx(2.0 / 3)  # (0.6 + 0.5 + 0.9) / 3


def test_backward_transfer_compares_the_last_row_with_the_diagonal():
    assert matrix.backward_transfer(R) == pytest.approx(-0.2)  # ((0.6 - 0.8) + (0.5 - 0.7)) / 2


def test_forward_transfer_compares_the_entries_above_the_diagonal_with_the_base_model():
    assert matrix.forward_transfer(R, BASELINE) == pytest.approx(0.15)  # ((0.3 - 0.1) + (0.4 - 0.3)) / 2


def test_forgetting_is_measured_from_the_best_model_not_from_the_first():
    assert matrix.forgetting(R) == pytest.approx([0.3, 0.2])  # 0.9 - 0.6, 0.7 - 0.5
    assert matrix.average_forgetting(R) == pytest.approx(0.25)


def test_forgetting_is_negative_where_the_last_model_is_the_best():
    assert matrix.forgetting([[0.5], [0.75, 0.5]]) == [-0.25]


def test_learning_accuracy_is_the_mean_of_the_diagonal():
    assert matrix.learning_accuracy(R) == pytest.approx(0.8)
    identity = matrix.learning_accuracy(R) + 2 / 3 * matrix.backward_transfer(R)
    assert matrix.average_accuracy(R) == pytest.approx(identity)


def test_anchor_drift_is_against_the_base_model():
    assert matrix.anchor_drift([0.5, None, 0.25], 0.5) == -0.25


def test_the_lower_triangle_is_enough_for_all_but_forward_transfer():
    names = ("average_accuracy", "backward_transfer", "forgetting", "average_forgetting", "learning_accuracy")
    for name in names:
        assert getattr(matrix, name)(LOWER) == getattr(matrix, name)(R)
    with pytest.raises(ValueError, match="after round 0 on task 1 is missing"):
        matrix.forward_transfer(LOWER, BASELINE)


def test_losses_are_negated_and_keep_their_meaning():
    losses = [[1.0], [1.5, 2.0]]
    scores = matrix.negated(losses)
    assert matrix.average_accuracy(scores) == -1.75
    assert matrix.backward_transfer(scores) == -0.5, "the loss of task 0 rose by 0.5"
    assert matrix.forgetting(scores) == [0.5]
    assert matrix.anchor_drift([-3.0], -2.5) == -0.5
    assert matrix.negated([[None, 2.0]]) == [[None, -2.0]]


def test_one_round_has_no_transfer_and_forgets_nothing():
    assert matrix.average_accuracy([[0.5]]) == matrix.learning_accuracy([[0.5]]) == 0.5
    assert matrix.backward_transfer([[0.5]]) is None
    assert matrix.forward_transfer([[0.5]], [0.1]) is None
    assert matrix.forgetting([[0.5]]) == []
    assert matrix.average_forgetting([[0.5]]) is None


@pytest.mark.parametrize(
    ("name", "row", "column"),
    [
        ("average_accuracy", 2, 0),
        ("backward_transfer", 0, 0),
        ("forgetting", 1, 0),
        ("average_forgetting", 2, 1),
        ("learning_accuracy", 1, 1),
    ],
)
@pytest.mark.parametrize("value", [None, math.nan])
def test_a_score_that_is_needed_and_missing_is_refused_by_name(name, row, column, value):
    holed = [list(scores) for scores in R]
    holed[row][column] = value
    with pytest.raises(ValueError, match=f"after round {row} on task {column} is"):
        getattr(matrix, name)(holed)


def test_a_missing_score_that_is_not_needed_is_not_asked_for():
    holed = [[None, 0.3, None], [0.9, None, 0.4], R[2]]
    assert matrix.average_accuracy(holed) == pytest.approx(2.0 / 3)
    assert matrix.forward_transfer(holed, [None, 0.1, 0.3]) == pytest.approx(0.15)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match="at least one round"):
        matrix.average_accuracy([])
    with pytest.raises(ValueError, match="round 0 has 2 scores, but there are 1 rounds"):
        matrix.average_accuracy([[0.1, 0.2]])
    with pytest.raises(ValueError, match="2 scores for 3 tasks"):
        matrix.forward_transfer(R, [0.1, 0.2])
    with pytest.raises(ValueError, match="base model on task 2 is None"):
        matrix.forward_transfer(R, [0.1, 0.2, None])
    with pytest.raises(ValueError, match="not measured after round 1"):
        matrix.anchor_drift([0.5, None], 0.5)
