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


ROUNDS = [("first", 1), ("second", 4), ("third", None)]


def of_tasks(values: list[float | None], metric: str = "accuracy", **anchors: float | None) -> dict:
    tasks = [task for task, _ in ROUNDS]
    return {name: {metric: value} for name, value in [*zip(tasks, values, strict=False), *anchors.items()]}


def test_description_holds_the_matrix_and_its_numbers():
    found = matrix.describe(ROUNDS, of_tasks(BASELINE), [of_tasks(row) for row in R]).to_dict()
    assert found["rounds"][1:] == [{"task": "second", "version": 4}, {"task": "third", "version": None}]
    block = found["metrics"]["accuracy"]
    assert (block["baseline"], block["rows"]) == (BASELINE, R)
    numbers = {name: block[name] for name in block if name not in ("baseline", "rows", "forgetting")}
    assert numbers == {
        "average_accuracy": pytest.approx(2.0 / 3),
        "learning_accuracy": pytest.approx(0.8),
        "backward_transfer": pytest.approx(-0.2),
        "forward_transfer": pytest.approx(0.15),
        "average_forgetting": pytest.approx(0.25),
    }
    assert block["forgetting"] == pytest.approx({"first": 0.3, "second": 0.2})


def test_description_holds_the_drift_from_the_base_model_after_each_round():
    scores = [
        {"first": {"loss": 1.0, "kl_base": 0.2}, "web": {"kl_base": 0.01, "kl_base_stderr": 0.001}},
        {"first": {"loss": 1.0}, "web": {"kl_base": 0.02, "kl_champion": 0.01}, "own": {"kl_base": 0.0}},
    ]
    found = matrix.describe(ROUNDS[:2], {}, scores, anchors=["web"]).to_dict()
    assert found["drift"] == {"first": [0.2, None], "web": [0.01, 0.02], "own": [None, 0.0]}
    assert found["anchors"] == {"web": {}}
    assert matrix.describe(ROUNDS[:1], {}, scores[1:], anchors=["none"]).drift == {"web": (0.02,), "own": (0.0,)}


def test_description_of_losses_keeps_them_as_measured_and_counts_a_rise_as_forgetting():
    losses = [[1.0, 2.5], [1.5, 2.0]]
    found = matrix.describe(
        ROUNDS[:2], of_tasks([3.0, 3.5], "loss"), [of_tasks(row, "loss") for row in losses]
    ).to_dict()
    block = found["metrics"]["loss"]
    assert (block["baseline"], block["rows"]) == ([3.0, 3.5], losses)
    assert block["average_accuracy"] == -1.75
    assert block["backward_transfer"] == -0.5
    assert block["forward_transfer"] == 1.0  # -2.5 + 3.5
    assert block["forgetting"] == {"first": 0.5}


def test_description_leaves_out_the_numbers_whose_scores_are_missing():
    rows = [[1.0], [None, 2.0], [1.5, 2.5, 3.0]]
    block = matrix.describe(ROUNDS, {}, [of_tasks(row, "loss") for row in rows]).to_dict()["metrics"]["loss"]
    assert block["rows"] == [[1.0, None, None], [None, 2.0, None], [1.5, 2.5, 3.0]]
    assert block["backward_transfer"] == -0.5
    assert block["forward_transfer"] is block["average_forgetting"] is None, "task first after round second"
    assert block["forgetting"] == {}


@pytest.mark.parametrize("value", [None, math.nan])
def test_description_has_accuracies_only_if_each_model_was_measured_on_what_it_had_learned(value):
    def metrics(rows: list) -> dict:
        return matrix.describe(ROUNDS, {}, [of_tasks(row) for row in rows]).to_dict()["metrics"]

    assert metrics(LOWER)["accuracy"]["forward_transfer"] is None
    assert "accuracy" not in metrics([LOWER[0], [value, 0.7], LOWER[2]])
    assert "loss" in metrics(LOWER)


def test_description_follows_the_anchors_from_the_base_model_on():
    scores = [of_tasks([1.0], "loss", text=2.5), of_tasks([1.0, 1.0], "loss", text=None, late=4.0)]
    found = matrix.describe(ROUNDS[:2], of_tasks([], "loss", text=2.0), scores, anchors=["text", "late"]).to_dict()[
        "anchors"
    ]
    assert found == {
        "text": {"loss": {"baseline": 2.0, "values": [2.5, None]}},
        "late": {"loss": {"baseline": None, "values": [None, 4.0]}},
    }


def test_first_round_is_described_without_transfer():
    found = matrix.describe(ROUNDS[:1], of_tasks([3.0], "loss"), [of_tasks([1.0], "loss")]).to_dict()["metrics"]["loss"]
    assert found["average_accuracy"] == found["learning_accuracy"] == -1.0
    assert found["backward_transfer"] is found["forward_transfer"] is found["average_forgetting"] is None
    assert found["forgetting"] == {}


def test_description_needs_the_scores_of_every_round():
    with pytest.raises(ValueError, match="scores of 1 models for 3 rounds"):
        matrix.describe(ROUNDS, {}, [{}])
