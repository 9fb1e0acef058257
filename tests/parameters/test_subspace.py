"""What the parameters of the subspace do."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import osft as package
from osft.checkpoint import CheckpointReader


@pytest.mark.covers("unfreeze_rank_ratio")
def test_ratio_sets_the_number_of_unfrozen_directions(call):
    layouts = {ratio: call(unfreeze_rank_ratio=ratio, max_steps=1).rank_layout for ratio in (0.25, 1.0)}
    for ratio, layout in layouts.items():
        assert {weight["unfrozen"] for weight in layout.values()} == {
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
    assert core.summary["trainable_parameters"] < 0.5 * complement.summary["trainable_parameters"]


@pytest.mark.covers("rank_allocation", "min_retention_ratio", "calibration_samples")
def test_adaptive_ranks_differ_between_blocks(call, tmp_path):
    half = {"unfreeze_rank_ratio": 0.5, "rank_allocation": "adaptive", "max_steps": 1}
    adaptive = call(**half)
    ranks = {name: weight["unfrozen"] for name, weight in adaptive.rank_layout.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] != ranks["model.layers.1.self_attn.q_proj"]
    flat = call(**half, min_retention_ratio=0.5).rank_layout
    assert {flat[f"model.layers.{i}.self_attn.q_proj"]["unfrozen"] for i in (0, 1)} == {16}, "none is below the mean"
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
