"""What a model does decides how it is fed, and whether it is trained at all, before anything expensive."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from osft.data.packing import Batching
from osft.models.likelihood import target_logits
from osft.models.loading import UnsupportedModelError, empty_model
from osft.models.packed_attention import AttentionShape
from osft.models.weight_files import DamagedFileError
from osft.subspace.preflight import Preflight, examine, preflight
from osft.subspace.random_weights import compute_one_block_of_each_kind, fill_at_random
from tests.conftest import byte_tokenizer

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("attention", [None, "sdpa", "eager", "flash_attention_2"])
def test_attention_keeps_packed_samples_apart_in_each_implementation(attention, tmp_path):
    found = preflight(saved(LlamaConfig(**LLAMA), tmp_path), attn_implementation=attention)
    assert found.batching is Batching.PACKED


@pytest.mark.parametrize("kind", ["persimmon", "gptj"])
def test_a_flash_kernel_knows_packed_samples_by_position_ids_which_not_every_model_hands_on(kind, tmp_path):
    extra = {"persimmon": {"intermediate_size": 48}, "gptj": {"rotary_dim": 4}}
    folder = saved(AutoConfig.for_model(kind, **SMALL, **extra[kind]), tmp_path)
    assert preflight(folder).batching is Batching.PACKED  # by the mask
    assert preflight(folder, attn_implementation="flash_attention_2").batching is Batching.PADDED


SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 512}
BRANCHES = {
    "llama": (LLAMA, True),
    "opt": (SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}, True),
    "qwen2": (LLAMA | {"use_sliding_window": False, "sliding_window": 64}, True),
    "mistral": (LLAMA | {"sliding_window": 512}, False),
    "gemma3_text": (LLAMA | SLIDING | {"head_dim": 8}, False),
    "gpt_neo": (
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        False,
    ),
    "bloom": (SMALL | {"n_layer": 2, "n_head": 4}, False),
    "mamba": ({"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}, False),
}


@pytest.mark.parametrize("kind", BRANCHES)
def test_answers_share_their_prompt_where_the_attention_takes_any_mask_and_sees_all_of_a_row(kind, tmp_path):
    settings, expected = BRANCHES[kind]
    found = preflight(saved(AutoConfig.for_model(kind, **settings), tmp_path))
    assert found.branches is expected
    assert (found.shared_batching is Batching.BRANCHED) is expected


@pytest.mark.parametrize(
    ("kind", "settings", "windows"),
    [
        ("llama", {}, [0]),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}, [0]),
        ("mistral", {"sliding_window": 512}, [4]),
        ("gemma3_text", SLIDING | {"head_dim": 8}, [0, 4]),
        ("gemma2", {"head_dim": 8}, []),  # capped scores, which SDPA cannot
        ("gpt_oss", {"head_dim": 8}, []),  # sinks
        ("llama4_text", {"head_dim": 8, "intermediate_size_mlp": 48}, []),  # chunks of 8192 tokens
        ("falcon", {}, []),  # takes SDPA by its name
        ("deepseek_v32", {"num_key_value_heads": 4}, []),  # sees the 2048 tokens that it chooses
    ],
)
def test_boundaries_of_samples_are_enough_where_they_give_what_a_mask_gives(kind, settings, windows, tmp_path):
    found = preflight(saved(AutoConfig.for_model(kind, **(LLAMA | settings)), tmp_path)).attention
    assert [shape.window for shape in found] == windows, "a window is cut to what the samples fill"
    assert all((shape.heads, shape.head_size, shape.value_size) == (4, 8, 8) for shape in found)
    assert all(shape.key_value_heads == 2 for shape in found)


def test_values_narrower_than_keys_are_seen(tmp_path):
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
    experts = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    low_rank = {"q_lora_rank": 8, "kv_lora_rank": 8, "moe_intermediate_size": 16}
    config = AutoConfig.for_model("deepseek_v3", **(LLAMA | heads | experts | low_rank))
    (shape,) = preflight(saved(config, tmp_path)).attention
    assert (shape.head_size, shape.value_size, shape.scale) == (16, 8, 0.25)


def test_a_model_that_overlooks_its_window_when_it_has_no_mask_keeps_the_mask(tmp_path, monkeypatch):
    from transformers.models.mistral import modeling_mistral

    forward = modeling_mistral.MistralAttention.forward

    def without_window(self, *args, **named):
        self.config.sliding_window, before = None, self.config.sliding_window
        try:
            return forward(self, *args, **named)
        finally:
            self.config.sliding_window = before

    folder = saved(AutoConfig.for_model("mistral", **LLAMA, sliding_window=512), tmp_path)
    monkeypatch.setattr(modeling_mistral.MistralAttention, "forward", without_window)
    monkeypatch.setattr("osft.subspace.preflight._tried", {})  # what was found of the real one
    found = preflight(folder)
    assert (found.batching, found.attention) == (Batching.PACKED, ())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_attention_that_was_asked_for_is_not_replaced(attention, tmp_path):
    assert preflight(saved(LlamaConfig(**LLAMA), tmp_path), attn_implementation=attention).attention == ()


REFUSED = {
    "an encoder-decoder": ("t5", {"d_model": 32, "num_layers": 1}, "is an encoder-decoder"),
    "an encoder-decoder that also has a decoder class": ("bart", {"d_model": 32}, "is an encoder-decoder"),
    "an encoder": ("bert", SMALL, "sees the tokens that follow"),
    "an encoder by its own code": ("xlm", {"emb_dim": 32, "n_layers": 1, "n_heads": 4}, "sees the tokens that follow"),
    "a permutation model": ("xlnet", {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}, "sees the tokens"),
    "an image classifier": ("vit", {"hidden_size": 32}, "no language model"),
    "a speech encoder": ("wav2vec2", {}, "no language model"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_causal_language_model_is_refused_in_a_short_line(what, tmp_path):
    kind, settings, message = REFUSED[what]
    folder = saved(AutoConfig.for_model(kind, **settings), tmp_path / kind)
    with pytest.raises(UnsupportedModelError, match=message) as refusal:
        preflight(folder)
    text = str(refusal.value)
    assert str(folder) in text
    assert "\n" not in text
    assert len(text) < 400


def test_attention_that_an_architecture_lacks_is_refused(tmp_path):
    folder = saved(AutoConfig.for_model("bloom", vocab_size=64, hidden_size=32, n_layer=1, n_head=4), tmp_path)
    with pytest.raises(ValueError, match="BloomForCausalLM does not have it"):
        preflight(folder, attn_implementation="flash_attention_2")


def test_folder_without_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is not a model folder"):
        preflight(tmp_path)


def test_result_passes_through_json():
    shape = AttentionShape(heads=4, key_value_heads=2, head_size=8, value_size=8, scale=0.5, window=0)
    found = Preflight(Batching.PADDED, "why", branches=True, attention=(shape,))
    assert Preflight.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.line() == "model: one sample a row: why"


def test_a_model_of_any_size_is_tried_in_little_memory(tmp_path):
    """Sixteen billion parameters, of which no weight is ever whole; one of 64 equal blocks is computed."""
    large = LLAMA | {"vocab_size": 200_000, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 64}
    model = empty_model(saved(LlamaConfig(**large), tmp_path))
    assert model.num_parameters() > 16e9
    fill_at_random(model)
    compute_one_block_of_each_kind(model)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    assert sum(storages.values()) < 800e6  # four shapes of up to 2**26 numbers
    assert sum("forward" in vars(block) for block in model.model.layers) == 63


def test_weights_of_a_shape_are_copied_once_and_the_largest_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr("osft.subspace.random_weights._COPIED", 2**18)
    model = empty_model(saved(LlamaConfig(**LLAMA | {"hidden_size": 512, "intermediate_size": 1024}), tmp_path))
    fill_at_random(model)
    first, second = model.model.layers
    assert first.self_attn.q_proj.weight.is_contiguous()
    assert first.self_attn.q_proj.weight.data_ptr() == second.self_attn.o_proj.weight.data_ptr()
    assert first.mlp.up_proj.weight.stride() == (1, 1)
    for weight in (first.self_attn.q_proj.weight, first.mlp.up_proj.weight):
        assert torch.equal(weight[1:, :-1], weight[:-1, 1:])


def test_wide_mlps_are_cut_unless_other_shapes_depend_on_them(tmp_path, monkeypatch):
    widths = []

    def refuse_cut(model, *, name):
        widths.append(model.model.layers[0].mlp.up_proj.weight.shape[0])
        if widths[-1] < 2048:
            raise UnsupportedModelError("shapes do not fit")
        return examine(model, name=name)

    monkeypatch.setattr("osft.subspace.preflight.examine", refuse_cut)
    found = preflight(saved(LlamaConfig(**LLAMA | {"intermediate_size": 2048}), tmp_path))
    assert found.batching is Batching.PACKED
    assert widths == [1024, 2048]


def test_blocks_of_another_kind_are_all_computed(tmp_path):
    config = AutoConfig.for_model(
        "gemma3_text", **LLAMA | {"num_hidden_layers": 6}, layer_types=["sliding_attention", "full_attention"] * 3
    )
    model = empty_model(saved(config, tmp_path))
    compute_one_block_of_each_kind(model)
    assert ["forward" in vars(block) for block in model.model.layers] == [False, False, True, True, True, True]


def test_random_values_are_the_same_each_time_and_leave_the_generator_alone(tmp_path):
    folder, state = saved(LlamaConfig(**LLAMA), tmp_path), torch.get_rng_state()
    logits = []
    for _ in range(2):
        model = empty_model(folder)
        fill_at_random(model)
        with torch.no_grad():
            logits.append(model(torch.arange(10)[None]).logits)
    assert torch.equal(*logits)
    assert torch.equal(torch.get_rng_state(), state)


def test_targets_logits_are_those_of_models_that_know_no_logits_to_keep(tmp_path):
    from osft.data.chat import IGNORE, Sample
    from osft.data.packing import collate

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bloom", vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    ).eval()
    rows = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
    samples = [Sample(row, [IGNORE, IGNORE, *row[2:]]) for row in rows]
    with torch.no_grad():
        found = target_logits(model, collate(samples, Batching.PADDED))
        expected = torch.cat([model(torch.tensor([row])).logits[0, 1:-1] for row in rows])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_plan_says_how_samples_are_fed(model_folder, chats, tmp_path):
    from osft.settings.training import TrainConfig
    from osft.training.plan import plan

    config = TrainConfig(
        model_path=str(model_folder),
        data_path=str(chats),
        unfreeze_rank_ratio=0.25,
        effective_batch_size=8,
        max_tokens_per_gpu=256,
        max_seq_len=200,
        learning_rate=1e-3,
        ckpt_output_dir=str(tmp_path),
    )
    found = plan(config)
    assert found.preflight.batching is Batching.PACKED
    assert "samples are packed" in dict(found.facts())["batches"]
    t5 = saved(AutoConfig.for_model("t5", d_model=32), tmp_path / "t5")
    with pytest.raises(UnsupportedModelError):
        plan(config.replace(model_path=str(t5)))


TOO_LARGE = {
    "an ordinary token": (258, lambda t: t.add_tokens(["please"]), "'please' is token 258"),
    "several": (258, lambda t: t.add_tokens(["<x>", "<y>", "<z>"]), "'<x>' is token 258 and 2 more follow"),
    "a special token": (258, lambda t: t.add_special_tokens({"bos_token": "<s>"}), "'<s>' is token 258"),
    "a marker of the chat template": (257, lambda t: None, "is token 257"),
    "a smaller model": (100, lambda t: None, "is token 100 and 157 more follow"),
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_tokenizer_that_is_larger_than_the_model_is_refused(what, tmp_path):
    rows, change, message = TOO_LARGE[what]
    tokenizer = byte_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    folder = saved(LlamaConfig(**LLAMA | {"vocab_size": rows}), tmp_path)
    with pytest.raises(ValueError, match=f"the tokenizer is larger than the model: .*{message}"):
        preflight(folder)


def test_padding_token_beyond_the_embeddings_is_allowed_because_nothing_is_padded_with_it(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    assert preflight(saved(LlamaConfig(**LLAMA | {"vocab_size": 258}), tmp_path)).batching is Batching.PACKED


def test_damaged_weights_are_found_where_the_folder_has_any(tmp_path):
    folder = saved(LlamaConfig(**LLAMA), tmp_path)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DamagedFileError, match="Git-LFS pointer"):
        preflight(folder)
