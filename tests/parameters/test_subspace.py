"""What the parameters of the subspace do."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import osft as package
from osft.models.checkpoint import CheckpointReader
from osft.subspace.factor_set import load_factor_set
from osft.subspace.statistics_store import load_statistics


@pytest.mark.covers("unfreeze_rank_ratio")
def test_ratio_sets_the_number_of_unfrozen_directions(call):
    layouts = {ratio: call(unfreeze_rank_ratio=ratio, max_steps=1).rank_layout for ratio in (0.25, 1.0)}
    for ratio, layout in layouts.items():
        assert {weight.unfrozen for weight in layout.values()} == {
            round(ratio * size)
            for size in (16, 32)  # of the key and value projections, and of all others
        }
    with pytest.raises(ValueError, match="nothing to train"):
        call(unfreeze_rank_ratio=0)
    with pytest.raises(ValueError, match="unfreeze_rank_ratio must be between 0.0 and 1.0, got 1.2"):
        call(unfreeze_rank_ratio=1.2)


@pytest.mark.covers("target_patterns")
def test_only_weights_that_match_a_pattern_change(call, model_folder):
    result = call(target_patterns=["q_proj", r"layers\.1\.mlp\.up"], save_final_checkpoint=True)
    expected = {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    assert set(result.rank_layout) == expected
    base, tuned = CheckpointReader(model_folder), CheckpointReader(result.checkpoint)
    names = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    changed = {name for name in names if name in base and not torch.equal(base.tensor(name), tuned.tensor(name))}
    assert changed == {f"{name}.weight" for name in expected}


@pytest.mark.covers("free_subspace")
def test_core_trains_fewer_coefficients(call):
    complement, core = call(max_steps=1), call(max_steps=1, free_subspace="core")
    assert core.summary.trainable_parameters < 0.5 * complement.summary.trainable_parameters


@pytest.mark.covers("rank_allocation", "min_retention_ratio", "calibration_samples")
def test_adaptive_ranks_differ_between_blocks(call, tmp_path):
    half = {"unfreeze_rank_ratio": 0.5, "rank_allocation": "adaptive", "max_steps": 1}
    adaptive = call(**half)
    ranks = {name: weight.unfrozen for name, weight in adaptive.rank_layout.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] != ranks["model.layers.1.self_attn.q_proj"]
    flat = call(**half, min_retention_ratio=0.5).rank_layout
    assert {flat[f"model.layers.{i}.self_attn.q_proj"].unfrozen for i in (0, 1)} == {16}, "none is below the mean"
    call(**half, calibration_samples=1)
    manifests = [json.loads(file.read_text()) for file in (tmp_path / "data" / "factors" / "sets").iterdir()]
    assert len({json.dumps(manifest["importance"]) for manifest in manifests}) == 2, "one sample, another importance"


@pytest.mark.covers("factors")
def test_precomputed_factors_are_used(call, model_folder, tmp_path):
    from osft.subspace.factor_store import precompute

    made = precompute(model_folder, tmp_path / "store", package.SubspaceConfig(unfreeze_rank_ratio=0.25))
    call(factors=str(made.path), max_steps=1)
    assert not (tmp_path / "data" / "factors").exists()
    call(factors=str(tmp_path / "store"), unfreeze_rank_ratio=0.5, max_steps=1)
    assert len(list((tmp_path / "store" / "sets").iterdir())) == 2, "what a store lacks is computed into it"
    with pytest.raises(FileNotFoundError, match="there is no factor set"):
        call(factors=str(tmp_path / "store" / "sets" / "missing.json"))
    with pytest.raises(ValueError, match="was made with unfreeze_rank_ratio=0.25, this run wants 0.5"):
        call(factors=str(made.path), unfreeze_rank_ratio=0.5)


def activations(call, **changes):
    """A run with the directions of the inputs frozen that a short text of the model's own uses."""
    return call(**({"protect": "activations", "calibration_tokens": 256} | changes))


def statistics_of(result):
    """The statistics that a run's factors were computed from, and their manifest."""
    factors = load_factor_set(factor_file(result))
    return load_statistics(factors.path.parent.parent / factors.statistics)


def factor_file(result):
    """The manifest of the factor set of a run: the one that has its bases."""
    made_of = json.loads((result.output_dir / "config.json").read_text())["made_of"]
    sets = sorted(result.output_dir.parent.glob("data/factors/sets/*.json"))
    (found,) = [file for file in sets if load_factor_set(file).bases_sha256 == made_of["factors"]]
    return found


@pytest.mark.covers("protect", "calibration_tokens")
def test_updates_are_zero_on_the_inputs_that_carry_most_energy(call, model_folder):
    # Not held back: of a small update, the float32 of the weights that are written leaves a part everywhere.
    result = activations(call, save_final_checkpoint=True, save_dtype="float32", stiffness=0.0)
    statistics = statistics_of(result)
    assert [part.num_tokens for part in statistics.parts] == [256]
    base, tuned = CheckpointReader(model_folder), CheckpointReader(result.checkpoint)
    for inputs in statistics.inputs():
        moment = inputs.moment
        for target in inputs.targets:
            update = (tuned.tensor(f"{target}.weight") - base.tensor(f"{target}.weight")).double()
            frozen = moment.basis[:, : moment.size - round(0.25 * moment.size)].double()
            assert update.norm() > 0
            assert (update @ frozen).norm() < 1e-4 * update.norm()


@pytest.mark.covers("calibration_seed", "calibration_temperature")
def test_the_model_writes_another_text_with_another_seed_or_temperature(call):
    settings = ({}, {"calibration_seed": 1}, {"calibration_temperature": 0.5})
    results = [activations(call, max_steps=1, **changes) for changes in settings]
    texts = [statistics_of(result).parts[0].text_sha256 for result in results]
    assert len(set(texts)) == 3


@pytest.mark.covers("calibration_data")
def test_given_records_are_measured_beside_or_instead_of_the_text(call, chats):
    beside = statistics_of(activations(call, max_steps=1, calibration_data=str(chats)))
    instead = statistics_of(activations(call, max_steps=1, calibration_data=str(chats), calibration_tokens=0))
    assert [part.name for part in beside.parts] == ["base", "calibration_data"]
    assert [part.name for part in instead.parts] == ["calibration_data"]
    assert beside.parts[1].text_sha256 != beside.parts[0].text_sha256
    with pytest.raises(ValueError, match="calibration_tokens=0 without calibration_data"):
        activations(call, calibration_tokens=0)
    with pytest.raises(ValueError, match="calibration_data is of use with protect='activations' only"):
        call(calibration_data=str(chats))


@pytest.mark.covers("stiffness")
def test_stiffness_shortens_updates(call):
    def norm(stiffness: float) -> float:
        layout = activations(call, stiffness=stiffness).rank_layout
        return sum(weight.update_norm**2 for weight in layout.values())

    free, stiff = norm(0.0), norm(1e4)
    assert 0 < stiff < 0.9 * free


def test_statistics_are_measured_once(call, capfd):
    activations(call, max_steps=1)
    activations(call, max_steps=2)
    output = capfd.readouterr().out
    assert output.count("statistics: measured base (256 tokens)") == 1
    assert output.count("statistics: reused") == 1
