"""The frontier in numbers: how far a model drifts for what it learns, read off where all methods have learned the same.

A run gives a curve: the points W0 + a D of its update D. Along it drift grows like a^2, so its root is interpolated
linearly between points, from the base (a = 0) on. Of a method's curves, one for each learning rate, the one with the
least drift counts. What an earlier task lost since it was learned is known of whole updates only: there the points of
one curve are a method's runs by rising learning rate.

Standard errors are the jackknife's over the held-out samples (the i-th of every text is left out at a time), as all
methods are measured on the same ones: a ratio is surer than the figures that it is of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

TARGET = 0.75
"""Share of the best gain of full fine-tuning at which drift is read off."""


@dataclass(frozen=True, slots=True)
class Point:
    """A model W0 + a D on the held-out samples."""

    scale: float
    gain: np.ndarray
    """(tasks, samples): the fall of each task's loss from the base on, nats per token."""
    drift: dict[str, np.ndarray]
    """KL(base || model) by text, (samples,), nats per token."""
    moved: np.ndarray | None = None
    """KL(model after the task || model), the mean over the earlier tasks of a sequence, (samples,); of a = 1 only."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What one run gives."""

    learning_rate: float
    seed: int
    points: tuple[Point, ...]
    """By rising scale; the base is not among them."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The drift at which a method has learned so much."""

    drift: float
    learning_rate: float


def curve_of(result: dict[str, Any]) -> Curve:
    """The curve at the end of a run, over all its tasks."""
    tasks, base = result["run"]["tasks"], result["base"]
    points = []
    for stage in result["stages"]:
        if stage["task"] == tasks[-1]:
            measured = stage["measured"]
            drift = {name: np.array(values["base"]) for name, values in measured.items() if name not in tasks}
            samples = min(map(len, drift.values()))
            gain = np.array([_in_groups(fall(base, measured, task), samples) for task in tasks])
            own = [measured[task]["own"] for task in tasks if "own" in measured[task]]
            moved = np.mean(own, axis=0) if own and stage["scale"] == 1.0 else None
            points.append(Point(stage["scale"], gain, drift, moved))
    points.sort(key=lambda point: point.scale)
    return Curve(result["run"]["learning_rate"], result["run"]["seed"], tuple(points))


def fall(base: dict[str, Any], after: dict[str, Any], text: str) -> np.ndarray:
    """How much lower the loss of each sample of a text is than the base's."""
    return np.subtract(base[text]["loss"], after[text]["loss"])


def _in_groups(values: np.ndarray, groups: int) -> np.ndarray:
    """The means of so many groups of samples: a task may have more of them than other texts."""
    return np.array([part.mean() for part in np.array_split(values, groups)])


def best_gain(curves: Sequence[Curve], left_out: int | None = None) -> float:
    """The largest gain of any point."""
    return max(_mean(point.gain, left_out) for curve in curves for point in curve.points)


def read_off(curves: Sequence[Curve], gain: float, text: str, left_out: int | None = None) -> Reading | None:
    """The least drift on a text with which any of the curves reaches a gain; None if none does."""
    found = [
        Reading(drift, curve.learning_rate)
        for curve in curves
        if (drift := _drift_at(curve, gain, text, left_out)) is not None
    ]
    return min(found, key=lambda reading: reading.drift, default=None)


def read_moved(curves: Sequence[Curve], gain: float, left_out: int | None = None) -> float | None:
    """How far the earlier tasks were moved at the least learning rate that reaches a gain; None if none does."""
    points = [
        (_mean(point.gain, left_out), _mean(point.moved, left_out))
        for curve in sorted(curves, key=lambda curve: curve.learning_rate)
        for point in curve.points
        if point.moved is not None
    ]
    return _interpolated(points, gain)


def _drift_at(curve: Curve, gain: float, text: str, left_out: int | None) -> float | None:
    points = [(_mean(point.gain, left_out), _mean(point.drift[text], left_out)) for point in curve.points]
    return _interpolated(points, gain)


def _interpolated(points: Sequence[tuple[float, float]], gain: float) -> float | None:
    """The KL where the line from (0, 0) through points (gain, root of KL) first reaches a gain."""
    before = (0.0, 0.0)
    for reached, divergence in points:
        here = reached, sqrt(max(0.0, divergence))
        if here[0] >= gain > before[0]:
            share = (gain - before[0]) / (here[0] - before[0])
            return float((before[1] + share * (here[1] - before[1])) ** 2)
        before = here
    return None


def _mean(values: np.ndarray, left_out: int | None) -> float:
    """Over the samples, but for one, and over the tasks."""
    kept = values if left_out is None else np.delete(values, left_out, axis=-1)
    return float(kept.mean())


def jackknife(statistic: Callable[[int | None], float | None], samples: int) -> tuple[float | None, float | None]:
    """A statistic and its standard error: sqrt((n - 1) / n sum (t_i - mean t)^2), t_i the statistic without sample i.

    statistic: gets the sample to leave out; None where it has no value, and then there is no error.
    """
    whole = statistic(None)
    parts = [statistic(sample) for sample in range(samples)]
    known = [part for part in parts if part is not None]
    if whole is None or len(known) < samples:
        return whole, None
    return whole, float(np.std(known) * sqrt(samples - 1))


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The mean of samples and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / sqrt(len(values))) if len(values) > 1 else 0.0
