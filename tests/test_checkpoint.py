"""Checkpoints whose names and layouts are not those of the model: read, written back, or refused with a remedy."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Glm4MoeConfig, conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter

from osft.models.checkpoint import CheckpointReader, tensor_sha256
from osft.models.conversion import ModelWeights
from osft.models.loading import empty_model
from osft.settings.subspace import SubspaceConfig
from osft.subspace.factor_store import precompute
from osft.training.saving import save_merged
from tests.conftest import tiny_llama
from tests.test_families import COMMON, load, logits, save_model, train_config, train_here

CPU = torch.device("cpu")


def rewrite(folder: Path, change) -> dict[str, torch.Tensor]:
    """Replace the stored tensors by `change(tensors)`."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def set_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def stored_weights(folder: Path) -> ModelWeights:
    return ModelWeights(CheckpointReader(folder), empty_model(folder))


def train_and_save(folder: Path, tuned: Path, **subspace: object) -> nn.Module:
    config = train_config(folder, num_epochs=2, **subspace)
    model, stored = load(config)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    train_here(config, model)
    save_merged(model, stored, tuned)
    return model


def test_names_without_the_models_prefix_and_tensors_of_older_versions_are_kept(tmp_path):
    """As GPT-2 is published."""
    folder, tuned = tmp_path / "model", tmp_path / "tuned"
    save_model("gpt2", folder)
    mask = torch.tril(torch.ones(1, 1, 64, 64))
    before = rewrite(
        folder,
        lambda tensors: (
            {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
            | {"h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)}
        ),
    )
    model = train_and_save(folder, tuned)
    after = load_file(tuned / "model.safetensors")
    assert after.keys() == before.keys()
    assert torch.equal(after["h.0.attn.bias"], mask)
    assert after["h.0.attn.masked_bias"] == -1e4
    assert not torch.equal(after["h.1.mlp.c_fc.weight"], before["h.1.mlp.c_fc.weight"])
    found = logits(AutoModelForCausalLM.from_pretrained(tuned))
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-5)


def test_rows_of_a_stack_are_experts_and_read_no_other(tmp_path, monkeypatch):
    save_model("qwen3_moe", tmp_path / "model")
    stored = stored_weights(tmp_path / "model")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole = stored.tensor(name)
    parts = [
        torch.cat(
            [stored.reader.tensor(f"model.layers.1.mlp.experts.{i}.{kind}_proj.weight") for kind in ("gate", "up")]
        )
        for i in range(3)
    ]
    assert torch.equal(whole, torch.stack(parts))
    read: list[str] = []
    tensor = stored.reader.tensor
    monkeypatch.setattr(stored.reader, "tensor", lambda stored_name: read.append(stored_name) or tensor(stored_name))
    assert torch.equal(stored.rows(name, 1, 3), whole[1:3])
    assert {stored_name.split(".")[5] for stored_name in read} == {"1", "2"}
    assert stored.rows(name, 3, 3).shape == (0, 48, 32)


def test_experts_in_bfloat16_and_several_files_keep_both(tmp_path):
    folder, tuned = tmp_path / "model", tmp_path / "tuned"
    save_model("qwen3_moe", folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    train_and_save(folder, tuned)
    base, after = CheckpointReader(folder), CheckpointReader(tuned)
    assert sorted(after.names()) == sorted(base.names())
    changed = "model.layers.0.mlp.experts.2.down_proj.weight"
    assert not torch.equal(after.tensor(changed), base.tensor(changed))
    assert {after.served_dtype(name) for name in after.names()} == {torch.bfloat16}


@pytest.fixture
def fused_llama(tmp_path: Path) -> Iterator[Path]:
    """A Llama whose checkpoint stores query, key and value of a layer in one tensor."""
    folder = tmp_path / "model"
    kinds = [f"self_attn.{kind}_proj.weight" for kind in "qkv"]
    converter = WeightConverter("self_attn.qkv.weight", kinds, operations=[Chunk(dim=0)])
    tiny_llama(num_key_value_heads=4).save_pretrained(folder)

    def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for layer in range(2):
            parts = [tensors.pop(f"model.layers.{layer}.{kind}") for kind in kinds]
            tensors[f"model.layers.{layer}.self_attn.qkv.weight"] = torch.cat(parts)
        return tensors

    rewrite(folder, fuse)
    conversion_mapping.register_checkpoint_conversion_mapping("LlamaForCausalLM", [converter])
    yield folder
    conversion_mapping._checkpoint_conversion_mapping_cache.pop("LlamaForCausalLM")


def test_tensor_that_holds_several_of_the_models_changes_where_its_targets_are(fused_llama, tmp_path):
    model = train_and_save(fused_llama, tmp_path / "tuned", target_patterns=["k_proj"])
    base, tuned = CheckpointReader(fused_llama), CheckpointReader(tmp_path / "tuned")
    assert sorted(tuned.names()) == sorted(base.names())
    name = "model.layers.1.self_attn.qkv.weight"
    changed = [
        not torch.equal(b, a) for b, a in zip(base.tensor(name).chunk(3), tuned.tensor(name).chunk(3), strict=True)
    ]
    assert changed == [False, True, False]
    assert torch.equal(tuned.tensor(name).chunk(3)[1], model.get_submodule("model.layers.1.self_attn.k_proj").weight)


class OneWay(ConversionOps):
    """Reads what it cannot write."""

    def convert(self, input_dict, target_patterns, **_):
        return {target_patterns[0]: 2 * next(iter(input_dict.values()))[0]}


class WrongWayBack(OneWay):
    @property
    def reverse_op(self) -> ConversionOps:
        return self


@pytest.mark.parametrize("operation", [OneWay(), WrongWayBack()], ids=["no-way-back", "wrong-way-back"])
def test_form_that_cannot_be_written_is_refused_before_anything_is_decomposed(tmp_path, operation):
    tiny_llama().save_pretrained(tmp_path / "model")
    mapping = [WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", operations=[operation])]
    conversion_mapping.register_checkpoint_conversion_mapping("LlamaForCausalLM", mapping)
    try:
        with pytest.raises(
            ValueError, match="up_proj.weight in a form that can be read but not written. Load the model"
        ):
            precompute(tmp_path / "model", tmp_path / "store", SubspaceConfig(unfreeze_rank_ratio=0.25))
    finally:
        conversion_mapping._checkpoint_conversion_mapping_cache.pop("LlamaForCausalLM")
    assert not (tmp_path / "store").exists()


def test_what_an_architecture_keeps_in_float32_is_loaded_unrounded(tmp_path):
    """The bias of GLM's routers, a buffer that comes with the checkpoint."""
    folder = tmp_path / "model"
    config = Glm4MoeConfig(
        **COMMON,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    bias = torch.tensor([0.1, -0.2, 0.3, 1e-3])
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(bias)
    model.save_pretrained(folder)
    tuned, _ = load(train_config(folder, dtype="bfloat16"))
    assert tuned.get_submodule("model.layers.1.mlp.gate").weight.dtype == torch.bfloat16
    assert torch.equal(tuned.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias"), bias)


def test_quantized_weights_are_refused_with_a_way_out(tmp_path):
    save_model("gpt_oss", tmp_path / "model")
    set_config(tmp_path / "model", quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(ValueError, match=r"quantized by mxfp4.*Mxfp4Config\(dequantize=True\)"):
        CheckpointReader(tmp_path / "model")


def test_embeddings_that_are_stored_apart_are_not_tied_whatever_the_config_says(tmp_path):
    folder = tmp_path / "model"
    tiny_llama(tie_word_embeddings=False).save_pretrained(folder)
    set_config(folder, tie_word_embeddings=True)
    model = train_and_save(folder, tmp_path / "tuned")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    base, tuned = CheckpointReader(folder), CheckpointReader(tmp_path / "tuned")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(tuned.tensor(name), base.tensor(name))


def test_tied_embeddings_are_found_under_the_name_of_the_head(tmp_path):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"lm_head.weight": tensors.pop("model.embed_tokens.weight")}

    before = rewrite(folder, rename)
    model = train_and_save(folder, tmp_path / "tuned")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_file(tmp_path / "tuned" / "model.safetensors").keys() == before.keys()


def test_missing_tensor_is_refused_by_its_name(tmp_path):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    config = train_config(folder)
    rewrite(folder, lambda tensors: {name: t for name, t in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match="stores no tensor model.norm.weight, although its architecture has it"):
        load(config)


def test_config_of_another_model_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    set_config(tmp_path, intermediate_size=48)
    with pytest.raises(ValueError, match=r"gives model.layers.0.mlp.down_proj.weight \(32, 64\).*asks for \(32, 48\)"):
        stored_weights(tmp_path)


def test_hash_depends_on_dtype_shape_and_values_only():
    values = torch.arange(4.0)
    column = torch.as_strided(values.clone(), (4, 1), (1, 4))  # contiguous: of the last dimension no stride is used
    assert tensor_sha256(column) == tensor_sha256(values[:, None].clone())
    assert len({tensor_sha256(t) for t in (values, values[:, None], values[None], values.double(), values + 1)}) == 5
    assert tensor_sha256(torch.tensor(1.0)) != tensor_sha256(torch.tensor([1.0]))
