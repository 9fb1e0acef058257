"""The gate's arithmetic, at its bounds."""

import json
import math
import re
from typing import Any

import pytest

from osft.evaluation.gate import GateRules, MeasuredVersion, decide
from osft.evaluation.record import Evaluation

NAN = float("nan")
OFF = dict.fromkeys(("min_gain", "max_forgetting", "max_drift", "max_benchmark_regression"))


def score(loss: float, accuracy: float | None = None, stderr: float | None = 0.1) -> dict[str, float | None]:
    return {"loss": loss, "loss_stderr": stderr, "accuracy": accuracy, "accuracy_stderr": stderr}


def evaluation(
    *,
    base: dict[str, Any],
    candidate: dict[str, Any],
    champion: dict[str, Any] | None = None,
    stderr: float | None = 0.1,
    kl: dict[str, float] | None = None,
) -> dict[str, Any]:
    """What `evaluate` returns, of sets named after their role; `stderr` is that of each paired change.

    `kl` is the drift from the base model where it is not 0.
    """
    results = {"base": base, "candidate": candidate} | ({"champion": champion} if champion else {})
    roles = {"new": "new task", "earlier": "earlier task", "anchor": "anchor", "written": "self-written"}
    moved = dict.fromkeys(candidate, 0.0) | (kl or {})

    def change(model: str, name: str, metric: str) -> dict[str, float | None] | None:
        before, after = results[model][name][metric], candidate[name][metric]
        return (
            None if before is None or after is None else {"change": after - before, "relative": None, "stderr": stderr}
        )

    return {
        "reference": "champion" if champion else "base",
        "sets": {name: {"role": roles[name.split()[0]]} for name in moved},
        "results": results,
        "changes": {
            model: {
                name: {metric: change(model, name, metric) for metric in ("loss", "accuracy")} for name in candidate
            }
            for model in results
            if model != "candidate"
        },
        "drift": {
            "base": {
                name: {"kl": value, "stderr": stderr, "num_tokens": 9, "dtype": "float32"}
                for name, value in moved.items()
            }
        },
        "benchmarks": None,
    }


def decided(found: dict[str, Any], rules: GateRules, **more: Any) -> dict[str, Any]:
    """What the gate decides of numbers that `evaluation` gave, as plain values."""
    of_a_score = {"perplexity": 1.0, "num_loss_tokens": 9, "num_samples": 9, "accuracy_kind": None}
    of_a_set = {"source": "", "num_samples": 9, "notes": []}
    whole = {
        "task": "new",
        "created": "",
        "models": {},
        "exact": None,
        "examples": [],
        "matrix": None,
        "decision": None,
        **found,
        "sets": {name: of_a_set | described for name, described in found["sets"].items()},
        "results": {
            model: {name: of_a_score | scores for name, scores in of_sets.items()}
            for model, of_sets in found["results"].items()
        },
    }
    return decide(Evaluation.from_plain(whole), rules, **more).to_dict()


def outcome(found: dict[str, Any], rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The one rule that is not off."""
    (only,) = decided(found, GateRules.from_parameters(OFF | rules), **more)["rules"]
    return only


def gain(before: float, after: float, *, stderr: float | None = 0.1, **keys: Any) -> dict[str, Any]:
    """What min_gain says, by default without a standard error."""
    found = evaluation(base={"new": score(before, before)}, candidate={"new": score(after, after)}, stderr=stderr)
    return outcome(found, {"min_gain": {"standard_errors": 0} | keys})


def drift(before: float, after: float, **keys: Any) -> dict[str, Any]:
    """What max_drift says of a loss, or of another score."""
    found = evaluation(base={"anchor": score(before, before)}, candidate={"anchor": score(after, after)})
    return outcome(found, {"max_drift": {"metric": "loss"} | keys})


def moved(kl: float, *, stderr: float | None = 0.01, **keys: Any) -> dict[str, Any]:
    """What max_drift says of a divergence."""
    found = evaluation(base={"anchor": score(2.0)}, candidate={"anchor": score(2.0)}, stderr=stderr, kl={"anchor": kl})
    return outcome(found, {"max_drift": keys})


def test_relative_gain_of_loss_is_its_fall_over_what_it_was():
    found = gain(4.0, 3.0)
    assert found["value"] == 0.25
    assert found["stderr"] == pytest.approx(0.025)
    assert (found["before"], found["after"], found["against"]) == (4.0, 3.0, "base")
    assert (found["bound"], found["comparison"], found["passed"]) == (0.0, "more than", True)


def test_absolute_gain_of_accuracy_is_its_rise():
    found = gain(0.5, 0.75, metric="accuracy", relative=False, bound=0.2)
    assert (found["value"], found["stderr"], found["passed"]) == (0.25, 0.1, True)


@pytest.mark.parametrize(("after", "passed"), [(3.4, True), (3.401, False), (4.5, False), (NAN, False)])
def test_gain_must_reach_its_bound(after, passed):
    assert gain(4.0, after, bound=0.15)["passed"] is passed


@pytest.mark.parametrize(("after", "passed"), [(3.999, True), (4.0, False), (4.001, False)])
def test_least_gain_of_nothing_asks_for_more_than_nothing(after, passed):
    assert gain(4.0, after, stderr=0.0, standard_errors=1)["passed"] is passed


def test_by_default_a_gain_must_be_larger_than_its_standard_error():
    def passed(after: float) -> bool:
        found = evaluation(base={"new": score(4.0)}, candidate={"new": score(after)}, stderr=0.1)
        return outcome(found, {"min_gain": {}})["passed"]

    assert [passed(after) for after in (3.89, 3.9, 3.95)] == [True, False, False]


@pytest.mark.parametrize(("kl", "passed"), [(0.0, True), (0.05, True), (0.051, False), (math.inf, False), (NAN, False)])
def test_predictions_must_not_move_by_more_than_the_bound(kl, passed):
    found = moved(kl)
    assert found["passed"] is passed
    assert (found["metric"], found["against"], found["relative"], found["bound"]) == ("kl", "base", False, 0.05)


def test_drift_is_less_its_standard_errors():
    found = moved(0.06, standard_errors=1)
    assert (found["before"], found["after"], found["value"], found["stderr"]) == (0.0, 0.06, 0.06, 0.01)
    assert found["passed"]
    assert not moved(0.06, standard_errors=0.9)["passed"]
    assert not moved(0.06, standard_errors=9, stderr=None)["passed"]


def test_self_written_text_counts_by_its_divergence_only():
    found = evaluation(
        base={"anchor": score(2.0)}, candidate={"anchor": score(2.0)}, kl={"anchor": 0.01, "written": 0.2}
    )
    rules = decided(found, GateRules())["rules"]
    assert [(rule["subject"], rule["passed"]) for rule in rules] == [("anchor", True), ("written", False)]
    rules = decided(found, GateRules.from_parameters({"max_drift": {"metric": "loss"}}))["rules"]
    assert [rule["subject"] for rule in rules] == ["anchor"]


def test_divergence_cannot_be_hidden_by_a_loss_that_fell():
    found = evaluation(base={"anchor": score(2.0)}, candidate={"anchor": score(1.5)}, kl={"anchor": 0.3})
    assert outcome(found, {"max_drift": {"metric": "loss"}})["passed"]
    assert not outcome(found, {"max_drift": {}})["passed"]


@pytest.mark.parametrize("missing", [{"drift": {"base": {"anchor": None}}}, {"drift": {}}])
def test_divergence_that_was_not_measured_is_refused_with_the_remedy(missing):
    found = evaluation(base={"anchor": score(2.0)}, candidate={"anchor": score(2.0)}) | missing
    with pytest.raises(ValueError, match="max_drift is on the KL of anchor, which was not.*Give max_drift the metric"):
        decided(found, GateRules())


@pytest.mark.parametrize(
    ("given", "metric", "bound", "relative"),
    [
        ({}, "kl", 0.05, False),
        ({"bound": 0.1}, "kl", 0.1, False),
        ({"metric": "loss"}, "loss", 0.02, True),
        ({"metric": "accuracy", "relative": False, "bound": 0.1}, "accuracy", 0.1, False),
        ({"relative": True}, "loss", 0.02, True),
        ({"relative": "true", "bound": 0.03}, "loss", 0.03, True),
        ({"metric": "loss", "standard_errors": 0.0, "bound": 0.02, "relative": True}, "loss", 0.02, True),
    ],
)
def test_drift_of_a_score_keeps_its_own_defaults(given, metric, bound, relative):
    rule = GateRules.from_parameters({"max_drift": given}).max_drift
    assert (rule.metric, rule.bound, rule.relative, rule.standard_errors) == (metric, bound, relative, 0.0)


@pytest.mark.parametrize(("after", "passed"), [(4.08, True), (4.081, False), (3.0, True), (NAN, False)])
def test_drift_must_not_exceed_its_bound(after, passed):
    assert drift(4.0, after, bound=0.02)["passed"] is passed


def test_rounding_does_not_decide_a_tie():
    assert 0.90 - 0.88 > 0.02
    assert drift(0.90, 0.88, metric="accuracy", relative=False, bound=0.02)["passed"]
    assert 0.3 - 0.1 < 0.2
    assert gain(0.1, 0.3, metric="accuracy", relative=False, bound=0.2)["passed"]


def test_gain_is_less_its_standard_errors():
    # (4 - 3) / 4 = 0.25, less z 0.1 / 4
    assert gain(4.0, 3.0, bound=0.2, standard_errors=2)["passed"]
    assert not gain(4.0, 3.0, bound=0.2, standard_errors=2.1)["passed"]


def test_loss_is_less_its_standard_errors():
    # (4.2 - 4) / 4 = 0.05, less z 0.025
    assert drift(4.0, 4.2, bound=0.02, standard_errors=1.2)["passed"]
    assert not drift(4.0, 4.2, bound=0.02, standard_errors=1.1)["passed"]


def test_unknown_standard_error_never_helps_to_pass():
    assert gain(4.0, 1.0, stderr=None)["passed"]
    assert not gain(4.0, 1.0, stderr=None, standard_errors=1)["passed"]
    found = evaluation(base={"anchor": score(4.0)}, candidate={"anchor": score(4.2)}, stderr=None)
    assert not outcome(found, {"max_drift": {"metric": "loss", "standard_errors": 9}})["passed"]


def test_no_standard_error_at_all_is_certain():
    assert gain(4.0, 3.0, stderr=0.0, bound=0.25, standard_errors=3)["passed"]


@pytest.mark.parametrize(
    ("found", "value", "passed"),
    [
        (gain(0.0, 0.5, metric="accuracy"), math.inf, True),
        (gain(0.0, 0.0, metric="accuracy"), 0.0, False),
        (drift(0.0, 0.0), 0.0, True),
        (drift(0.0, 0.1), math.inf, False),
    ],
)
def test_any_change_from_zero_is_relatively_infinite(found, value, passed):
    assert (found["value"], found["passed"]) == (value, passed)


def test_gain_is_against_the_champion_and_drift_against_the_base_model():
    found = evaluation(
        base={"new": score(8.0), "anchor": score(2.0)},
        champion={"new": score(4.0), "anchor": score(4.0)},
        candidate={"new": score(3.0), "anchor": score(3.0)},
    )
    learned, drifted = decided(found, GateRules.from_parameters({"max_drift": {"metric": "loss"}}))["rules"]
    assert (learned["against"], learned["value"]) == ("champion", 0.25)
    assert (drifted["against"], drifted["value"]) == ("base", 0.5)


def forgotten(history: list[MeasuredVersion], *, after: float = 2.2, champion: float = 2.1, **keys: Any) -> dict:
    found = evaluation(
        base={"earlier": score(3.0)}, champion={"earlier": score(champion)}, candidate={"earlier": score(after)}
    )
    return outcome(found, {"max_forgetting": keys}, history=history)


def version(number: int, task: str, loss: float | None, stderr: float | None = 0.1) -> MeasuredVersion:
    return MeasuredVersion(number, task, {"earlier": {"loss": loss, "loss_stderr": stderr}})


CHAMPION = version(9, "last", 2.1)


def test_forgetting_is_measured_from_the_best_version_since_the_task_was_learned():
    history = [version(1, "earlier", 2.0), version(2, "other", 2.05), CHAMPION]
    found = forgotten(history, standard_errors=0)
    assert (found["against"], found["before"], found["after"]) == ("version 1", 2.0, 2.2)
    assert found["value"] == pytest.approx(0.1)
    assert found["stderr"] == pytest.approx(math.sqrt(0.02) / 2.0), "two independent measurements"


def test_what_a_version_scored_before_the_task_was_learned_is_not_forgotten():
    found = forgotten([version(1, "other", 1.0), version(2, "earlier", 2.0), CHAMPION], standard_errors=0)
    assert found["against"] == "version 2"


def test_champion_counts_as_it_is_measured_now():
    found = forgotten([version(1, "earlier", 2.3), version(9, "last", 1.0)], standard_errors=0)
    assert (found["against"], found["before"]) == ("champion", 2.1)
    assert found["stderr"] == pytest.approx(0.1 / 2.1), "paired"


def test_a_better_but_uncertain_version_does_not_hide_what_was_surely_lost():
    # champion 2.1, paired error 0.1: 0.3 - 0.1; version 1 2.05, its own 0.5: 0.35 - 0.51
    history = [version(1, "earlier", 2.05, stderr=0.5), CHAMPION]
    assert forgotten(history, after=2.4, standard_errors=0)["against"] == "version 1"
    assert forgotten(history, after=2.4, standard_errors=1)["against"] == "champion"


def test_what_was_not_measured_of_a_version_is_passed_over():
    history = [version(1, "earlier", None), version(2, "a", NAN), MeasuredVersion(3, "b", {}), CHAMPION]
    assert forgotten(history)["against"] == "champion"


def test_nan_of_the_champion_or_the_candidate_is_never_forgiven():
    history = [version(1, "earlier", 2.0), CHAMPION]
    assert not forgotten(history, champion=NAN, standard_errors=0)["passed"]
    assert not forgotten(history, after=NAN)["passed"]
    assert not forgotten([version(1, "earlier", 2.0, stderr=NAN), CHAMPION], after=2.0, standard_errors=1)["passed"]


def test_task_that_is_remembered_better_than_ever_passes():
    found = forgotten([version(1, "earlier", 2.0), CHAMPION], after=1.5, bound=0)
    assert found["value"] == -0.25
    assert found["passed"]


def benchmark(before: float, after: float, *, stderr: float | None = 0.03, higher: bool = True, **keys: Any) -> dict:
    found = evaluation(base={}, candidate={}) | {
        "benchmarks": {
            "tasks": {"arc": {"metric": "acc", "higher_is_better": higher, "num_samples": 9}},
            "results": {
                "base": {"arc": {"value": before, "stderr": 0.04}},
                "candidate": {"arc": {"value": after, "stderr": stderr}},
            },
        }
    }
    return outcome(found, {"max_benchmark_regression": keys})


def test_benchmark_regression_has_both_standard_errors():
    found = benchmark(0.5, 0.4375)
    assert (found["metric"], found["value"]) == ("acc", 0.0625)
    assert found["stderr"] == pytest.approx(0.05)  # 3, 4, 5
    assert found["passed"], "0.0625 - 0.05 <= 0.02"
    assert not benchmark(0.5, 0.4375, standard_errors=0.8)["passed"]


def test_benchmark_without_a_standard_error_is_not_forgiven():
    assert not benchmark(0.5, 0.46, stderr=None)["passed"]


def test_benchmark_where_lower_is_better_regresses_upwards():
    assert benchmark(10.0, 12.0, higher=False)["value"] == 2.0
    assert benchmark(10.0, 9.0, higher=False)["passed"]


def test_accuracy_of_a_set_without_one_is_refused_with_the_remedy():
    found = evaluation(base={"anchor": score(2.0)}, candidate={"anchor": score(2.0)})
    with pytest.raises(ValueError, match="max_drift is on the accuracy of anchor.*Give max_drift the metric 'loss'"):
        decided(found, GateRules.from_parameters({"max_drift": {"metric": "accuracy"}}))


def test_promotion_needs_every_rule_on_every_set():
    before = {"new": score(4.0), "anchor one": score(2.0), "anchor two": score(2.0)}

    def promoted(new: float = 3.0, **moved: float) -> bool:
        after = {"new": score(new), "anchor one": score(2.0), "anchor two": score(2.0)}
        kl = {name.replace("_", " "): value for name, value in moved.items()}
        return decided(evaluation(base=before, candidate=after, kl=kl), GateRules())["promote"]

    assert promoted()
    assert not promoted(new=3.95)
    assert not promoted(anchor_one=0.1)
    assert not promoted(anchor_two=0.1)


def test_reason_names_what_failed_in_one_line():
    before = {"new": score(4.0), "anchor": score(2.0)}
    after = {"new": score(3.0), "anchor": score(2.1)}
    by_loss = GateRules.from_parameters({"max_drift": {"metric": "loss"}})
    found = decided(evaluation(base=before, candidate=after), by_loss)
    assert found["reason"] == "max_drift: anchor lost 5.00% in loss against base, at most 2.00%"
    found = decided(evaluation(base=before, candidate=after, kl={"anchor": 0.0712}), GateRules())
    assert found["reason"] == "max_drift: anchor moved by 0.0712 nats per token (KL) from base, at most 0.05"
    assert decided(evaluation(base=before, candidate=after), GateRules())["reason"] == ""


@pytest.mark.parametrize(
    ("after", "stderr", "reason"),
    [
        (
            3.96,
            0.1,
            "min_gain: nothing more to learn: new gained 1.00% in loss against base, more than 0.00% + 1 x 2.50% "
            "(standard error)",
        ),
        (
            4.04,
            0.1,
            "min_gain: nothing more to learn: new lost 1.00% in loss against base, more than 0.00% + 1 x 2.50% "
            "(standard error)",
        ),
        (
            4.2,
            0.1,
            "min_gain: nothing more to learn at this learning rate: new lost 5.00% in loss against base, more than "
            "0.00% + 1 x 2.50% (standard error)",
        ),
        (
            3.0,
            None,
            "min_gain: one record cannot tell a gain from chance: new gained 25.00% in loss against base, more than "
            "0.00% + 1 x unknown (standard error)",
        ),
        (
            NAN,
            0.1,
            "min_gain: new gained nan% in loss against base, more than 0.00% + 1 x 2.50% (standard error)",
        ),
    ],
)
def test_reason_says_when_there_was_nothing_more_to_learn(after, stderr, reason):
    found = evaluation(base={"new": score(4.0)}, candidate={"new": score(after)}, stderr=stderr)
    assert decided(found, GateRules())["reason"] == reason


def test_reason_says_what_the_standard_error_allows():
    found = evaluation(base={"earlier": score(2.0)}, candidate={"earlier": score(2.5)})
    reason = "max_forgetting: earlier lost 25.00% in loss against base, at most 1.00% + 1 x 5.00% (standard error)"
    assert decided(found, GateRules())["reason"] == reason


def test_rules_that_are_off_do_not_decided():
    found = evaluation(
        base={"new": score(1.0), "anchor": score(1.0)}, candidate={"new": score(9.0), "anchor": score(9.0)}
    )
    assert decided(found, GateRules.from_parameters(OFF)) == {"promote": True, "reason": "", "rules": []}


def test_parameters_go_over_the_defaults_key_by_key():
    rules = GateRules.from_parameters({"min_gain": {"bound": 0.1}, "max_drift": None})
    assert rules.min_gain.bound == 0.1
    assert rules.min_gain.metric == "loss"
    assert rules.max_drift is None
    assert rules.max_forgetting == GateRules().max_forgetting
    assert GateRules.from_parameters(None) == GateRules.from_parameters({}) == GateRules()


def test_rules_are_made_again_from_their_own_parameters():
    given = {"min_gain": {"metric": "accuracy", "bound": 2}, "max_forgetting": None}
    for drift in ({}, {"metric": "loss"}, {"metric": "accuracy", "relative": False}):
        rules = GateRules.from_parameters(given | {"max_drift": drift})
        assert GateRules.from_parameters(json.loads(json.dumps(rules.to_parameters()))) == rules


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"min_gains": {}}, "unknown gate rule 'min_gains'. Did you mean 'min_gain'?"),
        ({"min_gain": {"limit": 1}}, "min_gain: unknown key of a gate rule 'limit'. Known are: bound, relative"),
        (
            {"max_benchmark_regression": {"metric": "loss"}},
            "regression: unknown key of a gate rule 'metric'",
        ),
        ({"min_gain": {"metric": "f1"}}, "min_gain: metric must be 'loss' | 'accuracy', got 'f1'"),
        ({"min_gain": {"metric": "kl"}}, "min_gain: metric must be 'loss' | 'accuracy', got 'kl'"),
        ({"max_drift": {"metric": None}}, "max_drift: metric must be 'kl' | 'loss' | 'accuracy', got None"),
        ({"max_drift": {"metric": "kl", "relative": True}}, "cannot be true of the metric kl, which has no value"),
        ({"max_drift": {"bound": -0.1}}, "max_drift: bound must be at least 0, got -0.1"),
        ({"max_drift": {"bound": "2%"}}, "max_drift: bound must be float, got '2%'"),
        ({"max_drift": {"bound": NAN}}, "max_drift: bound must be at least 0, got nan"),
        ({"max_drift": {"bound": math.inf}}, "max_drift: bound must be at least 0, got inf"),
        ({"max_drift": {"bound": True}}, "max_drift: bound must be float, got True"),
        ({"max_drift": {"standard_errors": -1}}, "max_drift: standard_errors must be at least 0"),
        ({"max_drift": {"relative": 1}}, "max_drift: relative must be bool, got 1"),
        ({"min_gain": {"bound": 1}}, "min_gain: bound is 1.0: no loss can fall by its whole"),
        ({"min_gain": 0.1}, "min_gain must be {bound, relative, standard_errors, metric} | None, got 0.1"),
        (["min_gain"], "gate must hold rules"),
    ],
)
def test_what_cannot_be_a_rule_is_refused(given, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        GateRules.from_parameters(given)
