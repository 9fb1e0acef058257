"""The adapter of real PEFT on the base model computes what the trained model computes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from osft import osft
from osft.models import export
from osft.models.adapter import Adapter, export_adapter
from osft.models.export import export_model
from osft.models.low_rank import factorize, noise_floor
from osft.models.rounding import decode_residual, encode_residual
from osft.subspace import select_targets
from tests.conftest import byte_tokenizer, tiny_llama
from tests.test_families import COMMON
from tests.training.in_process import run_in_process

EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON, tie_word_embeddings=True),
    "phi3": lambda: Phi3Config(**COMMON),
    "gpt2": lambda: GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, eos_token_id=1
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, **EXPERTS, num_experts=3, moe_intermediate_size=24),
    "qwen3_moe with a dense block": lambda: Qwen3MoeConfig(
        **COMMON, **EXPERTS, num_experts=3, moe_intermediate_size=24, mlp_only_layers=[0]
    ),
    "qwen2_moe with a shared expert": lambda: Qwen2MoeConfig(
        **COMMON,
        num_experts_per_tok=2,
        num_experts=3,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=3, num_experts_per_tok=2),
    "gpt_oss": lambda: GptOssConfig(**COMMON, **EXPERTS, num_local_experts=3),
    "llama4, whose routers are linear layers with two outputs": lambda: Llama4TextConfig(
        **COMMON, head_dim=8, num_local_experts=3, intermediate_size_mlp=40, interleave_moe_layer_step=2
    ),
    "jamba": lambda: JambaConfig(
        **COMMON,
        num_experts=3,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **(COMMON | {"num_key_value_heads": 4}),
        num_experts_per_tok=2,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        n_shared_experts=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
}


def make(family: str, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def learn(model: PreTrainedModel, names: list[str], *, rank: int, seed: int = 0, size: float = 0.3) -> None:
    """Add an update of a rank, relative to the weight, to every named tensor."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        weight = model.get_parameter(name)
        *stack, m, n = weight.shape
        left = torch.randn(*stack, m, rank, generator=generator)
        update = left @ torch.randn(*stack, rank, n, generator=generator)
        weight += size * update * weight.norm() / update.norm()


def target_names(model: PreTrainedModel) -> list[str]:
    """Of all targets that an adapter can hold."""
    return [target.tensor for target in select_targets(model) if not target.name.endswith("dt_proj")]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(2, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    return model.eval()(input_ids=tokens).logits


def with_adapter(base: Path, adapter: Path, **options: object) -> nn.Module:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **options), adapter)


def ranks(adapter: Adapter) -> dict[str, int]:
    return {weight.name: weight.rank for weight in adapter.weights}


@pytest.mark.parametrize("family", FAMILIES)
def test_base_with_adapter_has_the_logits_of_the_trained_model(family, tmp_path):
    model = make(family, tmp_path / "base")
    before = logits(model)
    names = target_names(model)
    learn(model, names[::2], rank=1)  # of some weights only, of different ranks
    learn(model, names[::3], rank=3, seed=1)
    changed = set(names[::2]) | set(names[::3])
    model.save_pretrained(tmp_path / "tuned")
    adapter = export_adapter(str(tmp_path / "tuned"), tmp_path / "adapter", base=str(tmp_path / "base"))
    assert set(ranks(adapter)) == changed
    found = logits(with_adapter(tmp_path / "base", tmp_path / "adapter"))
    assert (logits(model) - before).norm() > 0.1 * before.norm()
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=2e-5 * before.abs().max().item())
    assert ranks(adapter) == {name: (name in names[::2]) + 3 * (name in names[::3]) for name in changed}


def llama(tmp_path: Path, names: list[str] | None = None, **learned: float) -> tuple[str, str, PreTrainedModel]:
    """A base and a tuned model, and the latter in memory. `names`: what learns, by default all targets."""
    model = make("llama", tmp_path / "base")
    learn(model, target_names(model) if names is None else names, **({"rank": 2} | learned))
    model.save_pretrained(tmp_path / "tuned")
    return str(tmp_path / "base"), str(tmp_path / "tuned"), model


def test_adapter_after_two_rounds_is_the_sum_of_their_exact_updates(tmp_path, monkeypatch, chats):
    """Of a bfloat16 model whose served weights lost most of it; osft.json names the first model as the base."""
    run_in_process(monkeypatch)
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model = str(tmp_path / "base")
    for number in (1, 2):
        model = str(
            osft(
                model_path=model,
                data_path=str(chats),
                ckpt_output_dir=str(tmp_path / f"round-{number}"),
                unfreeze_rank_ratio=0.25,
                learning_rate=2e-5,
                save_rounding="nearest",
                dtype="float32",
                num_epochs=1,
                nproc_per_node=1,
                effective_batch_size=60,
                max_tokens_per_gpu=2048,
                max_seq_len=64,
            ).checkpoint
        )
    export_model(model, tmp_path / "exact", dtype=torch.float32)
    base, exact, served = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (tmp_path / "base", tmp_path / "exact", model)
    )
    adapter = export_adapter(model, tmp_path / "adapter")
    assert adapter.starts_from_exact
    learned = logits(exact) - logits(base)
    assert (logits(served) - logits(exact)).norm() > 0.5 * learned.norm()
    found = logits(with_adapter(tmp_path / "base", tmp_path / "adapter", dtype=torch.float32))
    assert (found - logits(exact)).norm() < 0.01 * learned.norm()
    for weight in adapter.weights:  # each round has a quarter of the directions
        assert weight.rank <= 2 * 0.25 * min(weight.shape), weight.name


def test_truncation_loses_the_tail_of_the_singular_values(tmp_path):
    base, tuned, model = llama(tmp_path, rank=20)
    adapter = export_adapter(tuned, tmp_path / "adapter", base=base, rank=3)
    before = AutoModelForCausalLM.from_pretrained(base)
    tails, squares = [], []
    for weight in adapter.weights:
        update = (model.get_parameter(weight.name) - before.get_parameter(weight.name)).detach().double()
        singular_values = torch.linalg.svdvals(update)
        tails.append(singular_values[3:].square().sum().item())
        squares.append(singular_values.square().sum().item())
        assert (weight.rank, weight.full_rank) == (3, min(20, *weight.shape)), weight.name
        assert weight.error == pytest.approx((tails[-1] / squares[-1]) ** 0.5, rel=1e-3)
    assert adapter.error == pytest.approx((sum(tails) / sum(squares)) ** 0.5, rel=1e-3)
    assert 0.3 < adapter.error < 0.99


def test_noise_of_a_dozen_rounded_rounds_is_below_the_floor_and_a_thousandth_of_a_step_is_above():
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(300, 200, generator=generator)).bfloat16().float()
    weight, directions = base, torch.randn(2, 200, generator=generator)
    for _ in range(12):  # each adds to the same two directions, and is kept as a checkpoint keeps it
        weight = weight + 1e-7 * torch.randn(300, 2, generator=generator) @ directions
        served = weight.bfloat16()
        weight = decode_residual(served, *encode_residual(weight, served))
    _, a = factorize(weight - base, noise_floor(weight))
    assert a.shape[0] == 2
    _, everything = factorize(weight - base, 0.0)
    assert everything.shape[0] == 200


def test_bfloat16_factors_halve_the_file_and_lose_less_than_half_a_percent(tmp_path):
    base, tuned, _ = llama(tmp_path)
    whole = export_adapter(tuned, tmp_path / "whole", base=base)
    half = export_adapter(tuned, tmp_path / "half", base=base, dtype=torch.bfloat16)
    assert half.num_bytes == whole.num_bytes / 2
    assert whole.error < 1e-5
    assert 1e-4 < half.error < 5e-3


def test_base_is_found_by_the_adapters_own_configuration(tmp_path):
    base, tuned, model = llama(tmp_path)
    export_adapter(tuned, tmp_path / "adapter", base=base)
    found = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-4)


def test_base_on_the_hub_is_named_by_id_and_revision(tmp_path, monkeypatch):
    base, tuned, _ = llama(tmp_path)
    monkeypatch.setattr(export, "model_folder", lambda model: Path(base))
    export_adapter(tuned, tmp_path / "adapter", base="org/name@0123abc")
    config = config_of(tmp_path / "adapter")
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "0123abc")


def config_of(adapter: Path) -> dict:
    return json.loads((adapter / "adapter_config.json").read_text())


def test_configuration_names_kinds_of_layers_where_all_changed_and_single_ones_elsewhere(tmp_path):
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    base, tuned, _ = llama(tmp_path, [*names, "model.layers.1.mlp.up_proj.weight"])
    export_adapter(tuned, tmp_path / "adapter", base=base)
    config = config_of(tmp_path / "adapter")
    assert sorted(config["target_modules"]) == ["model.layers.1.mlp.up_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {})


def test_changed_head_that_is_not_tied_is_in_the_adapter(tmp_path):
    model = make("phi3", tmp_path / "base")
    learn(model, ["lm_head.weight"], rank=2)
    model.save_pretrained(tmp_path / "tuned")
    export_adapter(str(tmp_path / "tuned"), tmp_path / "adapter", base=str(tmp_path / "base"))
    found = logits(with_adapter(tmp_path / "base", tmp_path / "adapter"))
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen3_moe", ["mlp.gate.weight"]),  # a router that is no linear layer
        ("gpt_oss", ["mlp.router.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj_bias"]),
    ],
)
def test_matrices_outside_of_linear_layers_are_in_the_adapter(family, names, tmp_path):
    model = make(family, tmp_path / "base")
    learn(model, [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in names], rank=2)
    model.save_pretrained(tmp_path / "tuned")
    export_adapter(str(tmp_path / "tuned"), tmp_path / "adapter", base=str(tmp_path / "base"))
    found = logits(with_adapter(tmp_path / "base", tmp_path / "adapter"))
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.embed_tokens.weight"),  # tied to the head
        ("phi3", "model.embed_tokens.weight"),
        ("llama", "model.norm.weight"),
        ("llama", "model.layers.1.input_layernorm.weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.bias"),
        ("gpt2", "transformer.wpe.weight"),
        ("gpt_oss", "model.layers.0.self_attn.sinks"),
        ("jamba", "model.layers.0.mamba.dt_proj.weight"),  # read without its layer's forward pass
        ("jamba", "model.layers.0.mamba.conv1d.weight"),
    ],
)
def test_change_that_lora_cannot_hold_is_refused_by_name(family, name, tmp_path):
    model = make(family, tmp_path / "base")
    learn(model, target_names(model)[:1], rank=2)
    with torch.no_grad():
        model.get_parameter(name).add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=rf"LoRA cannot hold .*{name}.*--format hf"):
        export_adapter(str(tmp_path / "tuned"), tmp_path / "adapter", base=str(tmp_path / "base"))
    assert not (tmp_path / "adapter").exists()


def test_identical_models_are_refused(tmp_path):
    base, tuned, _ = llama(tmp_path, [])
    with pytest.raises(ValueError, match="nothing to export"):
        export_adapter(tuned, tmp_path / "adapter", base=base)


@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"rope_theta": 5000.0}, {"num_hidden_layers": 1}])
def test_base_with_another_configuration_is_refused(changes, tmp_path):
    _, tuned, _ = llama(tmp_path)
    AutoModelForCausalLM.from_config(LlamaConfig(**(COMMON | {"tie_word_embeddings": True} | changes))).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(ValueError, match=r"no tuned form of .*config.json differ"):
        export_adapter(tuned, tmp_path / "adapter", base=str(tmp_path / "other"))


def test_base_of_another_architecture_is_refused(tmp_path):
    _, tuned, _ = llama(tmp_path)
    make("gpt2", tmp_path / "other")
    with pytest.raises(ValueError, match="no tuned form of"):
        export_adapter(tuned, tmp_path / "adapter", base=str(tmp_path / "other"))


def test_model_that_names_no_base_asks_for_it(tmp_path):
    _, tuned, _ = llama(tmp_path)
    with pytest.raises(ValueError, match="--base"):
        export_adapter(tuned, tmp_path / "adapter")


@pytest.mark.parametrize("output", ["file", "folder"])
def test_output_that_is_there_is_refused(output, tmp_path):
    base, tuned, _ = llama(tmp_path)
    (tmp_path / "folder").mkdir()
    for file in ("file", "folder/file"):
        (tmp_path / file).write_text("mine")
    with pytest.raises(ValueError, match=r"--output .* is there already"):
        export_adapter(tuned, tmp_path / output, base=base)
    assert (tmp_path / "folder/file").read_text() == "mine"


def test_old_names_of_a_base_are_those_of_the_model(tmp_path):
    """A checkpoint of experts stored one by one, against one that stores the stacks."""
    model = make("qwen3_moe", tmp_path / "base")
    learn(model, target_names(model), rank=2)
    model.save_pretrained(tmp_path / "tuned", save_original_format=False)
    stored = load_file(tmp_path / "tuned" / "model.safetensors"), load_file(tmp_path / "base" / "model.safetensors")
    assert set(stored[0]) != set(stored[1])
    export_adapter(str(tmp_path / "tuned"), tmp_path / "adapter", base=str(tmp_path / "base"))
    found = logits(with_adapter(tmp_path / "base", tmp_path / "adapter"))
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-4)
