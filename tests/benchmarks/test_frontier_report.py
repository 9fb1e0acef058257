"""What is made of the frontier's runs: drift at equal learning, forgetting, tables."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from benchmarks.frontier.curves import Curve, Point, best_gain, curve_of, jackknife, read_moved, read_off
from benchmarks.frontier.methods import Method
from benchmarks.frontier.plan import EXPERIMENTS
from benchmarks.frontier.report import published_runs, write_report
from benchmarks.frontier.runs import Run
from benchmarks.frontier.summary import forgetting, summarize

FULL, LORA = Method(kind="full"), Method(kind="lora")
MACHINE = {"processor": "a processor", "gpu": None, "cores": 2, "threads": 1, "torch": "1", "transformers": "2"}


def made_run(method: Method, learning_rate: float, seed: int = 0) -> Run:
    return Run(scope="screen", tasks=("german",), steps=16, method=method, learning_rate=learning_rate, seed=seed)


def made_result(run: Run, gain: float, drift: float, spread: float = 0.1) -> dict[str, Any]:
    """Gain in proportion to the scale, drift to its square; samples differ by `spread`."""

    def around(value: float) -> list[float]:
        return [value * (1 - spread), value, value * (1 + spread)]

    stages = [
        {
            "task": "german",
            "scale": scale,
            "measured": {
                "german": {"loss": [3.0 - fall for fall in around(gain * scale)]},
                "web": {"loss": [2.0] * 3, "base": around(drift * scale**2)},
                "python": {"loss": [2.5] * 3, "base": around(2 * drift * scale**2)},
            },
        }
        for scale in (1.0, 0.5)
    ]
    base = {"german": {"loss": [3.0] * 3}, "web": {"loss": [1.9] * 3}, "python": {"loss": [2.5] * 3}}
    return {
        "run": asdict(run), "name": str(run),
        "base": base, "stages": stages, "train_seconds": 16.0, "machine": MACHINE | {"peft": "3"},
    }  # fmt: skip


def results(*runs: tuple[Method, float, float, float]) -> dict[Run, dict[str, Any]]:
    made = [(made_run(method, rate), gain, drift) for method, rate, gain, drift in runs]
    return {run: made_result(run, gain, drift) for run, gain, drift in made}


def test_drift_is_read_off_between_the_points_of_a_run():
    (result,) = results((FULL, 1e-4, 0.4, 0.08)).values()
    curve = curve_of(result)
    for gain in (0.1, 0.2, 0.3, 0.399):
        reading = read_off([curve], gain, "web")
        assert reading.drift == pytest.approx(0.08 * (gain / 0.4) ** 2)
    assert read_off([curve], 0.41, "web") is None


def test_what_earlier_tasks_lost_is_read_off_between_learning_rates():
    def curve(rate: float, gain: float, moved: float) -> Curve:
        whole = Point(1.0, np.array([[gain]]), {}, np.array([moved]))
        return Curve(rate, 0, (Point(0.5, np.array([[gain / 2]]), {}), whole))

    curves = [curve(2e-3, 0.4, 0.09), curve(1e-3, 0.2, 0.01)]
    assert read_moved(curves, 0.1) == pytest.approx(0.05**2)
    assert read_moved(curves, 0.3) == pytest.approx(0.2**2)
    assert read_moved(curves, 0.5) is None


def test_rate_with_the_least_drift_counts():
    made = results((FULL, 1e-4, 0.4, 0.08), (FULL, 1e-3, 0.4, 0.02), (FULL, 1e-2, 0.1, 0.0001))
    reading = read_off([curve_of(result) for result in made.values()], 0.3, "web")
    assert reading.learning_rate == 1e-3


def test_ratio_is_taken_at_equal_learning_and_surer_than_its_parts():
    summaries = summarize(results((FULL, 1e-4, 0.4, 0.08), (LORA, 1e-3, 0.8, 0.08)))
    full, lora = summaries
    assert full["relative"][str(FULL)]["web"] == pytest.approx((1.0, 0.0))
    assert full["relative"][str(LORA)]["web"][0] == pytest.approx(4.0)
    ratio, error = lora["relative"][str(FULL)]["web"]
    assert ratio == pytest.approx(0.25)
    drift, drift_error = lora["drift"]["python"]
    assert drift == pytest.approx(2 * 0.08 * 0.375**2)
    assert error / ratio < 0.1 * drift_error / drift


def test_best_rate_at_an_edge_is_said():
    runs = [(FULL, rate, 0.4, 0.01 / rate) for rate in (1.0, 2.0, 3.0)]
    assert summarize(results(*runs))[0]["at_edge"]
    runs[2] = (FULL, 3.0, 0.4, 1.0)
    assert not summarize(results(*runs))[0]["at_edge"]


def test_method_that_never_learned_enough_has_no_reading():
    summary = summarize(results((FULL, 1e-4, 0.4, 0.08), (LORA, 1e-3, 0.1, 0.0)))[1]
    assert summary["drift"]["web"] == (None, None)
    assert summary["best"] == []
    assert best_gain([curve_of(result) for result in results((LORA, 1e-3, 0.1, 0.0)).values()]) == pytest.approx(0.1)


def test_jackknife_gives_the_standard_error_of_a_mean():
    values = [1.0, 2.0, 4.0, 7.0]

    def mean_without(left_out: int | None) -> float:
        kept = [value for place, value in enumerate(values) if place != left_out]
        return sum(kept) / len(kept)

    variance = sum((value - 3.5) ** 2 for value in values) / 3
    assert jackknife(mean_without, 4) == pytest.approx((3.5, (variance / 4) ** 0.5))


def test_forgetting_is_the_rise_since_a_task_was_learned():
    run = Run(scope="whole", tasks=("german", "french"), steps=2, method=FULL, learning_rate=1e-3)

    def texts(german: float, own: float | None, french: float | None) -> dict[str, Any]:
        measured = {"german": {"loss": [german] * 2, "base": [0.1] * 2}}
        if own is not None:
            measured["german"]["own"] = [own, own + 0.2]
        if french is not None:
            measured["french"] = {"loss": [french] * 2, "base": [0.1] * 2}
        return measured | {name: {"loss": [2.2] * 2, "base": [0.3, 0.5]} for name in ("web", "python")}

    stages = [
        {"task": "german", "scale": 1.0, "measured": texts(2.5, None, None)},
        {"task": "german", "scale": 0.5, "measured": texts(9.0, None, None)},
        {"task": "french", "scale": 1.0, "measured": texts(2.8, 0.4, 3.0)},
    ]
    base = {
        name: {"loss": [loss] * 2} for name, loss in (("german", 3.0), ("french", 4.0), ("web", 2.0), ("python", 2.0))
    }
    (record,) = forgetting({run: {"base": base, "stages": stages, "train_seconds": 8.0}})
    assert [value for value, _ in record["learned"]] == pytest.approx([0.5, 1.0])
    assert [value for value, _ in record["kept"]] == pytest.approx([0.2, 1.0])
    assert record["lost"] == pytest.approx((0.3, 0.0))
    assert record["moved"] == pytest.approx((0.5, 0.1))
    assert record["drift"]["web"] == pytest.approx((0.4, 0.1))
    assert record["rise"]["web"] == pytest.approx((0.2, 0.0))
    assert record["seconds_per_step"] == 2.0


def test_report_is_made_of_what_is_there_and_says_what_is_missing(tmp_path):
    made = results((FULL, 3e-4, 0.4, 0.08), (LORA, 3e-3, 0.8, 0.08))
    missing = [made_run(LORA, 1e-2)]
    write_report({"screen": made, "whole": {}}, {"screen": missing, "whole": []}, tmp_path, "texts")
    text = (tmp_path / "frontier_cpu.md").read_text()
    assert "| LoRA, rank 16 | 0.800 | 0.01125 ±" in text
    assert "Not run yet, 1 runs, the learning rates by seed:\n\n- LoRA, rank 16: seed 0: 0.01\n" in text
    assert EXPERIMENTS["whole"].title not in text
    assert "LoRA, rank 16" in (tmp_path / "frontier_cpu.svg").read_text()
    published = published_runs(tmp_path, "texts")
    assert published.keys() == made.keys()
    for run, result in published.items():
        stage, expected = result["stages"][0]["measured"]["web"], made[run]["stages"][0]["measured"]["web"]
        assert stage["base"] == pytest.approx(expected["base"], rel=1e-5)
    assert not published_runs(tmp_path, "other texts")
