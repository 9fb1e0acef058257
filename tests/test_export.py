"""A plain folder of the exact weights, and the command that writes it or an adapter."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from osft import osft
from osft.models.checkpoint import CheckpointReader
from osft.models.export import export_model
from osft.models.origin import read_origin
from tests.conftest import byte_tokenizer, tiny_llama
from tests.test_cli import invoke
from tests.training.in_process import run_in_process


@pytest.fixture(scope="module")
def folders(tmp_path_factory, chats) -> tuple[Path, Path]:
    """A bfloat16 model and what it became in one round at a small rate, rounded to bfloat16."""
    root = tmp_path_factory.mktemp("round")
    tiny_llama().to(torch.bfloat16).save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_in_process(monkeypatch)
        trained = osft(
            model_path=str(root / "base"),
            data_path=str(chats),
            ckpt_output_dir=str(root / "out"),
            unfreeze_rank_ratio=0.25,
            learning_rate=1e-4,
            num_epochs=1,
            effective_batch_size=60,
            max_tokens_per_gpu=2048,
            max_seq_len=64,
            dtype="float32",
            nproc_per_node=1,
        )
    assert trained.checkpoint is not None
    return root / "base", trained.checkpoint


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """As a program reads them that knows nothing of exact/."""
    return load_file(folder / "model.safetensors")


def exact_weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.tensor(name) for name in reader.names()}


def config_dtype(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["dtype"]


def files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_float32_folder_holds_the_exact_weights_and_nothing_but_a_model(folders, tmp_path):
    _base, tuned = folders
    export_model(str(tuned), tmp_path / "plain", dtype=torch.float32)
    found, exact = weights(tmp_path / "plain"), exact_weights(tuned)
    assert all(torch.equal(found[name], exact[name].float()) and found[name].dtype == torch.float32 for name in exact)
    assert any(not torch.equal(found[name], served.float()) for name, served in weights(tuned).items())
    assert config_dtype(tmp_path / "plain") == "float32"
    assert files(tmp_path / "plain") == {file for file in files(tuned) if not file.startswith("exact/")}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert {name: weight.dtype for name, weight in loaded.named_parameters()} == dict.fromkeys(
        dict(loaded.named_parameters()), torch.float32
    )


def test_bfloat16_folder_of_a_bfloat16_model_holds_its_served_bytes(folders, tmp_path):
    _base, tuned = folders
    export_model(str(tuned), tmp_path / "plain", dtype=torch.bfloat16)
    found = weights(tmp_path / "plain")
    assert all(torch.equal(found[name], served) for name, served in weights(tuned).items())
    assert read_origin(tmp_path / "plain") == read_origin(tuned)
    assert "exact/" not in (tmp_path / "plain" / "README.md").read_text()


def test_card_and_origin_of_a_float32_folder_say_that_nothing_is_rounded(folders, tmp_path):
    base, tuned = folders
    export_model(str(tuned), tmp_path / "plain", dtype=torch.float32)
    origin, before = read_origin(tmp_path / "plain"), read_origin(tuned)
    assert (before.rounding, before.dtype) != ("none", "float32")
    assert (origin.rounding, origin.dtype, origin.base_model) == ("none", "float32", str(base))
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "stored in float32, which holds the update" in card
    assert "exact/" not in card


def test_bfloat16_folder_of_a_float32_model_keeps_what_was_learned_and_the_bytes_of_the_rest(folders, tmp_path):
    base, tuned = folders
    export_model(str(tuned), tmp_path / "exact", dtype=torch.float32)
    export_model(str(tmp_path / "exact"), tmp_path / "plain", dtype=torch.bfloat16)
    found, exact, before = weights(tmp_path / "plain"), weights(tmp_path / "exact"), weights(base)
    assert config_dtype(tmp_path / "plain") == "bfloat16"
    kept, total = 0.0, 0.0
    for name, old in before.items():
        assert found[name].dtype == torch.bfloat16
        update = exact[name] - old.float()
        if not update.any():
            assert torch.equal(found[name], old), name
        kept += ((found[name].float() - old.float()) * update).sum().item()
        total += update.square().sum().item()
    assert kept / total == pytest.approx(1, abs=0.1)
    origin = read_origin(tmp_path / "plain")
    assert origin.rounding == "stochastic"
    assert origin.total.update_lost == pytest.approx(1 - kept / total, abs=1e-3)


def test_weight_with_a_dtype_of_its_own_keeps_it(folders, tmp_path):
    base, _ = folders
    stored = weights(base)
    stored["model.norm.weight"] = stored["model.norm.weight"].float() + 1e-5
    (tmp_path / "mixed").mkdir()
    save_file(stored, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "mixed" / "config.json").write_text((base / "config.json").read_text())
    export_model(str(tmp_path / "mixed"), tmp_path / "plain", dtype=torch.bfloat16)
    assert torch.equal(weights(tmp_path / "plain")["model.norm.weight"], stored["model.norm.weight"])


def test_rounding_without_a_base_asks_for_it(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="--base"):
        export_model(str(tmp_path / "model"), tmp_path / "plain", dtype=torch.bfloat16)
    assert not (tmp_path / "plain").exists()


def test_model_without_exact_weights_is_exported_with_its_card(folders, tmp_path):
    trained, _ = folders
    base = tmp_path / "base"
    base.mkdir()
    for file in files(trained):
        (base / file).write_bytes((trained / file).read_bytes())
    (base / "README.md").write_text("A model.\n")
    export_model(str(base), tmp_path / "plain", dtype=torch.float32)
    assert all(torch.equal(weights(tmp_path / "plain")[name], w.float()) for name, w in weights(base).items())
    assert (tmp_path / "plain" / "README.md").read_text() == "A model.\n"


def test_base_that_is_gone_is_named_with_the_remedy(folders, tmp_path):
    _, tuned = folders
    copied = tmp_path / "tuned"
    copied.mkdir()
    for file in files(tuned):
        (copied / file).parent.mkdir(exist_ok=True)
        (copied / file).write_bytes((tuned / file).read_bytes())
    origin = json.loads((copied / "osft.json").read_text())
    (copied / "osft.json").write_text(json.dumps(origin | {"base_model": str(tmp_path / "gone")}))
    code, _, errors = invoke("export", copied, "--format", "lora", "--output", tmp_path / "adapter")
    assert code == 2
    assert str(tmp_path / "gone") in errors
    assert "--base" in errors


def test_command_writes_an_adapter_and_tells_rank_and_loss_of_every_weight(folders, tmp_path):
    base, tuned = folders
    code, output, _ = invoke("export", tuned, "--format", "lora", "--rank", 4, "--output", tmp_path / "adapter")
    assert code == 0
    reader = CheckpointReader(tuned)
    for name in reader.names():
        if reader.has_residual(name):
            (line,) = [line for line in output.splitlines() if name in line]
            assert re.search(r"│ 4 +│ (4|8) +│ [0-9.]+% ", line), line
    assert re.search(rf"an adapter of {base}; lost of the update as a whole: [0-9.]+%", output)
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")


def test_command_says_that_an_update_of_rounded_weights_holds_noise(folders, tmp_path):
    _base, tuned = folders
    export_model(str(tuned), tmp_path / "served", dtype=torch.bfloat16)
    arguments = "export", tmp_path / "served", "--format", "lora", "--output", tmp_path / "adapter"
    code, output, _ = invoke(*arguments)
    assert code == 0
    assert "noise of their rounding" in output


def test_command_says_that_the_base_is_rounded_itself(folders, tmp_path):
    """A later model's adapter on the model of the round before, whose own weights are served rounded."""
    _base, tuned = folders
    export_model(str(tuned), tmp_path / "later", dtype=torch.float32)
    stored = weights(tmp_path / "later")
    stored["model.layers.0.mlp.up_proj.weight"] += 0.01
    save_file(stored, tmp_path / "later" / "model.safetensors", metadata={"format": "pt"})
    code, output, _ = invoke(
        "export", tmp_path / "later", "--format", "lora", "--base", tuned, "--output", tmp_path / "adapter"
    )
    assert code == 0
    assert "served rounded itself" in output
    assert output.count("model.layers.") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "hf", "--rank", "4"], "--rank is for"),
        (["--format", "lora", "--base", "nowhere"], "nowhere"),
        (["--format", "gguf"], "gguf"),
        (["--format", "lora", "--rank", "0"], "--rank"),
        (["--format", "hf", "--dtype", "int8"], "int8"),
        ([], "--format"),
    ],
)
def test_command_refuses_in_one_line(arguments, said, folders, tmp_path):
    _, tuned = folders
    code, _, errors = invoke("export", tuned, *arguments, "--output", tmp_path / "out")
    assert code == 2
    assert said in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["s3://bucket/adapter", "s3:///adapter"])
def test_output_in_an_object_store_is_refused(output, folders, tmp_path, monkeypatch):
    _, tuned = folders
    monkeypatch.chdir(tmp_path)
    code, _, errors = invoke("export", tuned, "--format", "hf", "--output", output)
    assert code == 2
    assert output in errors
    assert not list(tmp_path.iterdir())


def test_home_folder_is_expanded_in_every_path(folders, tmp_path, monkeypatch):
    base, tuned = folders
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "tuned").symlink_to(tuned)
    arguments = "--format", "lora", "--base", "~/base", "--output", "~/adapter"
    code, _output, errors = invoke("export", "~/tuned", *arguments)
    assert code == 0, errors
    assert files(tmp_path / "adapter") == {"adapter_model.safetensors", "adapter_config.json"}


def test_help_of_export_teaches_both_forms():
    code, output, _ = invoke("export", "--help")
    assert code == 0
    for words in ("peft.PeftModel.from_pretrained", "--rank 64", "unfreeze_rank_ratio", "--format hf"):
        assert words in output
