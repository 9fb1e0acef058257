"""What a training learned is kept by the next one, which has none of its data."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from osft import osft
from osft.data.chat import tokenize
from osft.data.dataset_folder import load_split
from osft.data.packing import collate
from osft.data.records import read_records
from osft.models.likelihood import token_nll
from osft.models.origin import read_origin
from osft.storage.sealed import DamagedFile
from osft.subspace.statistics_store import load_statistics
from tests.conftest import byte_tokenizer, feeding, tiny_llama, write_jsonl
from tests.training.in_process import run_in_process


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=96, intermediate_size=192).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def task(file: Path, alphabet: str, seed: int) -> Path:
    """Chats that name the later one of two characters."""
    numbers = random.Random(seed)
    pairs = [numbers.sample(alphabet, 2) for _ in range(64)]
    return write_jsonl(
        file,
        [
            {"messages": [{"role": "user", "content": a + b}, {"role": "assistant", "content": max(a, b) * 4}]}
            for a, b in pairs
        ],
    )


@pytest.fixture
def tasks(tmp_path) -> tuple[Path, Path]:
    return task(tmp_path / "digits.jsonl", "0123456789", 1), task(tmp_path / "letters.jsonl", "abcdefghij", 2)


@pytest.fixture
def learn(tmp_path, monkeypatch):
    """A round of `osft()` with a folder of its own; returns the model's folder."""
    run_in_process(monkeypatch)
    rounds = 0

    def call(model: Path | str, data: Path, **changes) -> Path:
        nonlocal rounds
        rounds += 1
        given = {
            "protect": "activations",
            "stiffness": 3.0,
            "calibration_tokens": 512,
            "model_path": str(model),
            "data_path": str(data),
            "unfreeze_rank_ratio": 0.5,
            "effective_batch_size": 16,
            "max_tokens_per_gpu": 2000,
            "max_seq_len": 128,
            "learning_rate": 5e-3,
            "num_epochs": 10,
            "lr_scheduler": "constant",
            "ckpt_output_dir": str(tmp_path / f"round-{rounds}"),
            "save_dtype": "float32",
        }
        if changes.get("protect") == "weights":
            del given["stiffness"], given["calibration_tokens"]
        return Path(osft(**(given | changes)).checkpoint)

    return call


def loss(model: Path, data: Path) -> float:
    """Nats per token of the answers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    batch = collate([tokenize(record, tokenizer) for record in read_records(str(data))])
    with torch.no_grad():
        return token_nll(AutoModelForCausalLM.from_pretrained(model).eval(), batch).mean().item()


def without_memory(model: Path) -> Path:
    """The same model, which does not say what it carries."""
    copy = shutil.copytree(model, model.parent / "without_memory")
    (copy / "osft.json").unlink()
    return copy


def test_second_round_keeps_what_the_first_one_learned_and_only_with_its_statistics(learn, base, tasks):
    """A learned update is small, in small singular directions: split once more by the weights, it is free again."""
    first, second = tasks
    one = {protect: learn(base, first, protect=protect) for protect in ("weights", "activations")}
    start = {"weights": one["weights"], "memory": one["activations"], "no memory": without_memory(one["activations"])}
    forgotten = {}
    for name, model in start.items():
        two = learn(model, second, protect="weights" if name == "weights" else "activations")
        assert loss(base, first) - loss(model, first) > 5, "it learned the first task"
        assert loss(model, second) - loss(two, second) > 5, "and the second one"
        forgotten[name] = loss(two, first) - loss(model, first)
    assert min(forgotten["weights"], forgotten["no memory"]) > 0.4, forgotten
    assert forgotten["memory"] < 0.1, forgotten


def test_model_names_what_it_started_from_and_what_it_learned_added_up(learn, base, tasks):
    from osft.subspace import select_targets
    from osft.subspace.calibration import measure
    from osft.training.round_statistics import some_of

    one = learn(base, tasks[0], num_epochs=1)
    named = read_origin(one).statistics
    total = load_statistics(named.address)
    assert total.sha256 == named.sha256
    assert [part.name for part in total.parts] == ["base", "digits"]
    assert json.loads((one.parents[1] / "training.json").read_text())["statistics"]["sha256"] == named.sha256
    (start,) = (
        load_statistics(file) for file in Path(named.address).parent.glob("*.json") if file.stem != named.sha256[:32]
    )
    (dataset,) = (one.parents[1] / "_internal_data_processing" / "data").iterdir()
    tuned = AutoModelForCausalLM.from_pretrained(one)
    samples = some_of(load_split(dataset, "train"), 512, seed=42)
    assert 512 <= sum(len(sample.input_ids) for sample in samples) < 600
    learned = measure(tuned, select_targets(tuned), samples, feeding=feeding(), seed=42)
    for added, *parts in zip(total.inputs(), start.inputs(), learned.inputs(), strict=True):
        expected = sum(part.moment.dense() for part in parts)
        assert torch.allclose(added.moment.dense(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_layout_counts_directions_of_the_inputs_and_norms_of_the_weights(learn, base, tasks):
    model = learn(base, tasks[0], max_steps=1)
    layout = json.loads((model.parents[1] / "training.json").read_text())["rank_layout"]
    wide = layout["model.layers.0.mlp.down_proj"]
    assert (wide["shape"], wide["unfrozen"], wide["frozen"]) == ([96, 192], 96, 96)
    weight = AutoModelForCausalLM.from_pretrained(base).get_parameter("model.layers.0.mlp.down_proj.weight")
    assert wide["weight_norm"] == pytest.approx(weight.norm().item(), rel=1e-4)


def test_each_round_adds_what_it_learned(learn, base, tasks):
    model: Path = base
    for number in range(3):
        model = learn(model, tasks[number % 2], max_steps=1)
    parts = load_statistics(read_origin(model).statistics.address).parts
    assert [part.name for part in parts] == ["base", "digits", "letters", "digits"]


def test_model_of_the_published_method_carries_nothing_and_that_is_said(learn, base, tasks, capsys):
    one = learn(base, tasks[0], protect="weights", max_steps=1)
    assert read_origin(one).statistics is None
    assert json.loads((one.parents[1] / "training.json").read_text())["statistics"] is None
    capsys.readouterr()
    two = learn(one, tasks[1], max_steps=1)
    said = capsys.readouterr().out
    assert f"statistics: {one} was tuned without protect='activations', or by an older release: what it knows" in said
    assert [part.name for part in load_statistics(read_origin(two).statistics.address).parts] == ["base", "letters"]


def test_statistics_that_are_gone_are_named_and_measured_again(learn, base, tasks, caplog):
    one = learn(base, tasks[0], max_steps=1)
    address = read_origin(one).statistics.address
    Path(address).unlink()
    caplog.clear()
    learn(one, tasks[1], max_steps=1)
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"statistics: {address}, which {one} carries, is not there any more")
    assert "statistics: measured base" in caplog.text


def test_statistics_are_found_in_the_store_that_was_moved(learn, base, tasks, tmp_path, capsys):
    shared = {"data_output_dir": str(tmp_path / "before")}
    one = learn(base, tasks[0], max_steps=1, **shared)
    (tmp_path / "before").rename(tmp_path / "after")
    learn(one, tasks[1], max_steps=1, data_output_dir=str(tmp_path / "after"))
    assert "statistics: base (512 tokens) and digits" in capsys.readouterr().out


def test_damaged_statistics_end_the_run_before_it_starts(learn, base, tasks):
    one = learn(base, tasks[0], max_steps=1)
    address = Path(read_origin(one).statistics.address)
    address.write_text(address.read_text().replace("digits", "digitz"))
    with pytest.raises(DamagedFile, match=address.name):
        learn(one, tasks[1], max_steps=1)


def test_statistics_of_fewer_weights_than_are_trained_now_are_not_used(learn, base, tasks, capsys):
    one = learn(base, tasks[0], max_steps=1, target_patterns=["q_proj", "k_proj"])
    two = learn(one, tasks[1], max_steps=1)
    assert "carries, has nothing of model.layers.0.self_attn.v_proj" in capsys.readouterr().out
    three = learn(two, tasks[0], max_steps=1, target_patterns=["q_proj"])
    statistics = load_statistics(read_origin(three).statistics.address)
    assert [part.name for part in statistics.parts] == ["base", "letters", "digits"]
    assert len({target for layer in statistics.layout for target in layer}) == 14, "more than what is trained"


def test_measuring_at_the_end_of_an_epoch_changes_no_later_step(learn, base, tasks):
    once, each = (
        learn(base, tasks[0], num_epochs=3, checkpoint_at_epoch=checkpoint_at_epoch)
        for checkpoint_at_epoch in (False, True)
    )
    losses = [
        [json.loads(line)["loss"] for line in (model.parents[1] / "metrics.jsonl").read_text().splitlines()]
        for model in (once, each)
    ]
    assert losses[0] == losses[1]
    assert read_origin(once).statistics.sha256 == read_origin(each).statistics.sha256


@pytest.mark.slow
def test_two_processes_measure_what_one_does(base, tasks, tmp_path, monkeypatch):
    def moments(processes: int) -> list[torch.Tensor]:
        result = osft(
            model_path=str(base),
            data_path=str(tasks[0]),
            protect="activations",
            calibration_tokens=256,
            unfreeze_rank_ratio=0.5,
            effective_batch_size=16,
            max_tokens_per_gpu=200,
            max_seq_len=128,
            learning_rate=5e-3,
            max_steps=2,
            nproc_per_node=processes,
            ckpt_output_dir=str(tmp_path / str(processes)),
            data_output_dir=str(tmp_path / "data"),
            save_dtype="float32",
        )
        statistics = load_statistics(read_origin(Path(result.checkpoint)).statistics.address)
        assert [part.name for part in statistics.parts] == ["base", "digits"]
        return [each.moment.dense() for each in statistics.inputs()]

    for one, two in zip(moments(1), moments(2), strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-3 * float(one.abs().max()))
