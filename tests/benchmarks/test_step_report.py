"""What the report of a training step says of figures: ratios, targets, and what got worse."""

import copy
import json

from benchmarks import step_report
from benchmarks.contestants import METHODS


def shapes(seconds: dict[str, float]) -> dict:
    """One length at which every method takes the seconds and 100 bytes."""
    return {
        "512": {
            method: {
                "seconds": [seconds.get(method, 1.0)] * 3,
                "median_seconds": seconds.get(method, 1.0),
                "peak_bytes": 100,
                "step_tokens": 2048,
                "trainable_parameters": 1,
            }
            for method in METHODS
        }
    }


TEXT = {"text": {"train": 100.0, "evaluate": 290.0}, "choices": {"train": 100.0, "evaluate": 310.0, "prepare": 1.0}}


def test_targets_are_ratios_of_one_run():
    measured = shapes({"ours": 0.8, "peft_osf": 1.6, "mini_trainer": 1.7})
    targets = step_report.evaluate(measured, TEXT)
    of = {name.partition(": ")[2]: found for name, found in targets.items() if METHODS["ours"] in name}
    assert of["seconds of full fine-tuning, every parameter"] == {"value": 0.8, "limit": 0.85, "met": True}
    assert of["seconds of PEFT OSF"]["met"]
    assert not of["seconds of mini-trainer OSFT"]["met"]
    assert not of["memory of full fine-tuning"]["met"]
    met = {name: found["met"] for name, found in targets.items() if "of evaluation" in name}
    assert list(met.values()) == [False, True]


def test_what_is_a_tenth_worse_than_the_committed_figure_is_named_and_red(tmp_path, capsys):
    def result(seconds, peak, evaluated=310.0):
        measured = shapes(seconds)
        measured["512"]["ours"]["peak_bytes"] = peak
        return {
            "profile": "cpu",
            "date": "today",
            "machine": dict.fromkeys(("gpu", "processor", "cores", "torch", "transformers", "peft", "mini_trainer")),
            "settings": {"device": "cpu", "threads": 1, "num_layers": 2, "hidden_size": 8, "intermediate_size": 8}
            | {"vocab_size": 8, "repetitions": 3, "leak_steps": 1},
            "preparation_seconds": {"statistics": 2.0, "mini_trainer": 4.0},
            "leaks": {method: {"left": 0.0, "right": 0.0} for method in METHODS},
            "targets": step_report.evaluate(measured, TEXT),
            "shapes": measured,
            "throughput": TEXT | {"choices": TEXT["choices"] | {"evaluate": evaluated}},
            "total_seconds": 60.0,
        }

    step_report.report(result({"ours": 0.8}, 100), tmp_path)
    assert "than the committed" not in capsys.readouterr().out
    committed = json.loads((tmp_path / "step_cpu.json").read_text())
    slower = result({"ours": 0.8 * 1.09}, 100)
    assert step_report.worse(slower, committed) == set()
    slower = result({"ours": 0.8 * 1.11}, 111, evaluated=280.0)
    assert step_report.worse(slower, committed) == {
        ("512", "ours", figure)
        for figure in ("seconds_to_full", "seconds_to_full_targets", "seconds_to_peft_osf", "seconds_to_mini_trainer")
    } | {("512", "ours", "peak_bytes"), ("choices", "evaluation", "ratio to training")}
    step_report.report(copy.deepcopy(slower), tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"512 tokens, {METHODS['ours']}: peak_bytes is a tenth worse than the committed one" in shown
    assert "evaluation of choices: ratio to training is a tenth worse" in shown
    text = (tmp_path / "step_cpu.md").read_text()
    assert "## 4 x 512 tokens" in text
    assert "| choices | 1 | 100 | 280 | 2.8 |" in text
    assert "factors of mini-trainer OSFT 2.00" in text
