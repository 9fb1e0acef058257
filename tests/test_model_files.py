"""What comes along from the base model's folder, what does not, and the card that is written instead of the base's."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from osft.models import checkpoint
from osft.models.checkpoint import CheckpointReader, SavedTensor, copy_model_files, write_checkpoint
from osft.models.model_card import model_card, with_scores
from osft.models.origin import Origin, RoundingLoss
from osft.settings.training import TrainConfig
from tests.conftest import byte_tokenizer, tiny_llama

KEPT = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"),
    *("modeling_custom.py", "preprocessor_config.json", "LICENSE", "USE_POLICY.md", "code/deep/configuration.py"),
)
LEFT = (
    *("README.md", "model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf"),
    *("original/consolidated.00.pth", "onnx/model.onnx", "onnx/model.onnx_data", "tf_model.h5", "flax_model.msgpack"),
    *("trainer_state.json", "all_results.json", "eval_results.json", "training_args.bin", "optimizer.pt"),
    *(".gitattributes", ".cache/huggingface/download", "exact/manifest.json", "exact/residual-00001.safetensors"),
    *("adapter_config.json", "osft.json"),
)


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    for name in (*KEPT, *LEFT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"name": "{name}"}}')
    return folder


@pytest.mark.parametrize("name", KEPT)
def test_what_belongs_to_the_model_comes_along(base, tmp_path, name):
    copy_model_files(base, tmp_path / "tuned")
    assert (tmp_path / "tuned" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("name", LEFT)
def test_what_would_be_false_of_another_model_stays(base, tmp_path, name):
    copy_model_files(base, tmp_path / "tuned")
    assert not (tmp_path / "tuned" / name).exists()
    assert not any(not list(folder.iterdir()) for folder in (tmp_path / "tuned").rglob("*") if folder.is_dir())


def test_named_chat_templates_of_a_real_tokenizer_are_in_the_tuned_folder(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "T" + tokenizer.chat_template}
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    reader = CheckpointReader(tmp_path / "base")
    write_checkpoint(tmp_path / "tuned", (reader.saved(name) for name in reader.names()), tmp_path / "base")
    again = type(tokenizer).from_pretrained(tmp_path / "tuned")
    assert again.chat_template == tokenizer.chat_template


def test_large_model_is_written_in_shards_that_transformers_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 40_000)
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    reader = CheckpointReader(tmp_path / "base")
    write_checkpoint(tmp_path / "tuned", (reader.saved(name) for name in reader.names()), tmp_path / "base")
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "tuned").glob("*.safetensors")}
    assert sorted(sizes) == [
        f"model-{number:05d}-of-{len(sizes):05d}.safetensors" for number in range(1, len(sizes) + 1)
    ]
    assert len(sizes) > 2
    assert max(sizes.values()) < 42_000, "with its header"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_says_in_which_dtype_the_weights_are_in_its_parts_too(tmp_path, key):
    (tmp_path / "base").mkdir()
    config = {"model_type": "x", key: "float32", "text_config": {key: "float32", "size": 3}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    tensor = SavedTensor("w", torch.zeros(2, dtype=torch.bfloat16))
    write_checkpoint(tmp_path / "tuned", [tensor], tmp_path / "base", dtype=torch.bfloat16)
    found = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert found == {"model_type": "x", key: "bfloat16", "text_config": {key: "bfloat16", "size": 3}}


def card(base_folder: Path) -> str:
    loss = RoundingLoss(update_lost=0.7, rounding_error=0.9, frozen_share=0.6)
    origin = Origin(
        base_model="org/base",
        trained_from="/volume/rounds/1/train/hf_format/samples_24.0",
        starts_from_exact=True,
        dtype="bfloat16",
        rounding="nearest",
        total=loss,
        weights={"model.layers.0.mlp.up_proj": loss},
    )
    config = TrainConfig(
        model_path="org/base",
        data_path="data.jsonl",
        ckpt_output_dir="out",
        unfreeze_rank_ratio=0.25,
        effective_batch_size=8,
        max_tokens_per_gpu=100,
        max_seq_len=100,
        learning_rate=2e-5,
    )
    scores = {"training loss of the last step": 1.2345, "validation loss": 1.5, "steps": 3}
    dataset = {"data_uri": "s3://data/new.jsonl", "files": {"s3://data/new.jsonl": "ab" * 32}, "num_train_samples": 24}
    sources = [{"data_uri": "s3://data/old.jsonl", "num_samples": 2, "num_tokens": 80}]
    replay = {"num_train_samples": 2, "num_tokens": 80, "sources": sources}
    return model_card(
        config, origin, base_folder=base_folder, dataset=dataset, replay=replay, scores=scores, name="samples_24.0"
    )


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_card_names_base_data_settings_scores_and_what_was_frozen(tmp_path):
    text = card(tmp_path)
    assert metadata(text)["base_model"] == "org/base"
    for said in (
        "`s3://data/new.jsonl`",
        "2 samples of it (80 tokens) were replayed: 2 of `s3://data/old.jsonl`",
        "ab" * 32,
        "2e-05",
        "1.2345",
        "1.5000",
        "75%",
        "70.0% of the update",
        "60.0%",
    ):
        assert said in text, said


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        (
            "---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n# Base",
            {"license": "apache-2.0", "language": ["en", "de"]},
        ),
        (
            "---\nlicense: other\nlicense_name: llama3.1\nlicense_link: LICENSE\ntags: [base]\n---\n",
            {"license": "other", "license_name": "llama3.1", "license_link": "LICENSE"},
        ),
        ("# A card without metadata: license: mit", {}),
        ("---\nlicense: [broken\n---\n", {}),
        ("---\njust text\n---\n", {}),
        (None, {}),
    ],
)
def test_licence_of_the_base_is_carried_over_and_nothing_else_of_its_card(tmp_path, readme, expected):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    text = card(tmp_path)
    found = metadata(text)
    assert {key: found[key] for key in found if key.startswith(("license", "language"))} == expected
    assert found["tags"] == ["osft", "continual-learning", "orthogonal-subspace-fine-tuning"]
    licence = expected.get("license_name", expected.get("license"))
    assert (f"licence, {licence}, holds" in text) if licence else ("does not say under which licence" in text)


def test_scores_of_an_evaluation_replace_those_of_training(tmp_path):
    text = with_scores(card(tmp_path), "| web-text | 3.1 |")
    assert "| web-text | 3.1 |" in text
    assert "1.2345" not in text
    assert metadata(text) == metadata(card(tmp_path))
