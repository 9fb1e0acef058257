"""The gate's arithmetic, at its bounds."""

import pytest

from osft.evaluation.gate import GateRules, decide

SETS = {"new": {"role": "new task"}, "old": {"role": "anchor"}}
RULES = GateRules(min_task_improvement=0.15, max_anchor_increase=0.02)


def decision(new: float, old: float) -> dict:
    losses = {"base": {"new": {"loss": 2.0}, "old": {"loss": 4.0}}}
    losses["candidate"] = {"new": {"loss": new}, "old": {"loss": old}}
    return decide(SETS, losses, RULES)


@pytest.mark.parametrize(
    ("new", "old", "passed"),
    [
        (1.6, 4.0, [True, True]),
        (1.69, 4.07, [True, True]),
        (1.71, 4.0, [False, True]),
        (1.0, 4.09, [True, False]),
        (2.5, 5.0, [False, False]),
        (float("nan"), 4.0, [False, True]),
        (1.0, float("nan"), [True, False]),
    ],
)
def test_promotion_needs_every_rule(new, old, passed):
    record = decision(new, old)
    assert [rule["passed"] for rule in record["rules"]] == passed
    assert record["promote"] is all(passed)


def test_record_says_number_and_bound():
    task, anchor = decision(1.5, 4.04)["rules"]
    assert task["value"] == pytest.approx(-0.25)
    assert task["bound"] == -0.15
    assert task["detail"] == "2.0000 -> 1.5000"
    assert anchor["value"] == pytest.approx(0.01)
    assert anchor["bound"] == 0.02


@pytest.mark.parametrize("setting", [{"min_task_improvement": 1.0}, {"max_anchor_increase": -0.1}])
def test_bounds_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        GateRules(**setting)
