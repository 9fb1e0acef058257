"""Did the candidate learn something, and forget little enough?

    min_gain                   the new task improved by at least `bound` (of 0: by more than that) over the reference:
                               the champion, or the base model where there is none
    max_forgetting             no earlier task is worse by more than `bound` than after any round since it was learned,
                               and than the reference is now
    max_drift                  on no anchor, and not on what the base model wrote itself, have the predictions moved
                               from the base model's by more than `bound` nats per token (metric "kl"); or no anchor's
                               loss or accuracy is worse than the base model's by more than `bound`. Against the base
                               model, so that small drifts do not add up over rounds
    max_benchmark_regression   no public benchmark is worse by more than `bound` than the reference's

A rule compares what was gained or lost, less `standard_errors` times its standard error: min_gain then asks for a gain
that is not chance, the others forgive a loss that may be. An unknown standard error never helps to pass. What is NaN
never passes.

By default a round is promoted that gained beyond its standard error and lost nothing beyond it, whether the task is new
or more of what the champion knows; 1 % of an earlier task's loss and 0.05 nats of drift are allowed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from osft.evaluation.record import Decision, Evaluation, RuleOutcome
from osft.settings.base import Settings
from osft.settings.values import Boolean, Number, boolean

KL: Final = "kl"
"""The metric of max_drift alone: KL(base || candidate), see `osft.evaluation.drift`."""
_ROUNDING = 1e-9
"""What a number may lie beyond its bound: 0.90 - 0.88 is more than 0.02 to a computer."""


class Bound(Settings):
    """A bound on a gain or a loss."""

    kind = "key of a gate rule"
    bound: Annotated[Number, Field(ge=0)]
    relative: Boolean = True
    """Whether the bound is a share of the value before, or in the metric's own unit, as "kl" always is."""
    standard_errors: Annotated[Number, Field(ge=0)] = 0.0
    """How many standard errors the gain must be above its bound, or a loss may be."""


class MinGain(Bound):
    """Of the new task."""

    metric: Literal["loss", "accuracy"] = "loss"
    bound: Annotated[Number, Field(ge=0)] = 0.0
    standard_errors: Annotated[Number, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _can_be_reached(self) -> Self:
        if self.relative and self.metric == "loss" and self.bound >= 1:
            raise ValueError(f"bound is {self.bound!r}: no loss can fall by its whole. Give less than 1")
        return self


class MaxForgetting(Bound):
    """Of each earlier task."""

    metric: Literal["loss", "accuracy"] = "loss"
    bound: Annotated[Number, Field(ge=0)] = 0.01
    standard_errors: Annotated[Number, Field(ge=0)] = 1.0


class MaxDrift(Bound):
    """Of each anchor, and by "kl" of what the base model wrote itself.

    By loss or accuracy, or `relative`, which only these can be, the bound is a share of 2 % unless another is given.
    """

    metric: Literal["kl", "loss", "accuracy"] = KL
    bound: Annotated[Number, Field(ge=0)] = 0.05
    relative: Boolean = False

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_metric(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        metric = given.get("metric", "loss" if boolean(given.get("relative")) else KL)
        return {"metric": metric, **({} if metric == KL else {"bound": 0.02, "relative": True}), **given}

    @model_validator(mode="after")
    def _kl_is_absolute(self) -> Self:
        if self.metric == KL and self.relative:
            raise ValueError(
                f"relative cannot be true of the metric {KL}, which has no value before. Give the metric loss or "
                "accuracy, or leave it out"
            )
        return self


class MaxBenchmarkRegression(Bound):
    """Of each public benchmark, in the metric that it has."""

    bound: Annotated[Number, Field(ge=0)] = 0.02
    relative: Boolean = False
    standard_errors: Annotated[Number, Field(ge=0)] = 1.0


def _false_is_off(given: Any) -> Any:
    """A form's word for a rule that is off; None, too, which kfp.local cannot hand on."""
    return None if boolean(given) is False else given


_Off = BeforeValidator(_false_is_off)


class GateRules(Settings):
    """What decides on promotion: the default rules, changed key by key, as by `{"min_gain": {"bound": 0.1}}`.

    False or None turns a rule off. Raises ValueError that names the rule and the key for what is unknown or cannot be.
    """

    kind = "gate rule"
    min_gain: Annotated[MinGain | None, _Off] = MinGain()
    max_forgetting: Annotated[MaxForgetting | None, _Off] = MaxForgetting()
    max_drift: Annotated[MaxDrift | None, _Off] = MaxDrift()
    max_benchmark_regression: Annotated[MaxBenchmarkRegression | None, _Off] = MaxBenchmarkRegression()

    @classmethod
    def from_parameters(cls, given: Mapping[str, Any] | None) -> "GateRules":
        """The rules of a pipeline's parameter; None are the default ones."""
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f"gate must hold rules, {{rule: {{key: value}}}}, got {given!r}")
        try:
            return cls(**(given or {}))
        except ValueError as error:
            raise ValueError(f"gate: {error}") from None

    def to_parameters(self) -> dict[str, Any]:
        """The rules as `from_parameters` takes them."""
        return {name: False if rule is None else rule for name, rule in self.to_dict().items()}


class MeasuredVersion(NamedTuple):
    """A version of the champion's history, with what was measured of it."""

    version: int
    task: str
    """What its round learned."""
    scores: Mapping[str, Mapping[str, float | None]]
    """Set -> "loss", "loss_stderr", "accuracy", "accuracy_stderr"; what was not measured is None or absent."""


_OnScores = MinGain | MaxForgetting | MaxDrift


class _Before(NamedTuple):
    """A value that the candidate's is compared with."""

    against: str
    value: float
    change_stderr: float | None
    """Standard error of the candidate's value minus this one."""


def decide(evaluation: Evaluation, rules: GateRules, *, history: Sequence[MeasuredVersion] = ()) -> Decision:
    """Whether the candidate is promoted, with the numbers of each rule on each set or benchmark.

    history: the versions that the champion comes from, the oldest first, it itself the last (which counts as measured
    now).

    An earlier task is compared with each version since it was learned; the one against which the candidate lost most,
    less the standard errors, is reported. The reference is measured on the same records now, so its standard error is
    that of the paired difference; that of another version is the root of the sum of both squared errors. A share's
    standard error takes the value before as exact.

    Raises ValueError for a rule on an accuracy or a drift that was not measured.
    """
    outcomes = tuple(_outcomes(evaluation, rules, history))
    failed = [outcome for outcome in outcomes if not outcome.passed]
    return Decision(promote=not failed, reason="; ".join(map(_sentence, failed)), rules=outcomes)


def _outcomes(evaluation: Evaluation, rules: GateRules, history: Sequence[MeasuredVersion]) -> Iterator[RuleOutcome]:
    reference = evaluation.reference
    if reference == "champion":
        history = history[:-1]
    names: dict[str, list[str]] = {}
    for name, described in evaluation.sets.items():
        names.setdefault(described.role, []).append(name)
    if rules.min_gain:
        for name in names.get("new task", []):
            before = _measured_now(evaluation, "min_gain", rules.min_gain, name, reference)
            after = _after(evaluation, rules.min_gain, name)
            yield _outcome("min_gain", rules.min_gain, rules.min_gain.metric, name, before, after)
    if rules.max_forgetting:
        for name in names.get("earlier task", []):
            rule = rules.max_forgetting
            candidates = [_measured_now(evaluation, "max_forgetting", rule, name, reference)]
            candidates += _measured_then(evaluation, rule, name, history)
            after = _after(evaluation, rule, name)
            compared = [_outcome("max_forgetting", rule, rule.metric, name, before, after) for before in candidates]
            yield max(compared, key=_certain_loss)
    if rules.max_drift:
        yield from _drift_outcomes(evaluation, rules.max_drift, names)
    if rules.max_benchmark_regression and evaluation.benchmarks:
        results = evaluation.benchmarks.results
        for name, task in evaluation.benchmarks.tasks.items():
            was, now = results[reference][name], results["candidate"][name]
            yield _outcome(
                "max_benchmark_regression",
                rules.max_benchmark_regression,
                task.metric,
                name,
                _Before(reference, was.value, _root_of_squares(was.stderr, now.stderr)),
                now.value,
                higher=task.higher_is_better,
            )


def _drift_outcomes(
    evaluation: Evaluation, rule: MaxDrift, names: Mapping[str, Sequence[str]]
) -> Iterator[RuleOutcome]:
    """The rule max_drift on the sets that it applies to; `names` of these by role."""
    if rule.metric != KL:
        for name in names.get("anchor", []):
            before = _measured_now(evaluation, "max_drift", rule, name, "base")
            yield _outcome("max_drift", rule, rule.metric, name, before, _after(evaluation, rule, name))
        return
    for name in (*names.get("anchor", []), *names.get("self-written", [])):
        drift = evaluation.drift.get("base", {}).get(name)
        if drift is None:
            raise ValueError(
                f"the gate's rule max_drift is on the KL of {name}, which was not measured: base and candidate read it "
                "as different tokens, or an earlier release evaluated them. Give max_drift the metric 'loss'"
            )
        yield _outcome("max_drift", rule, KL, name, _Before("base", 0.0, drift.stderr), drift.kl)


def _measured_now(evaluation: Evaluation, name: str, rule: _OnScores, subject: str, model: str) -> _Before:
    """A model of this evaluation on a set."""
    change = getattr(evaluation.changes[model][subject], rule.metric)
    if change is None:
        raise ValueError(
            f"the gate's rule {name} is on the {rule.metric} of {subject}, which has none: its records need choices, "
            f"or short answers. Give {name} the metric 'loss', or other records"
        )
    return _Before(model, getattr(evaluation.results[model][subject], rule.metric), change.stderr)


def _measured_then(
    evaluation: Evaluation, rule: _OnScores, subject: str, history: Sequence[MeasuredVersion]
) -> Iterator[_Before]:
    """The versions on a set, from the one on that learned it."""
    stderr = f"{rule.metric}_stderr"
    now = getattr(evaluation.results["candidate"][subject], stderr)
    learned = False
    for version, task, scores in history:
        learned = learned or task == subject
        value = scores.get(subject, {}).get(rule.metric)
        if learned and value is not None and math.isfinite(value):
            error = _root_of_squares(scores[subject].get(stderr), now)
            yield _Before(f"version {version}", value, error)


def _after(evaluation: Evaluation, rule: _OnScores, subject: str) -> float:
    value: float = getattr(evaluation.results["candidate"][subject], rule.metric)
    return value


def _outcome(
    name: str, rule: Bound, metric: str, subject: str, before: _Before, after: float, *, higher: bool | None = None
) -> RuleOutcome:
    """One rule's numbers and whether they pass."""
    higher = metric == "accuracy" if higher is None else higher
    is_gain = name == "min_gain"
    value = after - before.value if higher == is_gain else before.value - after
    stderr = before.change_stderr
    if rule.relative:
        whole = abs(before.value)
        value, stderr = _share(value, whole), None if stderr is None or not whole else stderr / whole
    certain = _certain(name, value, stderr, rule.standard_errors)
    if is_gain:
        passed = certain >= rule.bound - _ROUNDING if rule.bound else certain > _ROUNDING
    else:
        passed = certain <= rule.bound + _ROUNDING
    return RuleOutcome(
        rule=name,
        subject=subject,
        metric=metric,
        against=before.against,
        before=before.value,
        after=after,
        value=value,
        stderr=stderr,
        standard_errors=rule.standard_errors,
        relative=rule.relative,
        bound=rule.bound,
        comparison="at most" if not is_gain else "at least" if rule.bound else "more than",
        passed=passed,  # a NaN compares false
    )


def _certain(rule: str, value: float, stderr: float | None, standard_errors: float) -> float:
    """What was gained or lost, less its standard errors."""
    if not standard_errors:
        return value
    if stderr is None:
        return -math.inf if rule == "min_gain" else value
    return value - standard_errors * stderr


def _certain_loss(outcome: RuleOutcome) -> float:
    """`_certain` as a sorting key, by which a NaN is the greatest."""
    certain = _certain(outcome.rule, outcome.value, outcome.stderr, outcome.standard_errors)
    return math.inf if math.isnan(certain) else certain


def _share(part: float, whole: float) -> float:
    """`part / whole`; of zero, as of a whole that vanishes."""
    if whole:
        return part / whole
    return part if part == 0 or math.isnan(part) else math.copysign(math.inf, part)


def _root_of_squares(*stderrs: float | None) -> float | None:
    """Standard error of the difference of independent values; None if one is unknown."""
    known = [stderr for stderr in stderrs if stderr is not None]
    return math.hypot(*known) if len(known) == len(stderrs) else None


def _sentence(outcome: RuleOutcome) -> str:
    """Why a rule failed."""
    unit = "{:.2%}" if outcome.relative else "{:.4g}"
    rule, subject, against, value = outcome.rule, outcome.subject, outcome.against, outcome.value
    errors = ""
    if outcome.standard_errors:
        stderr = "unknown" if outcome.stderr is None else unit.format(outcome.stderr)
        errors = f" + {outcome.standard_errors:g} x {stderr} (standard error)"
    bound = f"{outcome.comparison} {unit.format(outcome.bound)}{errors}"
    if outcome.metric == KL:
        return f"{rule}: {subject} moved by {unit.format(value)} nats per token (KL) from {against}, {bound}"
    verb = "lost" if (rule == "min_gain") == (value < 0) else "gained"
    measured = f"{subject} {verb} {unit.format(abs(value))} in {outcome.metric} against {against}"
    if rule == "min_gain" and not outcome.bound and not math.isnan(value):
        return f"{rule}: {_without_gain(outcome)}: {measured}, {bound}"
    return f"{rule}: {measured}, {bound}"


def _without_gain(outcome: RuleOutcome) -> str:
    """Why the gain on the new task is not one."""
    if outcome.standard_errors and outcome.stderr is None:
        return "one record cannot tell a gain from chance"
    lost_more = -outcome.value > outcome.standard_errors * (outcome.stderr or 0.0)
    return "nothing more to learn at this learning rate" if lost_more else "nothing more to learn"
