"""What the parameters of the model, its kernels and processes do."""

import importlib.util
import json

import pytest
import torch

from osft.training import worker
from tests.conftest import byte_tokenizer, tiny_llama
from tests.parameters.conftest import losses


@pytest.mark.covers("gradient_checkpointing", "attn_implementation", "dtype", "use_liger")
def test_model_is_loaded_as_told(call, monkeypatch):
    models = []
    original = worker.load_sharded

    def spy(*args, **options):
        models.append(original(*args, **options))
        return models[-1]

    monkeypatch.setattr(worker, "load_sharded", spy)
    reference = call(max_steps=2)
    other = call(max_steps=2, gradient_checkpointing=True, attn_implementation="eager")
    plain, changed = models[0][0], models[1][0]
    assert (plain.is_gradient_checkpointing, changed.is_gradient_checkpointing) == (False, True)
    unasked = "sdpa" if torch.cuda.is_available() else "osft_each"  # osft.models.packed_attention
    assert (plain.config._attn_implementation, changed.config._attn_implementation) == (unasked, "eager")
    assert losses(other) == pytest.approx(losses(reference), rel=1e-4)
    assert plain.dtype == torch.float32
    assert reference.summary.liger is torch.cuda.is_available()


@pytest.mark.covers("use_liger")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("installed", "lacking"), [(True, "a CUDA GPU"), (False, "the package liger-kernel")])
def test_liger_that_cannot_run_is_refused_before_training(call, tmp_path, monkeypatch, installed, lacking):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: installed or None if name == "liger_kernel" else find(name)
    )
    with pytest.raises(ValueError, match=f"use_liger=True needs {lacking}"):
        call(use_liger=True)
    assert not (tmp_path / "run-1").exists()
    assert call(use_liger=False, max_steps=1).summary.liger is False
    assert call(use_liger=None, max_steps=1).summary.liger is False, "on only where both are there"


@pytest.mark.covers("torch_compile")
def test_blocks_are_compiled_where_it_is_asked_for(call, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function.__self__) or function)
    reference = call(max_steps=2)
    assert not compiled
    other = call(max_steps=2, torch_compile=True)
    assert [type(block).__name__ for block in compiled] == ["LlamaDecoderLayer"] * 2
    assert losses(other) == losses(reference)


@pytest.mark.covers("torch_compile")
def test_compiling_without_a_compiler_is_refused_before_training(call, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"torch_compile=True needs a C\+\+ compiler"):
        call(torch_compile=True)
    assert not (tmp_path / "run-1").exists()


@pytest.mark.covers("trust_remote_code")
def test_code_of_the_model_runs_only_with_trust(call, tmp_path):
    folder = tmp_path / "custom"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "modeling_custom.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class CustomConfig(LlamaConfig):\n    model_type = 'custom_llama'\n"
        "class CustomForCausalLM(LlamaForCausalLM):\n    config_class = CustomConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "custom_llama",
        "auto_map": {
            "AutoConfig": "modeling_custom.CustomConfig",
            "AutoModelForCausalLM": "modeling_custom.CustomForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        call(model_path=str(folder), max_steps=1)
    assert len(call(model_path=str(folder), max_steps=1, trust_remote_code=True).history) == 1


@pytest.mark.covers("nproc_per_node")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_processes_per_node_by_word(call):
    assert call(nproc_per_node="auto", max_steps=1).summary.world_size == 1
    with pytest.raises(ValueError, match="nproc_per_node is 'gpu', but there is no GPU"):
        call(nproc_per_node="gpu")
