"""Inputs of a report: rounds with realistic numbers, their matrix computed by the functions that a round uses."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from osft.evaluation import matrix as measures
from osft.evaluation.record import Evaluation
from osft.evaluation.report import render_report
from osft.models.training_summary import TrainingSummary, WeightSummary
from osft.subspace.factor_set import FORMAT, FactorSet, load_factor_set
from osft.subspace.factor_summary import summarized

TASKS = ("sarcasm-headlines", "science-questions", "film-reviews")
ANCHORS = ("web-text", "code-comments")
SELF_WRITTEN = "self-written text"
SCRIPT = "<script>alert(1)</script>"


def rendered(evaluation: dict[str, Any], **inputs: Any) -> str:
    """The page of inputs as they are in a round's files."""
    if training := inputs.get("training"):
        inputs = inputs | {"training": a_summary(training)}
    if factors := inputs.get("factors"):
        inputs = inputs | {"factors": summarized(factors)}
    return render_report(an_evaluation(evaluation), **inputs)


def a_summary(plain: dict[str, Any]) -> TrainingSummary:
    """The record of what `new_training` gave."""
    return TrainingSummary.from_dict(plain, "training.json")


def an_evaluation(plain: dict[str, Any]) -> Evaluation:
    """The record of what `new_evaluation` gave."""
    return Evaluation.from_dict(plain, "evaluation.json")


def a_weight(**changes: Any) -> WeightSummary:
    """What training says of a square weight of 8 rows."""
    layout = {"unfrozen": 4, "frozen": 4, "weight_norm": 4.0, "update_norm": 1.0, "effective_rank": 2.0}
    return WeightSummary(shape=(8, 8), **layout | changes)


def new_evaluation(rounds: int = 1, *, benchmarks: bool = False) -> dict[str, Any]:
    """`evaluation.json` of the last of some rounds, promoted if they are few.

    The first round has no champion and no matrix.
    """
    tasks = [TASKS[i] if i < len(TASKS) else f"domain-{i + 1}" for i in range(rounds)]
    models = {"base": {"path": "/models/base", "version": None}, "candidate": {"path": "/runs/3/out", "version": None}}
    if rounds > 1:
        models = {"base": models["base"], "champion": {"path": "/models/champion", "version": rounds - 1}} | models
    reference = "champion" if rounds > 1 else "base"
    sets = {name: _set("anchor", name) for name in ANCHORS} | {task: _set("earlier task", task) for task in tasks}
    sets[tasks[-1]]["role"] = "new task"
    sets[SELF_WRITTEN] = _set("self-written", "written")
    rows = [[loss(task, after) for task in range(rounds)] for after in range(-1, rounds)]
    drifts = {
        name: [3.4 * (1 + 0.002 * (i + 1) * (after + 1)) for after in range(-1, rounds)]
        for i, name in enumerate(ANCHORS)
    }
    results = {
        model: {name: _score(losses[after + 1]) for name, losses in drifts.items()}
        | {task: _score(rows[after + 1][i], accuracy(i, after)) for i, task in enumerate(tasks)}
        for model, after in {"base": -1, "champion": rounds - 2, "candidate": rounds - 1}.items()
        if model in models
    }
    changes = {
        model: {name: _changes(before, results["candidate"][name]) for name, before in results[model].items()}
        for model in models
        if model != "candidate"
    }
    drift = {
        model: {
            name: {"kl": 0.005 * i, "stderr": 0.0005 * i, "num_tokens": 350, "dtype": "float32"}
            for i, name in enumerate(sets, 1)
        }
        for model in models
        if model != "candidate"
    }
    evaluation: dict[str, Any] = {
        "task": tasks[-1],
        "created": "2026-11-22T18:00:00+00:00",
        "models": models,
        "reference": reference,
        "sets": sets,
        "results": results,
        "changes": changes,
        "drift": drift,
        "benchmarks": _benchmarks(models) if benchmarks else None,
        "matrix": _matrix(tasks, rows, drifts) if rounds > 1 else None,
        "decision": _decision(sets, changes, results, drift["base"], reference),
        "examples": [
            {
                "set": task,
                "prompt": f"Is this headline sarcastic? “Area man wins {i + 3} raffles”\nOne word, please. {SCRIPT}",
                "reference": "sarcastic",
                "answers": dict.fromkeys(models, "serious, I would say, for there is no obvious joke in it")
                | {"candidate": " sarcastic\n"},
            }
            for i, task in enumerate(tasks[-3:])
        ],
    }
    return evaluation


def loss(task: int, after: int) -> float:
    """Loss on a task of the model after a round (-1: the base model): it learns, and then forgets a little."""
    base = 3.2 + 0.4 * math.sin(1.7 * task)
    if after < task:
        return base * (1 - 0.01 * (after + 1) / (task + 1))
    return (
        base * (0.3 + 0.1 * math.cos(task)) * (1 + 0.03 * (after - task) ** 0.5 * (1 + math.sin(3 * task + after) / 2))
    )


def accuracy(task: int, after: int) -> float:
    return round(1 - 0.17 * loss(task, after), 4)


def _set(role: str, name: str) -> dict[str, Any]:
    return {"role": role, "source": f"/data/{name}.jsonl", "num_samples": 100}


def _score(loss: float, accuracy: float | None = None) -> dict[str, Any]:
    known = accuracy is not None
    return {
        "loss": loss,
        "loss_stderr": 0.05 * loss,
        "perplexity": math.exp(loss),
        "num_loss_tokens": 350,
        "num_samples": 100,
        "accuracy": accuracy,
        "accuracy_stderr": 0.05 if known else None,
        "accuracy_kind": "choice" if known else None,
    }


def _changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metric in ("loss", "accuracy"):
        if before[metric] is None:
            found[metric] = None
        else:
            change = after[metric] - before[metric]
            found[metric] = {"change": change, "relative": change / before[metric], "stderr": 0.012}
    return found


def rule(name: str, subject: str, value: float, bound: float, *, passed: bool, **others: Any) -> dict[str, Any]:
    """A row of `decision.rules`."""
    return {
        "rule": name,
        "subject": subject,
        "metric": "loss",
        "against": "base",
        "before": 4.0,
        "after": 4.0 * (1 - value if name == "min_gain" else 1 + value),
        "value": value,
        "stderr": 0.004,
        "standard_errors": 0,
        "relative": True,
        "bound": bound,
        "comparison": "at least" if name == "min_gain" else "at most",
        "passed": passed,
    } | others


def _decision(
    evaluation_sets: dict[str, Any],
    changes: dict[str, Any],
    results: dict[str, Any],
    drift: dict[str, Any],
    reference: str,
) -> dict[str, Any]:
    rules = []
    for name, described in evaluation_sets.items():
        if described["role"] in ("anchor", "self-written"):
            moved = drift[name]
            numbers = {"metric": "kl", "before": 0.0, "after": moved["kl"], "stderr": moved["stderr"]}
            passed = moved["kl"] <= 0.05
            rules.append(rule("max_drift", name, moved["kl"], 0.05, passed=passed, relative=False, **numbers))
            continue
        against = reference
        kind, bound, errors = {
            "new task": ("min_gain", 0.15, 0),
            "earlier task": ("max_forgetting", 0.05, 1),
        }[described["role"]]
        change = changes[against][name]["loss"]
        value = -change["relative"] if kind == "min_gain" else change["relative"]
        numbers = {"before": results[against][name]["loss"], "after": results["candidate"][name]["loss"]}
        compared = value - errors * 0.004
        passed = compared >= bound if kind == "min_gain" else compared <= bound
        found = rule(kind, name, value, bound, passed=passed, against=against, standard_errors=errors)
        rules.append(found | numbers)
    failed = [rule["subject"] for rule in rules if not rule["passed"]]
    return {"promote": not failed, "reason": f"too much lost on {', '.join(failed)}" if failed else "", "rules": rules}


def _benchmarks(models: dict[str, Any]) -> dict[str, Any]:
    tasks = {name: {"metric": "acc", "higher_is_better": True, "num_samples": 400} for name in ("arc_easy", "piqa")}
    scores = {"base": 0.6125, "champion": 0.61, "candidate": 0.605}
    return {
        "tasks": tasks,
        "results": {model: {name: {"value": scores[model], "stderr": 0.0244} for name in tasks} for model in models},
    }


def _matrix(tasks: list[str], losses: list[list[float]], drifts: dict[str, list[float]]) -> dict[str, Any]:
    """Measured is what a round measures: the tasks so far, and the next one with its parent."""
    rounds = len(tasks)
    accuracies = [[accuracy(task, after) for task in range(rounds)] for after in range(-1, rounds)]
    metrics = {}
    for metric, values in {"loss": losses, "accuracy": accuracies}.items():
        rows = [
            [value if task <= after + 1 else None for task, value in enumerate(row)]
            for after, row in enumerate(values[1:])
        ]
        metrics[metric] = block(tasks, values[0], rows, negate=metric == "loss")
    anchors = {name: {"loss": {"baseline": values[0], "values": values[1:]}} for name, values in drifts.items()}
    return {
        "rounds": [{"task": task, "version": i + 1 if i + 1 < rounds else None} for i, task in enumerate(tasks)],
        "metrics": metrics,
        "anchors": anchors,
        "drift": {name: [0.001 * (after + 1) for after in range(rounds)] for name in (*ANCHORS, SELF_WRITTEN)},
    }


def block(tasks: list[str], baseline: Any, rows: list[list[Any]], *, negate: bool) -> dict[str, Any]:
    """One metric of the matrix, with its measures."""
    scores, base = (measures.negated(rows), measures.negated([baseline])[0]) if negate else (rows, baseline)
    return {
        "baseline": list(baseline),
        "rows": rows,
        "average_accuracy": measures.average_accuracy(scores),
        "learning_accuracy": measures.learning_accuracy(scores),
        "backward_transfer": measures.backward_transfer(scores),
        "forward_transfer": measures.forward_transfer(scores, base),
        "average_forgetting": measures.average_forgetting(scores),
        "forgetting": dict(zip(tasks, measures.forgetting(scores), strict=False)),
    }


KINDS = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
)


def new_factors(
    store: Path, *, blocks: int = 3, kinds: tuple[str, ...] = ("self_attn.q_proj", "mlp.up_proj")
) -> FactorSet:
    """Every weight has singular values 4 (frozen) and 3 (unfrozen), norm 5; of seven kinds, 64 falling ones."""
    weights = {}
    (store / "weights").mkdir()
    for number in range(blocks):
        for kind in kinds:
            file = f"weights/{number}{kind}.safetensors"
            values = torch.tensor([4.0, 3.0])
            if len(kinds) > 2:
                values = 20 * torch.exp(-torch.arange(64) / (12.0 + number)) + 0.3
            save_file({"singular_values": values}, store / file)
            name, size = f"model.layers.{number}.{kind}", len(values)
            weights[name] = {"sha256": "0" * 64, "shape": [size, size], "rank": max(1, size // 4), "file": file}
    manifest = {"format": FORMAT, "unfreeze_rank_ratio": 0.5, "free_subspace": "core", "weights": weights}
    path = store / "sets" / "abc123.json"
    path.parent.mkdir()
    path.write_text(json.dumps(manifest))
    return load_factor_set(path)


def new_training(factors: FactorSet) -> dict[str, Any]:
    ranks = factors.ranks
    return {
        "config": {
            "learning_rate": 0.0005,
            "max_grad_norm": 1.0,
            "lr_scheduler_kwargs": {"min_lr": None, "ratio": 0.5},
            "model_path": "/storage/models/smollm2-135m-instruct",
        },
        "steps": 2,
        "samples": 100,
        "first_loss": 4.0,
        "final_loss": 2.0,
        "validation_loss": None,
        "checkpoints": ["hf_format/samples_100.0"],
        "best_checkpoint": None,
        "tokens": 3796,
        "loss_tokens": 226,
        "world_size": 2,
        "device": "NVIDIA H100",
        "trainable_parameters": 22_809_600,
        "total_parameters": 91_238_400,
        "load_seconds": 4.0,
        "train_seconds": 94.9,
        "save_seconds": 0.5,
        "peak_memory_bytes": 3 * 2**30,
        "rank_layout": {
            name: {
                "update_norm": 0.05 * (i % 21 + 1),
                "unfrozen": ranks[name],
                "effective_rank": ranks[name] * (0.2 + 0.1 * (i % 6)),
                "frozen_share": 0.3 + 0.01 * (i % 21),
                "predicted_drift": 1e-4 * (i + 1),
            }
            for i, name in enumerate(factors.weights)
        },
        "saved": {
            "dtype": "bfloat16",
            "rounding": "nearest",
            "update_lost": 0.2718,
            "rounding_error": 0.5432,
            "frozen_share": 0.3987,
        },
    }


def new_metrics(steps: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "epoch": step / steps,
            "loss": 4.0 / step,
            "learning_rate": 5e-4 / step,
            "grad_norm": 8.0 / step,
            "tokens": 1898 * step,
            "loss_tokens": 113 * step,
            "tokens_per_second": 100.0,
            "step_seconds": 1.0,
            "validation_loss": None,
        }
        for step in range(1, steps + 1)
    ]


def new_dataset() -> dict[str, Any]:
    return {
        "data_uri": "/data/sarcasm.jsonl",
        "files": {"/data/sarcasm.jsonl": "0faa2067" * 8},
        "settings": {"max_seq_len": 1024},
        "num_records": 28614,
        "num_duplicates": 116,
        "num_train_samples": 640,
        "num_validation_samples": 100,
        "num_tokens": 37331,
        "num_loss_tokens": 2236,
        "longest_sample": 79,
        "dropped_as_too_long": {"samples": 7, "tokens": 9000},
    }


COST = {"prepare_data": 12.5, "precompute_svd": 61.0, "train_osft": 99.4, "evaluate_model": 240.0}
