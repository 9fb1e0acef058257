"""The gate's rules in words."""

import math
from dataclasses import dataclass

from osft.evaluation.gate import KL
from osft.evaluation.record import Decision, RuleOutcome
from osft.evaluation.report.formats import format_number, format_percent

NAMES = {
    "min_gain": "Gain on the new task",
    "max_forgetting": "Forgetting",
    "max_drift": "Drift of general ability",
    "max_benchmark_regression": "Benchmark regression",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleInWords:
    """One row of the decision's table."""

    name: str
    rule: str
    """Its name in the parameter `gate`."""
    subject: str
    metric: str
    against: str
    before: str
    after: str
    measured: str
    compared: str
    """What is held against the bound where that is not the measured value itself; else empty."""
    bound: str
    passed: bool


def rules_in_words(decision: Decision) -> list[RuleInWords]:
    """The rules of `decision`: failed ones first, then as in `NAMES`."""
    rules = [_in_words(rule) for rule in decision.rules]
    order = list(NAMES)
    return sorted(rules, key=lambda rule: (rule.passed, order.index(rule.rule) if rule.rule in order else len(order)))


def _in_words(rule: RuleOutcome) -> RuleInWords:
    gain, name, value, errors = rule.rule == "min_gain", rule.rule, rule.value, rule.standard_errors
    compared = value - errors * (rule.stderr or 0)
    measured = _movement(value, rule)
    if rule.stderr is not None:
        measured += f" ± {_amount(rule.stderr, rule.relative)}"
    beyond = f"{_movement(compared, rule)}, {errors:g} standard error{'s' * (errors != 1)} taken off"
    verb = "move" if rule.metric == KL else "gain" if gain else "lose"
    return RuleInWords(
        name=NAMES.get(name, name),
        rule=name,
        subject=rule.subject,
        metric=rule.metric,
        against=rule.against,
        before=format_number(rule.before, 4),
        after=format_number(rule.after, 4),
        measured=measured,
        compared="" if not errors else "with an unknown standard error" if rule.stderr is None else beyond,
        bound=f"{verb} {rule.comparison} {_amount(rule.bound, rule.relative)}",
        passed=rule.passed,
    )


def _movement(value: float, rule: RuleOutcome) -> str:
    """`gained 37.50 %`; `value` is what was gained in min_gain, what was lost in the others, and may be negative."""
    if math.isnan(value):
        return "not a number"
    if rule.metric == KL:
        return f"moved by {_amount(value, rule.relative)}"
    gained = (rule.rule == "min_gain") == (value >= 0)
    return f"{'gained' if gained else 'lost'} {_amount(abs(value), rule.relative)}"


def _amount(value: float, relative: bool) -> str:
    return format_percent(value, 2) if relative else format_number(value, 4)
