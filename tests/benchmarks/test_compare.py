"""The comparison with other methods, on a random model and two small tasks: every method is really trained."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.compare import Run, compare, parse_rates, plan
from benchmarks.compare_report import choose_rates, summarize, write_report
from benchmarks.sequence import METHODS, Settings, gather, train_round
from osft.data.chat import tokenize
from osft.data.dataset_folder import load_split
from osft.data.records import DataError
from tests.conftest import arithmetic, write_jsonl

RATES = {"osft": (1e-3,), "full": (1e-3,), "lora": (3e-3,)}


@pytest.fixture(scope="module")
def settings(model_folder, tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("tasks")
    questions = {"which": "Which is larger, ", "say": "Say the larger one: "}
    tasks = []
    for seed, (name, words) in enumerate(questions.items()):
        records = arithmetic(100, seed)
        for record in records:
            record["messages"][0]["content"] = words + record["messages"][0]["content"]
        tasks.append(str(write_jsonl(folder / f"{name}.jsonl", records)))
    anchor = write_jsonl(
        folder / "anchor.jsonl", [{"text": f"The year {year} was long."} for year in range(1900, 1910)]
    )
    return Settings(
        model=str(model_folder),
        tasks=tuple(tasks),
        anchor=str(anchor),
        train_samples=24,
        selection_samples=3,
        report_samples=4,
        anchor_samples=3,
        unfreeze_rank_ratio=0.5,
        lora_rank=3,
        lora_alpha=6,
    )


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def result(settings, storage) -> dict[str, Any]:
    """The whole comparison, never interrupted."""
    return compare(settings, RATES, 1, storage, storage / "results")


def what_was_computed(result: dict[str, Any]) -> list[Any]:
    """The rounds without what the machine determines."""
    measured = ("step_seconds", "load_seconds", "train_seconds", "peak_bytes")
    return [[{k: v for k, v in r.items() if k not in measured} for r in run["rounds"]] for run in result["runs"]]


def arguments(settings: Settings, storage: Path) -> list[str]:
    values = {name.replace("_", "-"): value for name, value in asdict(settings).items()}
    given = [f"--task={task}" for task in values.pop("tasks")]
    del values["lora-alpha"], values["warmup-steps"], values["max-tokens"]
    given += [f"--{name}={value}" for name, value in values.items()]
    given += [f"--rates={method}={rate[0]}" for method, rate in RATES.items()]
    return [*given, f"--storage={storage}", f"--results={storage / 'results'}", f"--threads={torch.get_num_threads()}"]


def test_killed_comparison_goes_on_to_the_same_results(settings, result, tmp_path):
    command = [sys.executable, "-m", "benchmarks.compare", *arguments(settings, tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("runs/*/model-1"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/round-*.json")}
    assert 2 <= len(finished) < 6
    torch.manual_seed(7)  # whatever was drawn before does not matter
    resumed = compare(settings, RATES, 1, tmp_path, tmp_path / "results")
    assert what_was_computed(resumed) == what_was_computed(result)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished


def test_methods_begin_a_sequence_alike_and_continue_from_their_own_model(result):
    first, second = ([run["rounds"][index]["losses"][0] for run in result["runs"]] for index in (0, 1))
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)
    assert all(abs(a - b) > 1e-3 for a, b in zip(second, second[1:] + second[:1], strict=True))


def test_only_the_last_model_of_a_run_is_kept(result, storage):
    assert len(list(storage.glob("runs/*"))) == 3
    for folder in storage.glob("runs/*"):
        assert sorted(path.name for path in folder.iterdir()) == ["model-1", "round-0.json", "round-1.json", "run.json"]


def test_what_is_there_is_not_computed_again(settings, result, storage, capfd):
    files = {file: file.stat().st_mtime_ns for file in storage.glob("runs/*/round-*.json")}
    again = compare(settings, RATES, 1, storage, storage / "results")
    assert what_was_computed(again) == what_was_computed(result)
    assert {file: file.stat().st_mtime_ns for file in storage.glob("runs/*/round-*.json")} == files
    assert "learned" not in capfd.readouterr().err


def test_most_frequent_answer_is_what_a_model_without_a_clue_gets(settings, storage, result):
    for task in gather(settings, storage, print).tasks:
        first = sum(record.messages[-1]["content"] == "first" for record in task.report)
        assert result["most_frequent_answer"][task.name] == max(first, 4 - first) / 4


def test_dry_run_computes_nothing(settings, tmp_path, capsys):
    assert compare(settings, RATES, 2, tmp_path, tmp_path / "results", dry_run=True) == {}
    assert "6 runs of 2 rounds: which, say" in capsys.readouterr().out
    assert not list(tmp_path.glob("runs/*"))
    assert not (tmp_path / "results").exists()


def test_records_that_choose_report_and_train_are_different_ones(settings, storage, tokenizer):
    for task in gather(settings, storage, print).tasks:
        chosen, reported = (
            {tuple(tokenize(record, tokenizer).input_ids) for record in part} for part in (task.selection, task.report)
        )
        split = load_split(task.dataset, "train")
        trained = {tuple(split[index].input_ids) for index in range(len(split))}
        assert (len(chosen), len(reported), len(trained)) == (3, 4, 24)
        assert len(chosen | reported | trained) == 31


def test_task_with_too_few_held_out_records_is_refused(settings, tmp_path):
    with pytest.raises(DataError, match=r"which.jsonl has \d+ held-out records, 103 are wanted. Ask for fewer of them"):
        gather(replace(settings, report_samples=100), tmp_path, print)


@pytest.fixture(scope="module")
def updates(settings, storage) -> dict[str, dict[str, torch.Tensor]]:
    """By method: what one round added to each stored weight, and how many parameters it trained."""
    materials = gather(settings, storage, print)
    base = load_file(materials.base_model / "model.safetensors")
    added = {}
    for method in METHODS:
        target, counted = storage / "single" / method, {}
        train_round(
            settings,
            method,
            1e-2,
            0,
            source=materials.base_model,
            dataset=materials.tasks[0].dataset,
            target=target,
            factors=storage / "factors",
            on_step=lambda _: None,
            before_saving=counted.update,
        )
        tuned = load_file(target / "model.safetensors")
        added[method] = {name: tuned[name] - weight for name, weight in base.items()}
        added[method]["trainable"] = torch.tensor(counted["trainable_parameters"])
    return added


PROJECTION = "model.layers.0.mlp.up_proj.weight"


def test_full_fine_tuning_trains_every_parameter(updates):
    trainable = updates["full"].pop("trainable")
    assert all(update.abs().max() > 0 for update in updates["full"].values())
    assert trainable == sum(update.numel() for update in updates["full"].values())


@pytest.mark.parametrize("method", ["osft", "lora"])
def test_others_leave_embeddings_and_norms_alone(updates, method):
    kept = [name for name, update in updates[method].items() if name != "trainable" and not update.any()]
    linear = [name for name in updates[method] if "proj" in name]
    assert set(updates[method]) == {*kept, *linear, "trainable"}
    assert not set(kept) & set(linear)


def test_lora_adds_its_rank_to_every_linear_weight(updates):
    ranks = {torch.linalg.matrix_rank(u, rtol=1e-4).item() for name, u in updates["lora"].items() if "proj" in name}
    assert ranks == {3}


def test_osft_adds_nothing_in_the_frozen_directions(settings, storage, updates):
    weight = load_file(gather(settings, storage, print).base_model / "model.safetensors")[PROJECTION]
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    frozen = min(weight.shape) // 2
    for method, leaks in (("osft", False), ("full", True)):
        update = updates[method][PROJECTION].double()
        leak = max((u[:, :frozen].T @ update).norm(), (update @ vh[:frozen].T).norm()) / update.norm()
        assert (leak > 0.1) == leaks
        assert leaks or leak < 1e-4


def test_other_settings_are_other_runs(tmp_path):
    described, run = {"train_samples": 1, "content": "abc"}, Run("osft", 1e-4, 0)
    folders = {
        run.folder(tmp_path, described),
        run.folder(tmp_path, described | {"train_samples": 2}),
        run.folder(tmp_path, described | {"content": "abd"}),
        replace(run, seed=1).folder(tmp_path, described),
        replace(run, learning_rate=2e-4).folder(tmp_path, described),
        replace(run, method="full").folder(tmp_path, described),
    }
    assert len(folders) == 6
    assert Run("osft", 1e-4, 0).folder(tmp_path, dict(described)) in folders


def test_plan_completes_a_rate_of_each_method_before_the_next():
    runs = plan({"osft": (1.0, 2.0), "full": (3.0,)}, 2)
    assert [(run.method, run.learning_rate, run.seed) for run in runs] == [
        ("osft", 1.0, 0), ("full", 3.0, 0), ("osft", 2.0, 0), ("osft", 1.0, 1), ("full", 3.0, 1), ("osft", 2.0, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("entry", ["sgd=1e-3", "osft", "osft=", "osft=fast", "full=0"])
def test_rates_that_cannot_be_are_refused(entry):
    with pytest.raises(ValueError, match=r"--rates .*: give METHOD=RATE,RATE with a method of osft, full, lora"):
        parse_rates([entry], "cpu")


# ---- what is made of the rounds ----


def scored(accuracy: float, loss: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "loss": loss, "accuracy_stderr": 0.03, "num_samples": 100}


def made_run(method: str = "osft", rate: float = 1e-4, seed: int = 0, selection_loss: float = 0.5) -> dict[str, Any]:
    """A learned to 0.9 and kept at 0.7, B learned to 0.8."""
    counted = {
        "trainable_parameters": 7,
        "step_seconds": 1.0,
        "load_seconds": 2.0,
        "train_seconds": 3.0,
        "peak_bytes": 5,
    }
    first = {"report": {"A": scored(0.9, 0.2)}, "anchor": {"loss": 3.1}}
    last = {
        "report": {"A": scored(0.7, 0.5), "B": scored(0.8, 0.3)},
        "selection": {"A": scored(0.6, selection_loss), "B": scored(0.5, selection_loss)},
        "anchor": {"loss": 3.25},
    }
    return {"method": method, "learning_rate": rate, "seed": seed, "rounds": [counted | first, counted | last]}


BASE = {"report": {"A": scored(0.4, 5.0), "B": scored(0.5, 4.0)}, "anchor": {"loss": 3.0}}


def test_summary_follows_the_definitions():
    summary = summarize(made_run(), ["A", "B"], BASE)
    assert summary["accuracy"] == {
        "matrix": [[0.9], [0.7, 0.8]],
        "learning": pytest.approx(0.85),
        "average": pytest.approx(0.75),
        "transfer": pytest.approx(-0.2),
        "forgetting": pytest.approx(0.2),
    }
    assert summary["loss"]["learning"] == pytest.approx(-0.25)
    assert summary["loss"]["forgetting"] == pytest.approx(0.3)
    assert summary["anchor_drift"] == pytest.approx(-0.25)
    assert summary["errors"]["average"] == pytest.approx(0.03 * 2**0.5 / 2)
    assert summary["errors"]["forgetting"] == pytest.approx(0.03 * 2**0.5)


def test_rate_is_chosen_by_the_selection_records_over_all_seeds():
    runs = [made_run("full", 1e-5, 0, 0.2), made_run("full", 1e-5, 1, 0.8), made_run("full", 1e-4, 0, 0.4)]
    runs += [made_run("full", 1e-4, 1, 0.4), made_run("lora", 1e-3, 0, 0.9)]
    assert choose_rates([summarize(run, ["A", "B"], BASE) for run in runs]) == {"full": 1e-4, "lora": 1e-3}


def test_report_shows_the_chosen_rates_and_all_runs(result, tmp_path):
    runs = [made_run("osft", 1e-4, 0, 0.2), made_run("osft", 2e-4, 0, 0.1), made_run("full", 1e-5)]
    frequent = {"A": 0.55, "B": 0.78}
    made = result | {"runs": runs, "tasks": ["A", "B"], "base": BASE, "most_frequent_answer": frequent}
    write_report(made, tmp_path)
    text = (tmp_path / "compare_cpu.md").read_text()
    assert "| OSFT, complement | 0.0002 | 85.0 ± 2.1 | 75.0 ± 2.1 | -20.0 ± 4.2 | 20.0 ± 4.2 |" in text
    assert "| OSFT, complement, seed 0, after B | 70.0 (0.500) | 80.0 (0.300) | 3.250 |" in text
    assert "| always the most frequent answer | 55.0 | 78.0 | – |" in text
    assert "most frequent answer: OSFT, complement: A; full fine-tuning: A. On the others" in text
    assert text.count("| OSFT, complement | 0.0001 | 0 |") == 1
    assert "learning accuracy 85.0 against 85.0 points (+0.0 ± 3.0)" in text
    assert "- OSFT forgets less than full fine-tuning: +0.0 ± 6.0 points, NOT met, within the standard error" in text
    assert "- OSFT learns no less than full fine-tuning: +0.0 ± 3.0 points, met, within the standard error" in text
    assert "full fine-tuning" in (tmp_path / "compare_cpu.svg").read_text()
