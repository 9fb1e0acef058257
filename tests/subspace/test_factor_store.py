"""The factor store: computed once, complete or absent, and only for the model that it was made for."""

import dataclasses
import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from osft.models.checkpoint import CheckpointReader
from osft.models.conversion import ModelWeights
from osft.models.loading import empty_model
from osft.settings.subspace import SubspaceConfig
from osft.storage.sealed import DamagedFile
from osft.subspace import decomposition, factor_store, last_round, select_targets
from osft.subspace.factor_set import FactorsMismatchError, check_settings, check_weights, load_factor_set
from osft.subspace.factor_store import precompute
from tests.conftest import tiny_llama
from tests.damage import cut, emptied, flipped
from tests.test_families import save_model

QUARTER = SubspaceConfig(unfreeze_rank_ratio=0.25)
TARGETS = select_targets(tiny_llama())


def stored_weights(folder: Path) -> ModelWeights:
    return ModelWeights(CheckpointReader(folder), empty_model(folder))


def test_second_run_computes_nothing_and_says_so(model_folder, tmp_path, capsys):
    first = precompute(model_folder, tmp_path, QUARTER)
    assert first.computed == 14
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")}
    second = precompute(model_folder, tmp_path, QUARTER)
    assert second.computed == 0
    assert second.path == first.path
    assert "computed 0, reused 14 of 14 weights" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")} == files


def test_factors_split_the_stored_weight(model_folder, tmp_path):
    factors = precompute(model_folder, tmp_path, QUARTER)
    target = "model.layers.1.mlp.up_proj"
    weight = CheckpointReader(model_folder).tensor(f"{target}.weight")
    frozen = weight @ factors.rows(target, "frozen", 0, weight.shape[1])
    free = factors.rows(target, "right", 0, weight.shape[1])
    torch.testing.assert_close(frozen.T @ frozen, torch.eye(frozen.shape[1]), rtol=0, atol=1e-4)
    assert (frozen.T @ weight @ free).norm() < 1e-5 * weight.norm()
    values = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(factors.spectrum(target).double(), values, rtol=1e-5, atol=1e-6)


def test_singular_values_of_stacked_experts_carry_their_whole_energy(tmp_path):
    save_model("qwen3_moe", tmp_path / "model")
    factors = precompute(tmp_path / "model", tmp_path / "store", QUARTER)
    target = "model.layers.0.mlp.experts.gate_up_proj"
    weight = stored_weights(tmp_path / "model").tensor(target)
    values = factors.spectrum(target)
    assert values.shape == (32,)
    assert values.norm().item() == pytest.approx(weight.norm().item(), rel=1e-5)


def test_one_changed_weight_is_the_only_one_recomputed(model_folder, tmp_path):
    precompute(model_folder, tmp_path / "store", QUARTER)
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    changed.save_pretrained(tmp_path / "changed")
    assert precompute(tmp_path / "changed", tmp_path / "store", QUARTER).computed == 1


def test_settings_have_factors_of_their_own(model_folder, tmp_path):
    quarter = precompute(model_folder, tmp_path, QUARTER)
    half = precompute(model_folder, tmp_path, SubspaceConfig(unfreeze_rank_ratio=0.5))
    core = precompute(model_folder, tmp_path, SubspaceConfig(unfreeze_rank_ratio=0.25, free_subspace="core"))
    assert half.computed == 14
    assert core.computed == 10  # the four square weights are split alike
    assert len({quarter.path, half.path, core.path}) == 3


def test_set_of_another_model_is_refused_with_weight_and_hash(model_folder, tmp_path):
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    factors = precompute(tmp_path / "other", tmp_path / "store", QUARTER)
    with pytest.raises(FactorsMismatchError, match=r"weight of model.layers.0.self_attn.q_proj has hash [0-9a-f]{12}"):
        check_weights(factors, stored_weights(model_folder), TARGETS)


def test_set_for_other_settings_is_refused(model_folder, tmp_path):
    factors = precompute(model_folder, tmp_path, QUARTER)
    with pytest.raises(FactorsMismatchError, match=r"made with unfreeze_rank_ratio=0.25, this run wants 0.5"):
        check_settings(factors, SubspaceConfig(unfreeze_rank_ratio=0.5), TARGETS)
    with pytest.raises(FactorsMismatchError, match="only the set has model.layers.0.mlp.down_proj"):
        check_settings(factors, QUARTER, [t for t in TARGETS if "layers.0.mlp.down" not in t.name])


def test_missing_factors_are_named(model_folder, tmp_path):
    factors = precompute(model_folder, tmp_path, QUARTER)
    factors.factors_file("model.layers.0.mlp.up_proj").unlink()
    with pytest.raises(FileNotFoundError, match=r"factors of model.layers.0.mlp.up_proj .* are missing"):
        load_factor_set(factors.path)
    assert precompute(model_folder, tmp_path, QUARTER).computed == 1


def header(file: Path) -> None:
    flipped(file, 20)


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize("damage", [cut, emptied, flipped, header, pointer])
def test_damaged_factors_are_named_and_computed_again(damage, model_folder, tmp_path, capsys):
    factors = precompute(model_folder, tmp_path, QUARTER)
    file = factors.factors_file("model.layers.0.mlp.up_proj")
    damage(file)
    with pytest.raises(
        DamagedFile, match=f"{file} is damaged: it does not hold the whole factors of model.layers.0.mlp"
    ):
        load_factor_set(factors.path)
    again = precompute(model_folder, tmp_path, QUARTER)
    assert f"factors: {file} is damaged" in capsys.readouterr().out
    assert again.computed == 1
    assert again.path == factors.path
    assert load_factor_set(factors.path).bases_sha256 == factors.bases_sha256


def test_factors_that_are_damaged_in_the_store_are_computed_and_published_again(model_folder, bucket, object_store):
    store = f"{bucket}/factors"
    factors = precompute(model_folder, store, QUARTER)
    address = f"{store}/{factors.weights['model.layers.0.mlp.up_proj'].file}"
    content = object_store.files.cat(address)
    object_store.files.pipe(address, content[:-8])
    manifest = f"{store}/sets/{factors.path.name}"
    with pytest.raises(DamagedFile, match=f"{address} is damaged"):
        load_factor_set(manifest)
    assert precompute(model_folder, store, QUARTER).computed == 1
    assert len(object_store.files.cat(address)) == len(content)
    assert load_factor_set(manifest).bases_sha256 == factors.bases_sha256


@pytest.mark.parametrize("damage", [cut, emptied, flipped, pointer])
def test_damaged_manifest_is_named_and_written_again(damage, model_folder, tmp_path):
    path = precompute(model_folder, tmp_path, QUARTER).path
    before = path.read_bytes()
    damage(path)
    with pytest.raises(DamagedFile, match=f"{path} is damaged.*run `precompute_svd` again"):
        load_factor_set(path)
    assert precompute(model_folder, tmp_path, QUARTER).computed == 0
    assert path.read_bytes() == before


def test_set_is_refused_when_its_bases_were_replaced_by_those_of_other_hardware(model_folder, tmp_path, monkeypatch):
    first = precompute(model_folder, tmp_path, QUARTER)
    file = first.factors_file("model.layers.0.mlp.up_proj")
    file.unlink()
    original = decomposition.decompose

    def elsewhere(*arguments):
        factors = original(*arguments)
        return dataclasses.replace(factors, right=-factors.right)

    monkeypatch.setattr(last_round, "decompose", elsewhere)
    second = precompute(model_folder, tmp_path, QUARTER)
    assert second.key != first.key, "the same weights, other bases: another set"
    assert second.bases_sha256 != first.bases_sha256
    with pytest.raises(FactorsMismatchError, match=f"other bases of model.layers.0.mlp.up_proj .* than .* {file}"):
        load_factor_set(first.path)


def test_factors_of_a_release_without_hashes_are_used(model_folder, tmp_path):
    factors = precompute(model_folder, tmp_path, QUARTER)
    for file in (tmp_path / "weights").iterdir():
        save_file(load_file(file), file)
    manifest = json.loads(factors.path.read_text())
    del manifest["sha256"]
    for weight in manifest["weights"].values():
        del weight["bases_sha256"]
    factors.path.write_text(json.dumps(manifest))
    assert load_factor_set(factors.path).bases_sha256 == factors.bases_sha256
    assert precompute(model_folder, tmp_path, QUARTER).computed == 0


def test_two_runs_that_compute_one_weight_both_use_the_file_that_came_first(model_folder, tmp_path, monkeypatch):
    write = factor_store.save_file
    other = precompute(model_folder, tmp_path / "other", QUARTER)

    def another_run_was_faster(tensors, path, metadata):
        name = metadata["weight"]
        target = tmp_path / other.weights[name].file
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(other.factors_file(name).read_bytes())
        write({key: -tensor for key, tensor in tensors.items()}, path, metadata=metadata)

    monkeypatch.setattr(factor_store, "save_file", another_run_was_faster)
    assert precompute(model_folder, tmp_path, QUARTER).bases_sha256 == other.bases_sha256


def test_run_that_dies_leaves_whole_files_only_and_is_continued(model_folder, tmp_path, monkeypatch):
    """In the middle of the sixth file; `tests/test_atomic.py` kills a process there."""
    written, write = [], factor_store.save_file

    def dies(tensors, path, metadata):
        written.append(path)
        if len(written) == 6:
            Path(path).write_bytes(b"half")
            os._exit(9)
        write(tensors, path, metadata=metadata)

    monkeypatch.setattr(factor_store, "save_file", dies)
    process = multiprocessing.get_context("fork").Process(target=precompute, args=(model_folder, tmp_path, QUARTER))
    process.start()
    process.join()
    assert process.exitcode == 9
    monkeypatch.undo()
    assert not (tmp_path / "sets").exists(), "the manifest is written last"
    complete = list(tmp_path.glob("weights/*.safetensors"))
    assert len(complete) == 5
    assert all("singular_values" in load_file(file) for file in complete)
    assert precompute(model_folder, tmp_path, QUARTER).computed == 14 - 5


def test_incomplete_model_is_refused_before_anything_is_written(model_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        precompute(tmp_path / "nowhere", tmp_path / "store", QUARTER)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="no safetensors weights"):
        precompute(tmp_path / "empty", tmp_path / "store", QUARTER)
    assert not (tmp_path / "store").exists()
