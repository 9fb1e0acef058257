"""Every architecture of `transformers` that models text, as small as it can be built; `python -m tests.architectures`
writes docs/families.md.
"""

import inspect
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from osft.data.packing import Batching
from osft.models.loading import UnsupportedModelError
from osft.subspace.preflight import Preflight, preflight

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
VOCABULARY = 64

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "kv_channels": 8}
_DECODER = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
_ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 3),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_MAMBA = {"n_heads": 4, "d_head": 16, "n_groups": 1, "d_state": 8, "d_conv": 4, "expand": 2, "chunk_size": 8}
_LINEAR = {"num_value_heads": 4, "num_key_heads": 2, "key_head_dim": 8, "value_head_dim": 8}
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim"), 32),
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "is_decoder": True,
    "state_size": 8,
    "sliding_window": 6,
    "initializer_range": 0.2,
    "init_std": 0.2,  # a window shorter than the samples
    **_HEADS,
    **_DECODER,
    **_ENCODER,
    **_EXPERTS,
    **_LATENT,
    **{f"mamba_{name}": value for name, value in _MAMBA.items()},
    **{f"linear_{name}": value for name, value in _LINEAR.items()},
}
"""What an architecture takes if it has a setting of this name."""

_ALL_HEADS = {"num_key_value_heads": 4}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _ALL_HEADS),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"), _ALL_HEADS),
    "kimi_linear": _ALL_HEADS | {"linear_head_dim": 8, "linear_num_heads": 4},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
    | {"moe_shared_expert_intermediate_size": 24},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cwm": {"bos_token_id": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": _PER_LAYER
    | {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "laurel_rank": 4}
    | {"activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [48, 48]},
    "gemma4_text": _PER_LAYER | {"global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 6},
    "gptj": {"rotary_dim": 4},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 8},
    "modernbert-decoder": {"bos_token_id": 2, "cls_token_id": 2, "sep_token_id": 3, "global_attn_every_n_layers": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local"], "attention_head_size": 8, "feed_forward_size": 48},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20}
    | {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "xlnet": {"d_head": 8, "n_head": 4, "d_model": 32, "d_inner": 48, "n_layer": 2},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What else an architecture needs to be built small."""

_UNKNOWN, _MULTIMODAL, _DRAFT = "no small settings known", "also sees or hears", "drafts for another model"
NOT_BUILT = {
    **dict.fromkeys(("blt", "cohere_compass_text", "dbrx", "dots3_note_text", "longcat_flash"), _UNKNOWN),
    **dict.fromkeys(("musicgen", "musicgen_melody", "qwen4_exp_text", "zamba", "zamba2"), _UNKNOWN),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFT),
    **dict.fromkeys(("dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified"), _MULTIMODAL),
    **dict.fromkeys(("git", "got_ocr2", "llama4", "mllama", "moss_transcribe_diarize"), _MULTIMODAL),
    **dict.fromkeys(("phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), _MULTIMODAL),
}
"""What this list leaves out, and why."""
KINDS = sorted(set(CLASSES) - set(NOT_BUILT))


def small_config(kind: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of about two blocks, one of each type of layer, with changes."""
    default = AutoConfig.for_model(kind)
    cls = type(default)
    taken = {name for base in cls.__mro__ for name in getattr(base, "__annotations__", {})}
    taken |= {*inspect.signature(cls.__init__).parameters, *cls.attribute_map}
    settings = {name: value for name, value in SMALL.items() if name in taken}
    if _LATENT.keys() <= taken:
        settings.pop("head_dim", None)
    derived = any(isinstance(getattr(cls, name, None), property) for name in ("layer_types", "layers_block_type"))
    if getattr(default, "layer_types", None) and not derived:
        types = list(dict.fromkeys(default.layer_types))
        settings["layer_types"] = [types[i % len(types)] for i in range(max(2, len(types)))]
        settings["num_hidden_layers"] = len(settings["layer_types"])
    config = cls(**settings | SPECIAL.get(kind, {}) | changes)
    config.architectures = [CLASSES[kind] if isinstance(CLASSES[kind], str) else CLASSES[kind][0]]
    return config


@cache
def found(kind: str) -> Preflight | str:
    """What the pre-flight finds, or why it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        small_config(kind).save_pretrained(folder)
        try:
            return preflight(folder)
        except UnsupportedModelError as error:
            return str(error).replace(folder, kind)


def render() -> str:
    """docs/families.md."""
    results = {kind: found(kind) for kind in KINDS}
    fed: dict[Batching, list[str]] = {how: [] for how in Batching}
    for kind, result in results.items():
        if isinstance(result, Preflight):
            fed[result.batching].append(kind)
    refused = {kind: reason for kind, reason in results.items() if isinstance(reason, str)}

    def names(kinds: list[str]) -> str:
        return ", ".join(f"`{kind}`" for kind in kinds)

    lines = [
        "# Architectures",
        "Written by `python -m tests.architectures`; a test compares it. Each architecture of transformers that models "
        "text is built small and tried as osft.subspace.preflight tries every model before anything expensive. "
        "`tests/test_architectures.py` computes and trains each of them, in micro-batches and sample by sample, and "
        "compares likelihoods and gradients.",
        f"## Packed: {len(fed[Batching.PACKED])}",
        "Samples follow each other in one row and do not see each other.",
        names(fed[Batching.PACKED]),
        f"## One sample a row: {len(fed[Batching.PADDED])}",
        "Packed samples would change each other: by a recurrent state, a convolution, or positions that are counted "
        "on. Rows are filled up on the right, where a causal model does not look.",
        names(fed[Batching.PADDED]),
        f"## Refused: {len(refused)}",
        "\n".join(f"- {reason.split('. Give')[0]}" for reason in refused.values()),
        f"## Not in this list: {len(NOT_BUILT)}",
        "\n".join(f"- `{kind}`: {reason}" for kind, reason in sorted(NOT_BUILT.items())),
    ]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(render(), encoding="utf-8")
