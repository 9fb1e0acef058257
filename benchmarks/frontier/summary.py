"""What the finished runs say: for each method its drift at equal learning, and what it forgot."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from benchmarks.frontier.curves import (
    TARGET,
    Curve,
    best_gain,
    curve_of,
    fall,
    jackknife,
    mean_and_error,
    read_moved,
    read_off,
)
from benchmarks.frontier.materials import OTHERS
from benchmarks.frontier.methods import Method
from benchmarks.frontier.runs import Run

FULL = Method(kind="full")
EARLIER = "earlier tasks"
"""What stands for the texts of earlier tasks, each against the model that had just learned it."""
Results = Mapping[Run, dict[str, Any]]


def summarize(results: Results) -> list[dict[str, Any]]:
    """One record for each method: its reading at equal learning, averaged over the seeds that full fine-tuning has.

    gain        the best of any rate and scale, nats per token
    drift       KL on each text where 75 % of full fine-tuning's best gain is reached, and its standard error
    relative    that, to the same of each of the other methods, by name
    rates       those that were tried; `best`: that of the reading on web text, by seed; `at_edge`: it is the lowest or
                the highest of several, so that a better one may lie beyond
    """
    curves = curves_by_method(results)
    if FULL not in curves:
        return []
    return [_summary(method, curves) for method in curves]


def curves_by_method(results: Results) -> dict[Method, list[Curve]]:
    """The curves of each method's runs."""
    curves: dict[Method, list[Curve]] = {}
    for run, result in results.items():
        curves.setdefault(run.method, []).append(curve_of(result))
    return curves


def _summary(method: Method, by_method: Mapping[Method, list[Curve]]) -> dict[str, Any]:
    curves, full = by_method[method], by_method[FULL]
    seeds = sorted({curve.seed for curve in curves} & {curve.seed for curve in full})
    last = curves[0].points[-1]
    samples = last.gain.shape[-1]
    texts = [*OTHERS, *([EARLIER] if last.moved is not None else [])]

    def of_seed(found: Sequence[Curve], seed: int) -> list[Curve]:
        return [curve for curve in found if curve.seed == seed]

    def reading(found: Sequence[Curve], text: str, left_out: int | None, over: Sequence[int] = seeds) -> float | None:
        drifts = []
        for seed in over:
            target = TARGET * best_gain(of_seed(full, seed), left_out)
            if text == EARLIER:
                drift = read_moved(of_seed(found, seed), target, left_out)
            else:
                read = read_off(of_seed(found, seed), target, text, left_out)
                drift = read.drift if read else None
            if drift is None:
                return None
            drifts.append(drift)
        return float(np.mean(drifts)) if drifts else None

    def relative(other: Sequence[Curve], text: str, left_out: int | None) -> float | None:
        common = [seed for seed in seeds if of_seed(other, seed)]
        mine, others = (reading(found, text, left_out, common) for found in (curves, other))
        return mine / others if mine is not None and others else None

    rates = sorted({curve.learning_rate for curve in curves})
    best = [read_off(of_seed(curves, seed), TARGET * best_gain(of_seed(full, seed)), OTHERS[0]) for seed in seeds]
    chosen = [read.learning_rate for read in best if read]
    gains = [best_gain(of_seed(curves, seed)) for seed in seeds]
    return {
        "method": str(method),
        "settings": asdict(method),
        "seeds": seeds,
        "rates": rates,
        "best": chosen,
        "at_edge": len(rates) > 1 and any(rate in (rates[0], rates[-1]) for rate in chosen),
        "gain": float(np.mean(gains)) if gains else None,
        "drift": {text: jackknife(partial(reading, curves, text), samples) for text in texts},
        "relative": {
            str(other): {text: jackknife(partial(relative, found, text), samples) for text in texts}
            for other, found in by_method.items()
        },
    }


def forgetting(results: Results) -> list[dict[str, Any]]:
    """One record for each run of a sequence, unscaled: what was learned, lost since, and how far all moved.

    learned   of each task, the fall of its loss right after it
    kept      of each task, the fall of its loss at the end
    lost      mean rise of the earlier tasks' loss since they were learned, and its standard error
    moved     KL(after its own training || end), mean over the earlier tasks
    <text>    KL(base || end), and the rise of the loss
    """
    records = []
    for run, result in results.items():
        stages = {stage["task"]: stage["measured"] for stage in result["stages"] if stage["scale"] == 1.0}
        base, last, earlier = result["base"], stages[run.tasks[-1]], run.tasks[:-1]
        lost = [np.subtract(last[task]["loss"], stages[task][task]["loss"]) for task in earlier]
        records.append(
            {
                "method": str(run.method),
                "learning_rate": run.learning_rate,
                "seed": run.seed,
                "learned": [mean_and_error(fall(base, stages[task], task)) for task in run.tasks],
                "kept": [mean_and_error(fall(base, last, task)) for task in run.tasks],
                "lost": mean_and_error(np.mean(lost, axis=0)) if earlier else None,
                "moved": mean_and_error(np.mean([last[task]["own"] for task in earlier], axis=0)) if earlier else None,
                "drift": {text: mean_and_error(last[text]["base"]) for text in OTHERS},
                "rise": {text: mean_and_error(-fall(base, last, text)) for text in OTHERS},
                "right": {
                    task: [float(np.mean(found[task]["right"])) for found in (base, last)]
                    for task in run.tasks
                    if "right" in last[task]
                },
                "seconds_per_step": result["train_seconds"] / (run.steps * len(run.tasks)),
            }
        )
    return records
