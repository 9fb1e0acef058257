"""The frontier's runs, on a random model of three blocks and random text."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.frontier import bench as bench_module
from benchmarks.frontier import runs
from benchmarks.frontier.bench import Bench
from benchmarks.frontier.materials import Materials
from benchmarks.frontier.measured import Knowledge, statistics_of, without_gradients
from benchmarks.frontier.methods import Method
from benchmarks.frontier.network import Network, Text, measure, reference
from benchmarks.frontier.runs import Run, execute, execute_missing, finished
from benchmarks.frontier.training import pieces_before, samples_of_steps
from osft.subspace import select_targets
from osft.subspace.statistics import Statistics
from tests.conftest import tiny_llama

LENGTH = 24
FULL = Method(kind="full")
RUN = Run(scope="whole", tasks=("german", "french"), steps=2, method=FULL, learning_rate=1e-2)


def random_text(seed: int, samples: int = 4, length: int = LENGTH) -> Text:
    return Text.of_blocks(torch.randint(0, 50, (samples, length), generator=torch.Generator().manual_seed(seed)))


def random_questions(seed: int, samples: int) -> Text:
    text = random_text(seed, samples)
    counted = torch.zeros_like(text.counted)
    counted[:, LENGTH - 3 : LENGTH - 1] = True
    return Text(text.tokens, counted, torch.tensor([[3, 4]] * samples))


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Materials:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    held_out = {name: random_text(seed, 2) for seed, name in enumerate(("german", "french", "web", "python"))}
    return Materials(
        folder,
        {"german": random_text(5), "french": random_text(6), "reviews": random_questions(7, 32)},
        held_out | {"reviews": random_questions(8, 3)},
        random_text(9, 8, 8),
    )


@pytest.fixture(autouse=True)
def own_text(monkeypatch):
    written = [sample.tolist() for sample in random_text(11, 3, 70).tokens]
    monkeypatch.setattr(Knowledge, "own_text", lambda _: written)


@pytest.fixture
def bench(materials, tmp_path, monkeypatch) -> Bench:
    monkeypatch.setattr(bench_module, "SCREENED_BLOCKS", 1)
    return Bench(materials, "screen", tmp_path, "cpu", print)


def test_last_blocks_compute_what_the_whole_model_computes(materials, tmp_path):
    vocabulary = materials.vocabulary
    cut = Network(materials.folder, "cpu", blocks=1, vocabulary=vocabulary, cache=tmp_path)
    whole = Network(materials.folder, "cpu", blocks=None, vocabulary=vocabulary, cache=tmp_path)
    for name in ("german", "reviews"):
        expected, found = (
            measure(network, network.see(materials.held_out[name]), name, {}) for network in (whole, cut)
        )
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_loss_that_is_trained_is_the_one_that_is_measured(bench, materials):
    seen = bench.network.see(materials.held_out["reviews"])
    measured = measure(bench.network, seen, "reviews", {})["loss"]
    assert bench.network.loss_sum(seen, [0, 1, 2]).item() == pytest.approx(2 * sum(measured), rel=1e-5)


def test_divergence_is_that_of_the_definition(bench, materials):
    seen = bench.network.see(materials.held_out["web"])
    before = reference(bench.network, {"web": seen})
    p = bench.network.hidden(seen, slice(0, 1))[0, :-1] @ bench.network.head().T
    bench.network.put({name: 1.1 * weight for name, weight in bench.network.base.items()})
    q = bench.network.hidden(seen, slice(0, 1))[0, :-1] @ bench.network.head().T
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert measure(bench.network, seen, "web", {"base": before})["base"][0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        FULL,
        Method(kind="lora"),
        Method(kind="peft_osf", ratio=0.25),
        Method(kind="weights", ratio=0.25),
        Method(kind="full", replay_ratio=5.0),
        Method(kind="full", distill_weight=1.0),
        Method(kind="activations", ratio=0.25),
        Method(kind="activations", ratio=1.0, stiffness=1.0),
        Method(kind="activations", ratio=1.0, stiffness=1.0, measured_energy=False),
        Method(kind="curvature", stiffness=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("task", ["german", "reviews"])
def test_every_method_learns_and_gives_the_model_back(bench, method, task):
    run = Run(scope="screen", tasks=(task,), steps=2, method=method, learning_rate=1e-2)
    result = execute(run, bench, lambda _: None)
    names = set(bench.network.base)
    assert set(bench.network.weights()) == names
    changed = {name for name, weight in bench.network.weights().items() if not weight.equal(bench.network.base[name])}
    assert changed
    assert not any(name.startswith("layers.0.") for name in names)
    assert [stage["scale"] for stage in result["stages"]] == [1.0, 0.75, 0.5, 0.25]
    drift = [sum(stage["measured"]["web"]["base"]) for stage in result["stages"]]
    assert drift == sorted(drift, reverse=True)
    assert drift[-1] > 0


def test_sequence_measures_earlier_tasks_against_what_they_were_after_their_own_training(materials, tmp_path):
    result = execute(RUN, Bench(materials, "whole", tmp_path, "cpu", print), lambda _: None)
    assert [(stage["task"], stage["scale"]) for stage in result["stages"]] == [
        ("german", 1.0), ("french", 1.0), ("french", 0.75), ("french", 0.5), ("french", 0.25),
    ]  # fmt: skip
    german = result["stages"][1]["measured"]["german"]
    assert min(german["own"]) > 0
    assert "own" not in result["stages"][1]["measured"]["french"]
    assert set(result["stages"][0]["measured"]) == {"german", "web", "python"}


def test_a_run_that_is_there_is_not_done_again(materials, tmp_path, monkeypatch):
    lines: list[str] = []
    execute_missing([RUN], materials, tmp_path, "cpu", lines.append)
    (result,) = finished([RUN], materials, tmp_path).values()
    assert result["name"] == str(RUN)
    monkeypatch.setattr(runs, "execute", None)
    execute_missing([RUN], materials, tmp_path, "cpu", lines.append)


def test_anything_that_determines_a_run_names_its_file(materials, tmp_path):
    others = [
        replace(RUN, scope="screen"), replace(RUN, tasks=("german",)), replace(RUN, steps=3),
        replace(RUN, method=Method(kind="lora")), replace(RUN, learning_rate=1e-3), replace(RUN, seed=1),
    ]  # fmt: skip
    files = {run.file(tmp_path, "a") for run in (RUN, *others)} | {RUN.file(tmp_path, "b")}
    assert len(files) == 8
    assert RUN.file(Path(tmp_path), "a") in files


def test_seeds_take_different_samples(bench):
    seen = bench.task("reviews")
    first, second = samples_of_steps(seen, 1, 0), samples_of_steps(seen, 1, 1)
    assert len(first[0]) == 16
    assert not set(first[0]) & set(second[0])


def test_replayed_tokens_are_the_given_share():
    assert pieces_before(16, 0.01, 512, 64) == 1
    assert pieces_before(16, 0.05, 512, 64) == 6


def test_unit_without_gradients_is_the_mean_energy_of_all_that_is_carried():
    model = tiny_llama().eval()
    both: Statistics | None = None
    for seed in (0, 1):
        both = statistics_of(model, random_text(seed).tokens.tolist(), "text", "cpu", both)
    assert both is not None
    targets = {target.name: math.prod(target.shape) for target in select_targets(model)}
    energy = sum(
        float(each.moment.trace()) * targets[name] / each.moment.size for each in both.inputs() for name in each.targets
    )
    expected = energy / sum(targets.values()) * both.parts[0].weight_rms
    assert without_gradients(both).unit == pytest.approx(expected, rel=1e-5)
