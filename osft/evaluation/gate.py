"""Did the candidate learn enough, and forget little enough?"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRules:
    """Bounds on relative changes of loss, candidate against base."""

    min_task_improvement: float = 0.05
    """The new task's loss must fall by at least this share of the base model's."""
    max_anchor_increase: float = 0.02
    """No anchor's loss may rise by more than this share of the base model's."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_task_improvement < 1:
            raise ValueError(f"min_task_improvement must be in [0, 1), got {self.min_task_improvement!r}")
        if self.max_anchor_increase < 0:
            raise ValueError(f"max_anchor_increase must be at least 0, got {self.max_anchor_increase!r}")


@dataclass(frozen=True, slots=True)
class RuleResult:
    """One rule's number, bound and outcome."""

    name: str
    value: float
    """Relative change of loss: -0.2 is 20 % lower."""
    bound: float
    comparison: str
    passed: bool
    detail: str


def decide(
    sets: dict[str, dict[str, Any]], results: dict[str, dict[str, dict[str, Any]]], rules: GateRules
) -> dict[str, Any]:
    """The decision record: `promote`, and each rule with its number and bound.

    `sets[name]["role"]` is "new task" or "anchor"; `results["base" | "candidate"][name]["loss"]` are the losses.
    """
    outcomes = []
    for name, described in sets.items():
        before, after = results["base"][name]["loss"], results["candidate"][name]["loss"]
        change = after / before - 1
        is_task = described["role"] == "new task"
        bound = -rules.min_task_improvement if is_task else rules.max_anchor_increase
        outcomes.append(
            RuleResult(
                name=f"loss of the new task {name}" if is_task else f"loss of the anchor {name}",
                value=change,
                bound=bound,
                comparison="at most",
                passed=change <= bound,  # false for NaN
                detail=f"{before:.4f} -> {after:.4f}",
            )
        )
    return {"promote": all(outcome.passed for outcome in outcomes), "rules": [asdict(o) for o in outcomes]}
