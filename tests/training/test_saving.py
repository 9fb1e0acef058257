"""The saved model is the trained model: exact beside what is served, byte for byte where nothing was learned."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from osft import osft
from osft.cli import app
from osft.evaluation.evaluate import evaluate, load_set
from osft.models.checkpoint import EXACT, CheckpointReader
from osft.models.origin import read_origin
from osft.training import block_moments, loop
from tests.conftest import arithmetic, byte_tokenizer, tiny_llama, write_jsonl
from tests.training.in_process import run_in_process

RATE = 5e-6
"""A learning rate at which most of an update is below half a unit of bfloat16."""
LAYERS = [
    *(f"model.layers.{block}.self_attn.{kind}_proj" for block in range(2) for kind in "qkvo"),
    *(f"model.layers.{block}.mlp.{kind}_proj" for block in range(2) for kind in ("gate", "up", "down")),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """The same weights, representable in bfloat16, in two dtypes; and weights that are not."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("bfloat16", "float32", "full")}
    data = write_jsonl(tmp_path_factory.mktemp("data") / "few.jsonl", arithmetic(24))
    model = tiny_llama()
    model.save_pretrained(folders["full"])
    model.to(torch.bfloat16).save_pretrained(folders["bfloat16"])
    model.float().save_pretrained(folders["float32"])
    for folder in folders.values():
        byte_tokenizer().save_pretrained(folder)
    return folders | {"data": data}


@pytest.fixture
def train(bases, chats, tmp_path, monkeypatch):
    run_in_process(monkeypatch)
    count = 0

    def train_on(model: str | Path, **changes):
        nonlocal count
        count += 1
        given = {
            "model_path": str(bases.get(model, model)),
            "data_path": str(chats),
            "unfreeze_rank_ratio": 0.25,
            "effective_batch_size": 24,
            "max_tokens_per_gpu": 2048,
            "max_seq_len": 128,
            "learning_rate": RATE,
            "ckpt_output_dir": str(tmp_path / f"run-{count}"),
            "data_output_dir": str(tmp_path / "data"),
            "lr_scheduler": "constant",
            "max_steps": 5,
        }
        return osft(**(given | changes))

    return train_on


def served(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def exact_update(base: Path, tuned: Path, layer: str) -> torch.Tensor:
    before, after = (CheckpointReader(folder).tensor(f"{layer}.weight").double() for folder in (base, tuned))
    return after - before


def leak(base: Path, update: torch.Tensor, layer: str, ratio: float = 0.25) -> float:
    """The larger share of an update that lies in the frozen directions of either side, by a full SVD."""
    weight = CheckpointReader(base).tensor(f"{layer}.weight").double()
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    frozen = min(weight.shape) - round(ratio * min(weight.shape))
    sides = (left[:, :frozen].T @ update).norm(), (update @ right[:frozen].T).norm()
    return (max(sides) / update.norm()).item()


def float32_noise(base: Path, update: torch.Tensor, layer: str) -> float:
    """The share of an update that float32 itself gets wrong: half a unit of the largest weight in every entry."""
    largest = CheckpointReader(base).tensor(f"{layer}.weight").abs().max().item()
    return 2.0**-24 * largest * update.numel() ** 0.5 / update.norm().item()


@pytest.mark.parametrize("rate", [5e-6, 2e-5, 1e-4])
def test_exact_update_of_a_bfloat16_model_does_not_leak_and_the_served_one_is_measured(train, bases, rate):
    result = train("bfloat16", learning_rate=rate, save_rounding="nearest")
    base, tuned = bases["bfloat16"], result.checkpoint
    assert AutoModelForCausalLM.from_pretrained(tuned).dtype == torch.bfloat16
    origin = read_origin(tuned)
    total = {"update": 0.0, "error": 0.0}
    for layer in LAYERS:
        update = exact_update(base, tuned, layer)
        assert leak(base, update, layer) < 1e-6 + float32_noise(base, update, layer)
        rounded = served(tuned)[f"{layer}.weight"].double() - served(base)[f"{layer}.weight"].double()
        loss = origin.weights[layer]
        lost = 1 - (rounded * update).sum() / update.square().sum()
        error = (rounded - update).norm() / update.norm()
        assert loss.update_lost == pytest.approx(lost.item(), abs=2e-3)
        assert loss.rounding_error == pytest.approx(error.item(), rel=2e-3)
        if rounded.any():
            assert loss.frozen_share >= leak(base, rounded, layer) - 1e-3
            assert loss.frozen_share <= 1
        total["update"] += update.square().sum().item()
        total["error"] += (rounded - update).square().sum().item()
        shown = result.rank_layout[layer]
        assert (shown.update_lost, shown.frozen_share) == (loss.update_lost, loss.frozen_share)
    assert origin.total.rounding_error == pytest.approx((total["error"] / total["update"]) ** 0.5, rel=2e-3)
    assert origin.total.update_lost > {5e-6: 0.6, 2e-5: 0.3, 1e-4: 0.02}[rate], "else there was nothing to keep"
    assert result.saved.update_lost == origin.total.update_lost
    assert f"saved       bfloat16, rounded (nearest): {origin.total.update_lost:.1%} of the update" in repr(result)
    last = result.history[-1]
    assert (last["update_lost"], last["frozen_share"]) == (origin.total.update_lost, origin.total.frozen_share)


def test_five_rounds_of_five_tiny_steps_learn_in_bfloat16_what_they_learn_in_float32(train, bases):
    """Each round starts from the exact weights of the one before. Rounded, the sum of the steps would not arrive."""
    final, learned = {}, {}
    for kind in ("bfloat16", "float32"):
        model = bases[kind]
        losses = []
        for _ in range(5):
            result = train(model, data_path=str(bases["data"]), num_epochs=5)
            losses += [line["loss"] for line in result.history]
            model = result.checkpoint
        final[kind], learned[kind] = losses[-1], losses[0] - losses[-1]
        updates = [exact_update(bases[kind], model, layer) for layer in LAYERS]
        learned[f"{kind} update"] = torch.cat([update.flatten() for update in updates])
    assert learned["float32"] > 1e-3, "the steps are too small to show anything"
    assert learned["bfloat16"] == pytest.approx(learned["float32"], rel=0.01)
    assert final["bfloat16"] == pytest.approx(final["float32"], rel=1e-5)
    difference = learned["bfloat16 update"] - learned["float32 update"]
    assert difference.norm() < 0.01 * learned["float32 update"].norm()


def test_round_from_a_folder_without_the_residual_starts_from_rounded_weights_and_says_so(train, capsys, tmp_path):
    first = train("bfloat16").checkpoint
    exact = train(first)
    assert f"starts from the exact weights of {first}" in capsys.readouterr().out
    assert read_origin(exact.checkpoint).starts_from_exact
    (first / EXACT).rename(tmp_path / "elsewhere")
    rounded = train(first)
    assert "starts from weights that are rounded to bfloat16" in capsys.readouterr().out
    assert not read_origin(rounded.checkpoint).starts_from_exact
    assert rounded.history[0]["loss"] != exact.history[0]["loss"]


def test_resumed_run_continues_from_exact_weights(train, tmp_path, monkeypatch):
    first = train("bfloat16", learning_rate=1e-4).checkpoint
    whole = train(first)
    original = loop.train_step

    def dies(*args, **options):
        if (tmp_path / "broken" / "state").is_dir():
            raise OSError("the pod is gone")
        return original(*args, **options)

    broken = {"ckpt_output_dir": str(tmp_path / "broken"), "save_state_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dies)
        with pytest.raises(OSError, match="the pod is gone"):
            train(first, **broken)
    resumed = train(first, **broken)
    assert [line["loss"] for line in resumed.history] == [line["loss"] for line in whole.history]
    one, other = CheckpointReader(resumed.checkpoint), CheckpointReader(whole.checkpoint)
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in one.names())


@pytest.mark.parametrize(("base", "dtype"), [("bfloat16", "auto"), ("full", "bfloat16"), ("full", "float32")])
def test_without_learning_the_saved_weights_are_the_bases_byte_for_byte(train, bases, base, dtype):
    tuned = train(base, learning_rate=0.0, dtype=dtype, max_steps=1).checkpoint
    assert (tuned / "config.json").read_bytes() == (bases[base] / "config.json").read_bytes()
    assert not (tuned / EXACT).exists()
    before, after = served(bases[base]), served(tuned)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert read_origin(tuned).total.update_lost is None


def test_without_learning_the_residual_of_an_earlier_round_is_handed_on(train):
    first = train("bfloat16").checkpoint
    second = train(first, learning_rate=0.0, max_steps=1).checkpoint
    before, after = CheckpointReader(first), CheckpointReader(second)
    assert before.is_exact
    for name in before.names():
        assert torch.equal(before.tensor(name), after.tensor(name))
        assert torch.equal(before.served(name), after.served(name))


def test_float32_base_that_is_computed_in_bfloat16_keeps_its_bits(train, bases):
    """The forward pass uses rounded weights; they are not what is saved."""
    tuned = train("full", dtype="bfloat16").checkpoint
    for layer in LAYERS:
        update = exact_update(bases["full"], tuned, layer)
        weight = served(bases["full"])[f"{layer}.weight"]
        assert update.norm() < 0.1 * (weight.bfloat16() - weight).norm(), "rounding would be larger"
        assert leak(bases["full"], update, layer) < 1e-6 + float32_noise(bases["full"], update, layer)
    kept = set(served(tuned)) - {f"{layer}.weight" for layer in LAYERS}
    assert kept
    assert all(torch.equal(served(tuned)[name], served(bases["full"])[name]) for name in kept)


@pytest.mark.covers("save_dtype")
@pytest.mark.parametrize(
    ("base", "save_dtype", "stored"),
    [
        ("bfloat16", "auto", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("full", "bfloat16", "bfloat16"),
        ("full", "auto", "float32"),
    ],
)
def test_save_dtype_is_that_of_the_files_and_of_config_json(train, bases, base, save_dtype, stored):
    reference = train(base, save_dtype="float32")
    result = train(base, save_dtype=save_dtype)
    assert {str(tensor.dtype) for tensor in served(result.checkpoint).values()} == {f"torch.{stored}"}
    assert json.loads((result.checkpoint / "config.json").read_text())["dtype"] == stored
    model = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    assert str(model.dtype) == f"torch.{stored}"
    exact, expected = CheckpointReader(result.checkpoint), served(reference.checkpoint)
    for name in expected:  # what was not trained, too: rounding a float32 base takes from every tensor
        torch.testing.assert_close(exact.tensor(name).float(), expected[name], rtol=0, atol=6e-8)  # below 1
    assert (result.checkpoint / EXACT).exists() == (stored == "bfloat16")
    assert result.summary.saved.rounding == ("stochastic" if stored == "bfloat16" else "none")


@pytest.mark.covers("save_rounding", "seed")
def test_stochastic_rounding_keeps_the_update_on_average_and_repeats(train, bases):
    nearest, stochastic, again, other = (
        train("bfloat16", save_rounding=how, seed=seed, data_path=str(bases["data"]), effective_batch_size=12)
        for how, seed in (("nearest", 1), ("stochastic", 1), ("stochastic", 1), ("stochastic", 2))
    )
    assert (nearest.saved.rounding, stochastic.saved.rounding) == ("nearest", "stochastic")
    assert nearest.saved.update_lost > 0.6
    assert abs(stochastic.saved.update_lost) < 0.2
    name = "model.layers.0.mlp.up_proj.weight"
    one, same, different = (served(result.checkpoint)[name] for result in (stochastic, again, other))
    assert torch.equal(one, same)
    assert not torch.equal(one, different)
    readers = [CheckpointReader(result.checkpoint) for result in (nearest, stochastic)]
    exact = [reader.tensor(name) for reader in readers]
    torch.testing.assert_close(*exact, rtol=0, atol=6e-8, msg="what is learned does not depend on how it is served")


@pytest.mark.covers("save_rounding", "calibration_samples")
def test_compensated_rounding_keeps_more_of_what_layers_compute_than_nearest(train, bases, monkeypatch):
    counted = []
    original = block_moments.measure_inputs
    monkeypatch.setattr(
        block_moments, "measure_inputs", lambda *given, **named: counted.append(1) or original(*given, **named)
    )
    settings = {"data_path": str(bases["data"]), "learning_rate": 2e-5, "calibration_samples": 6}
    nearest = train("bfloat16", save_rounding="nearest", **settings)
    assert counted == []
    compensated = train("bfloat16", save_rounding="compensated", **settings)
    assert len(counted) == 2, "a pass over the samples for each block"
    assert compensated.saved.rounding == "compensated"
    assert compensated.saved.update_lost < nearest.saved.update_lost
    one_set = [load_set(str(bases["data"]), "new task")]
    (task,) = (one.name for one in one_set)
    gains = []
    for result in (nearest, compensated):
        found = evaluate({"base": str(bases["bfloat16"]), "candidate": str(result.checkpoint)}, one_set, num_examples=0)
        base, exact = found.results["base"][task].loss, found.exact.loss
        gains.append((base - found.results["candidate"][task].loss) / (base - exact))
    assert gains[1] > gains[0] + 0.05


def test_weights_that_were_changed_beside_their_residual_are_refused(train):
    first = train("bfloat16").checkpoint
    tensors = served(first)
    tensors["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(tensors, first / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"exact does not belong to the weights beside it: model.layers.1.mlp.up_proj"):
        train(first)


@pytest.mark.parametrize("damage", ["manifest", "missing file", "another format", "another model"])
def test_damaged_residual_is_refused_with_its_name(train, damage):
    first = train("bfloat16", max_steps=1).checkpoint
    manifest = first / EXACT / "manifest.json"
    content = json.loads(manifest.read_text())
    if damage == "manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif damage == "missing file":
        next((first / EXACT).glob("*.safetensors")).unlink()
    elif damage == "another format":
        manifest.write_text(json.dumps(content | {"format": 99}))
    else:
        content["tensors"]["nowhere"] = next(iter(content["tensors"].values()))
        manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="exact"):
        train(first)


def test_evaluation_measures_what_is_served_and_beside_it_what_was_learned(train, bases, chats):
    served_model = train("bfloat16", learning_rate=2e-5, save_rounding="nearest").checkpoint
    exact_model = train("float32", learning_rate=2e-5).checkpoint
    one_set = [load_set(str(chats), "new task", max_samples=40)]
    (task,) = (one.name for one in one_set)
    found, reference = (
        evaluate({"base": str(bases[kind]), "candidate": str(tuned)}, one_set, num_examples=0)
        for kind, tuned in (("bfloat16", served_model), ("float32", exact_model))
    )
    assert reference.exact is None, "it is what is served"
    expected = reference.results["candidate"][task].loss
    assert found.exact.loss == pytest.approx(expected, rel=1e-6)
    base = found.results["base"][task].loss
    assert base - found.exact.loss > 1.1 * (base - found.results["candidate"][task].loss)
    command = ["evaluate", str(bases["bfloat16"]), str(served_model), str(chats), "--max-samples", "40"]
    shown = CliRunner().invoke(app, command)
    assert f"The exact weights, before they were rounded to be served: {found.exact.loss:.4f}" in shown.output


def test_lineage_leads_to_the_first_base_model(train, bases):
    first = train("bfloat16", max_steps=1).checkpoint
    second = train(first, max_steps=1).checkpoint
    assert read_origin(second).base_model == str(bases["bfloat16"])
    assert read_origin(second).trained_from == str(first)
