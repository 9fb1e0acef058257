"""What `evaluation.json` holds, without a model."""

from typing import Any

from osft.evaluation.record import Evaluation


def scores(loss: float, accuracy: float | None) -> dict:
    measured = {"loss": loss, "loss_stderr": 0.1, "accuracy": accuracy, "accuracy_stderr": None, "num_samples": 10}
    return measured | {"perplexity": 1.0, "num_loss_tokens": 20, "accuracy_kind": None}


def change(before: float | None, after: float | None) -> dict | None:
    if before is None or after is None:
        return None
    return {"change": after - before, "relative": (after - before) / before, "stderr": 0.01}


def an_evaluation(*, refused: bool = False, anchors: int = 1, **changes: Any) -> Evaluation:
    """Of a round that started from version 2; `changes`: other plain values of some fields."""
    return Evaluation.from_dict(plain_evaluation(refused=refused, anchors=anchors) | changes, "evaluation.json")


def plain_evaluation(*, refused: bool = False, anchors: int = 1) -> dict:
    sets: dict[str, Any] = {
        "general text": {"role": "anchor"},
        "mails": {"role": "earlier task"},
        "film-reviews": {"role": "new task"},
    }
    sets |= {f"anchor {number}": {"role": "anchor"} for number in range(1, anchors)}
    for name, described in sets.items():
        described |= {"source": f"{name}.jsonl", "num_samples": 10, "notes": []}
    before = {name: scores(2.0, 0.5 if described["role"] != "anchor" else None) for name, described in sets.items()}
    after = {name: scores(1.5, 0.75 if described["role"] != "anchor" else None) for name, described in sets.items()}
    changes = {
        name: {metric: change(before[name][metric], after[name][metric]) for metric in ("loss", "accuracy")}
        for name in sets
    }
    rule = {
        "rule": "max_forgetting",
        "subject": "mails",
        "metric": "loss",
        "before": 2.0,
        "after": 2.5,
        "against": "champion",
        "value": 0.25,
        "stderr": 0.01,
        "standard_errors": 1.0,
        "relative": True,
        "bound": 0.05,
        "comparison": "at most",
        "passed": not refused,
    }
    loss = {"baseline": [2.0, 2.0], "rows": [[1.0, 2.0], [1.5, 1.5]], "forgetting": {}, "average_forgetting": None}
    loss |= {"average_accuracy": -1.5, "learning_accuracy": -1.25, "backward_transfer": -0.125, "forward_transfer": 0.0}
    return {
        "task": "film-reviews",
        "created": "2026-11-22T18:00:00+00:00",
        "models": {
            "base": {"path": "/storage/models/small-llama"},
            "champion": {"path": "/c"},
            "candidate": {"path": "/d"},
        },
        "reference": "champion",
        "sets": sets,
        "results": {"base": before, "champion": before, "candidate": after},
        "changes": {"champion": changes},
        "benchmarks": {
            "tasks": {"arc_easy": {"metric": "acc", "higher_is_better": True, "num_samples": 9}},
            "results": {
                "champion": {"arc_easy": {"value": 0.5, "stderr": None}},
                "candidate": {"arc_easy": {"value": 0.25, "stderr": None}},
            },
        },
        "matrix": {
            "rounds": [{"task": "mails", "version": 2}, {"task": "film-reviews", "version": None}],
            "metrics": {"loss": loss},
            "anchors": {},
        },
        "examples": [],
        "decision": {"promote": not refused, "reason": "mails got worse" if refused else "", "rules": [rule]},
    }
