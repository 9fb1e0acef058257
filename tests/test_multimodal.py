"""Of a checkpoint that also sees, the language model is tuned and everything else saved as it came."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from osft import TrainConfig, train
from osft.data.chat import Sample
from osft.data.packing import Batching, collate
from osft.models.checkpoint import CheckpointReader
from osft.models.conversion import ModelWeights
from osft.models.likelihood import token_nll
from osft.models.loading import empty_model
from osft.settings.subspace import SubspaceConfig
from osft.subspace import inject, osft_layers, select_targets
from osft.subspace.preflight import preflight
from osft.training.saving import save_merged
from tests.conftest import byte_tokenizer
from tests.training.in_process import run_in_process

TEXT: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
LINEAR = {"num_value_heads": 4, "num_key_heads": 2, "key_head_dim": 8, "value_head_dim": 8}
SEES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_SEES = {"depth": 1, "hidden_size": 16, "embed_dim": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
QWEN_SEES |= {"out_hidden_size": 32}
QWEN_TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
SMALL: dict[str, dict[str, Any]] = {
    "mistral3": {"text_config": {"model_type": "mistral", **TEXT}, "vision_config": {"model_type": "pixtral", **SEES}},
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **SEES},
    },
    "gemma3": {"text_config": TEXT | {"sliding_window": 6}, "vision_config": SEES, "mm_tokens_per_image": 4},
    "internvl": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": SEES | {"image_size": [28, 28], "patch_size": [14, 14]},
    },
    "idefics3": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": SEES},
    "qwen2_5_vl": {
        "text_config": TEXT | ROPE,
        "vision_config": QWEN_SEES | {"fullatt_block_indexes": [0]},
        **QWEN_TOKENS,
    },
    "qwen3_5": {
        "text_config": TEXT
        | {"layer_types": ["linear_attention", "full_attention"]}
        | {f"linear_{name}": value for name, value in LINEAR.items()},
        "vision_config": QWEN_SEES | {"num_position_embeddings": 16},
        **QWEN_TOKENS,
    },
    "llama4": {
        "text_config": TEXT | {"num_local_experts": 2, "intermediate_size_mlp": 48},
        "vision_config": SEES
        | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "pixel_shuffle_ratio": 0.5},
    },
    "lfm2_vl": {
        "text_config": {"model_type": "lfm2", **TEXT, "layer_types": ["conv", "full_attention"]},
        "vision_config": SEES,
    },
}
ONE_A_ROW = {"qwen3_5", "lfm2_vl"}


def saved(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **SMALL[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", SMALL)
def test_language_model_is_tuned_and_the_rest_is_byte_for_byte_as_it_came(kind, tmp_path):
    base = saved(kind, tmp_path / "base")
    found = preflight(base)
    assert (found.batching is Batching.PADDED) == (kind in ONE_A_ROW)
    skeleton = empty_model(base)
    stored = ModelWeights(CheckpointReader(base), skeleton)
    targets = {target.tensor for target in select_targets(skeleton)}
    assert not any(part in name for name in targets for part in ("vis", "image", "projector", "connector"))

    model = AutoModelForImageTextToText.from_pretrained(base)
    assert type(model) is type(skeleton)
    inject(model, SubspaceConfig(unfreeze_rank_ratio=0.5))
    samples = [Sample(row, row) for row in ([9, 20, 30, 40], [50, 60, 70])]
    token_nll(model.train(), collate(samples, found.batching)).sum().backward()
    for name, layer in osft_layers(model):
        assert layer.coefficients.grad is not None, name
        with torch.no_grad():
            layer.coefficients.normal_(std=0.05)
            layer.refresh_(0.0)
    save_merged(model, stored, tmp_path / "tuned")

    before, after = CheckpointReader(base), CheckpointReader(tmp_path / "tuned")
    assert sorted(before.names()) == sorted(after.names())
    trained = {name for group in stored.groups if targets & group.shapes.keys() for name in group.stored_names}
    changed = {name for name in before.names() if not torch.equal(before.served(name), after.served(name))}
    assert changed == trained
    assert (tmp_path / "tuned" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    tuned = AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        batch = collate(samples, found.batching)
        torch.testing.assert_close(token_nll(tuned.eval(), batch), token_nll(model.eval(), batch), rtol=0, atol=1e-4)


def test_vision_language_checkpoint_trains_on_chats_and_opens_as_what_it_was(chats, tmp_path, monkeypatch):
    run_in_process(monkeypatch)
    base = saved("mistral3", tmp_path / "base")
    config = TrainConfig(
        model_path=str(base),
        data_path=str(chats),
        unfreeze_rank_ratio=0.25,
        effective_batch_size=40,
        max_tokens_per_gpu=512,
        max_seq_len=200,
        learning_rate=1e-2,
        ckpt_output_dir=str(tmp_path / "out"),
    )
    result = train(config)
    assert result.final_loss < result.history[0]["loss"]
    assert result.summary.preflight.batching == "packed"
    assert type(AutoModelForImageTextToText.from_pretrained(result.checkpoint)).__name__.startswith("Mistral3")
    assert len(AutoTokenizer.from_pretrained(result.checkpoint)) == 258
    hybrid = config.replace(model_path=str(saved("lfm2_vl", tmp_path / "hybrid")))
    first = []
    for tokens in (60, 512):
        output = str(tmp_path / f"hybrid-{tokens}")
        run = train(hybrid.replace(max_tokens_per_gpu=tokens, ckpt_output_dir=output, max_steps=1))
        first.append(run.history[0]["loss"])
        assert run.summary.preflight.batching == "padded"
    assert first[0] == pytest.approx(first[1], rel=1e-5)
