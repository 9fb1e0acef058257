"""The factors of a second round follow from those of the first one (protect="weights"), and only where they do."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from osft.models.checkpoint import CheckpointReader
from osft.models.origin import read_origin
from osft.settings.subspace import SubspaceConfig
from osft.subspace.factor_set import load_factor_set
from osft.subspace.factor_store import precompute
from tests.conftest import byte_tokenizer, tiny_llama, write_jsonl
from tests.damage import flipped
from tests.training.in_process import run_in_process


def learn(model: Path, folder: Path, answer: str, **changes) -> Path:
    """A round of `osft()`; the model's folder."""
    from osft import osft

    chats = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": answer * (n % 3 + 1)}]}
        for n in range(32)
    ]
    given = {
        "model_path": str(model),
        "data_path": str(write_jsonl(folder.with_suffix(".jsonl"), chats)),
        "data_output_dir": str(folder.parent / "data"),
        "ckpt_output_dir": str(folder),
        "unfreeze_rank_ratio": 0.25,
        "effective_batch_size": 16,
        "max_tokens_per_gpu": 1000,
        "max_seq_len": 64,
        "learning_rate": 1e-3,
        "num_epochs": 4,
    }
    return Path(osft(**given | changes).checkpoint)


@pytest.fixture
def first(tmp_path, monkeypatch) -> Path:
    """The model of a first round, kept in bfloat16 with its residual."""
    run_in_process(monkeypatch)
    tiny_llama(hidden_size=96, intermediate_size=192).bfloat16().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return learn(tmp_path / "base", tmp_path / "one", "yes")


def test_second_round_learns_the_same_as_with_factors_computed_anew(first, tmp_path, capsys):
    named = read_origin(first).factors
    capsys.readouterr()
    second = learn(first, tmp_path / "two", "no")
    assert f"14 of the 14 computed follow from the last round's ({named})" in capsys.readouterr().out
    factors = load_factor_set(read_origin(second).factors)
    for target in factors.weights:
        split, weight = factors.factors(target), CheckpointReader(first).tensor(f"{target}.weight")
        for basis in (split.left, split.right):
            if basis is not None:
                torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)
        values = torch.linalg.svdvals(weight.double())
        torch.testing.assert_close(split.singular_values.double(), values, rtol=1e-5, atol=1e-6)
        if split.frozen is not None:
            tall = weight if weight.shape[0] > weight.shape[1] else weight.T
            free = split.right if split.left is None else split.left
            assert (split.frozen.T @ tall.T @ tall @ free).norm() < 1e-5 * weight.norm()

    shutil.copytree(first, tmp_path / "alone")
    origin = json.loads((first / "osft.json").read_text())
    (tmp_path / "alone" / "osft.json").write_text(json.dumps(origin | {"factors": None}))
    anew = learn(tmp_path / "alone", tmp_path / "anew", "no", data_output_dir=str(tmp_path / "elsewhere"))
    assert "follow from" not in capsys.readouterr().out
    start, one, other = (CheckpointReader(folder) for folder in (first, second, anew))
    for target in factors.weights:
        before, found, expected = (reader.tensor(f"{target}.weight") for reader in (start, one, other))
        assert (expected - before).norm() > 1e-3
        assert (found - expected).norm() < 1e-2 * (expected - before).norm(), target


def test_what_does_not_follow_is_decomposed_and_named(first, tmp_path, capsys):
    quarter = SubspaceConfig(unfreeze_rank_ratio=0.25)
    before = load_factor_set(read_origin(first).factors)
    damaged, target = before.factors_file("model.layers.0.mlp.up_proj"), "model.layers.1.self_attn.q_proj"
    flipped(damaged)
    capsys.readouterr()
    assert precompute(first, tmp_path / "store", quarter).computed == 14
    said = capsys.readouterr().out
    assert f"model.layers.0.mlp.up_proj is decomposed: {damaged} " in said
    assert "13 of the 14 computed follow" in said

    rounded = shutil.copytree(first, tmp_path / "rounded")
    shutil.rmtree(rounded / "exact")  # the weights are then as they are served
    found = precompute(rounded, tmp_path / "other", quarter)
    said = capsys.readouterr().out
    assert f"{target} is decomposed, its split does not follow from the last round's" in said
    assert "of the 14 computed follow" not in said
    weight = CheckpointReader(rounded).tensor(f"{target}.weight").double()
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(found.spectrum(target).double(), values, rtol=1e-5, atol=1e-6)

    core = quarter.replace(free_subspace="core")
    assert precompute(first, tmp_path / "third", core).computed == 14
    assert "has another kind of split" in capsys.readouterr().out
    before.path.unlink()
    assert precompute(first, tmp_path / "fourth", quarter).computed == 14
    said = capsys.readouterr().out
    assert f"the last round's ({before.path}) are not there any more" in said
    assert "follow from" not in said
