"""The description of a model version says what a person asks first, and fits MLflow's column."""

import pytest

from osft.tracking.description import describe_version
from tests.tracking.evaluations import an_evaluation, plain_evaluation


def test_first_line_says_what_was_learned_and_from_which_version():
    first = describe_version(an_evaluation(), parent_version=2).splitlines()[0]
    assert "Learned film-reviews" in first
    assert "version 2, which comes from `small-llama`" in first


def test_first_version_comes_from_the_base_model():
    assert "of the base model `small-llama`." in describe_version(an_evaluation(), parent_version=None)


def test_hub_id_of_the_base_model_is_kept_whole():
    given = an_evaluation(models={"base": {"path": "org/small-llama"}})
    assert "`org/small-llama`" in describe_version(given, parent_version=2)


def test_scores_before_and_after_stand_side_by_side_the_new_task_first():
    rows = [line for line in describe_version(an_evaluation(), parent_version=2).splitlines() if line.startswith("| ")]
    assert rows == [
        "| measured on | metric | champion | this version | change |",
        "| film-reviews (new task) | loss | 2.0000 | 1.5000 | -0.5000 (-25.0%) |",
        "| film-reviews (new task) | accuracy | 0.5000 | 0.7500 | +0.2500 (+50.0%) |",
        "| mails (earlier task) | loss | 2.0000 | 1.5000 | -0.5000 (-25.0%) |",
        "| mails (earlier task) | accuracy | 0.5000 | 0.7500 | +0.2500 (+50.0%) |",
        "| general text (anchor) | loss | 2.0000 | 1.5000 | -0.5000 (-25.0%) |",
        "| arc_easy (benchmark) | acc | 0.5000 | 0.2500 | -0.2500 |",
    ]


def test_what_all_rounds_did_to_earlier_tasks_is_said():
    assert "After 2 rounds, by loss: backward transfer -0.1250." in describe_version(an_evaluation(), parent_version=2)


def test_refusal_names_the_rule_the_numbers_and_the_bound():
    described = describe_version(an_evaluation(refused=True), parent_version=2)
    assert "**Refused by the gate**: mails got worse" in described
    assert "- max_forgetting on mails: loss 2.0000 → 2.5000, at most 5.0% lost wanted" in described


def test_refusal_for_drift_gives_its_unit():
    decision = plain_evaluation(refused=True)["decision"]
    decision["rules"][0] |= {"rule": "max_drift", "metric": "kl", "before": 0.0, "after": 0.08, "relative": False}
    assert "- max_drift on mails: kl 0.0000 → 0.0800, at most 0.05 nats per token wanted" in describe_version(
        an_evaluation(decision=decision), parent_version=2
    )


@pytest.mark.parametrize("lacking", ["benchmarks", "matrix", "decision"])
def test_what_was_not_measured_is_left_out(lacking):
    assert "Learned film-reviews" in describe_version(an_evaluation(**{lacking: None}), parent_version=2)


def test_many_sets_are_cut_to_mlflows_limit_and_counted():
    described = describe_version(an_evaluation(anchors=200), parent_version=2)
    assert 4800 < len(described) <= 5000
    shown = described.count("\n| ") - 1  # the head of the table
    assert f"{205 - shown} more rows are in report.html" in described


def test_name_with_a_bar_ends_no_cell():
    given = an_evaluation(task="a|b\nc")
    assert "Learned a\\|b c" in describe_version(given, parent_version=2)
