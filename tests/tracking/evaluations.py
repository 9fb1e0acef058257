"""What `evaluation.json` holds, without a model."""


def scores(loss: float, accuracy: float | None) -> dict:
    return {"loss": loss, "loss_stderr": 0.1, "accuracy": accuracy, "accuracy_stderr": None, "num_samples": 10}


def change(before: float | None, after: float | None) -> dict | None:
    if before is None or after is None:
        return None
    return {"change": after - before, "relative": (after - before) / before, "stderr": 0.01}


def an_evaluation(*, refused: bool = False, anchors: int = 1) -> dict:
    """Of a round that started from version 2."""
    sets = {"general text": {"role": "anchor"}, "mails": {"role": "earlier task"}, "film-reviews": {"role": "new task"}}
    sets |= {f"anchor {number}": {"role": "anchor"} for number in range(1, anchors)}
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
        "value": 0.25,
        "relative": True,
        "bound": 0.05,
        "comparison": "at most",
        "passed": not refused,
    }
    return {
        "task": "film-reviews",
        "models": {"base": {"path": "/storage/models/small-llama"}, "champion": {"path": "/c"}, "candidate": {}},
        "reference": "champion",
        "sets": sets,
        "results": {"base": before, "champion": before, "candidate": after},
        "changes": {"champion": changes},
        "benchmarks": {
            "tasks": {"arc_easy": {"metric": "acc", "higher_is_better": True, "num_samples": 9}},
            "results": {"champion": {"arc_easy": {"value": 0.5}}, "candidate": {"arc_easy": {"value": 0.25}}},
        },
        "matrix": {
            "rounds": [{"task": "mails", "version": 2}, {"task": "film-reviews", "version": None}],
            "metrics": {"loss": {"backward_transfer": -0.125, "average_forgetting": None}},
        },
        "decision": {"promote": not refused, "reason": "mails got worse" if refused else "", "rules": [rule]},
    }
