"""The command takes the parameters of `osft()` and ends with one clear line where they cannot work."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from osft import cli
from osft.settings.base import default_text, type_text
from osft.settings.training import TrainConfig, grouped_fields
from tests.conftest import arithmetic, write_jsonl
from tests.training.in_process import run_in_process

ROOT = Path(__file__).parents[1]


def invoke(*arguments: object, width: int = 300) -> tuple[int, str, str]:
    """Exit code, output and errors; the lines are not wrapped up to `width` columns."""
    result = CliRunner().invoke(
        cli.app, [str(argument) for argument in arguments], env={"COLUMNS": str(width), "TERM": "dumb"}
    )
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def file(tmp_path, model_folder, chats) -> Path:
    settings = {
        "model_path": str(model_folder),
        "data_path": str(chats),
        "ckpt_output_dir": str(tmp_path / "out"),
        "unfreeze_rank_ratio": 0.25,
        "effective_batch_size": 60,
        "max_tokens_per_gpu": 2048,
        "max_seq_len": 64,
        "learning_rate": 1e-3,
        "nproc_per_node": 1,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_help_shows_every_parameter_with_type_default_and_documentation():
    code, output, _ = invoke("train", "--help")
    assert code == 0
    lines = output.splitlines()
    for name, field in TrainConfig.model_fields.items():
        default = "required" if field.is_required() else f"= {default_text(field)}"
        head = f"  {name}  {type_text(field)}  {default}"
        (at,) = [number for number, line in enumerate(lines) if line.rstrip() == head]
        assert " ".join(field.description.split())[:60] in lines[at + 1]
    assert all(title in lines for title in grouped_fields())


def test_help_fits_80_columns():
    _, output, _ = invoke("train", "--help", width=80)
    assert max(map(len, output.splitlines())) <= 80


def test_every_parameter_is_in_one_group():
    assert sorted(name for group in grouped_fields().values() for name in group) == sorted(TrainConfig.model_fields)
    assert "Other" not in grouped_fields()


def test_help_loads_neither_torch_nor_transformers():
    code = "import sys, osft.cli; print([n for n in ('torch', 'transformers', 'osft.training') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_set_goes_over_the_file_and_is_read_by_type(file):
    given = cli.read_parameters(
        file,
        [
            "learning_rate=2e-5",
            'target_patterns=["q_proj", v_proj]',
            "mlflow_run_name=2026-11-22",
            "use_liger=false",
            "lr_scheduler=cosine_with_min_lr",
            "lr_scheduler_kwargs={min_lr: 1e-6}",
            "nproc_per_node=auto",
            "max_steps=null",
            "rdzv_id=77",
        ],
    )
    assert given["effective_batch_size"] == 60
    config = TrainConfig.from_parameters(given)
    assert config.learning_rate == 2e-5
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert config.target_patterns == ["q_proj", "v_proj"]
    assert config.mlflow_run_name == "2026-11-22"
    assert config.use_liger is False
    assert config.nproc_per_node == "auto"
    assert config.max_steps is None
    assert config.rdzv_id == 77


def test_float_without_a_dot_in_the_file_is_a_number(file):
    file.write_text(file.read_text().replace("learning_rate: 0.001", "learning_rate: 1e-5"))  # a string, to YAML 1.1
    assert TrainConfig.from_parameters(cli.read_parameters(file, [])).learning_rate == 1e-5


def test_example_config_holds_valid_parameters():
    config = TrainConfig.from_parameters(cli.read_parameters(ROOT / "examples" / "osft.yaml", []))
    assert config.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--set", "num_epoch=3"], "unknown parameter 'num_epoch'. Did you mean 'num_epochs'?"),
        (["--set", "num_epochs"], "expected NAME=VALUE"),
        (["--set", "num_epochs=three"], "num_epochs must be int, got 'three' (str)"),
        (["--set", "target_patterns=[a"], "--set target_patterns=[a: while parsing"),
        (["--set", "unfreeze_rank_ratio=0"], "nothing to train"),
        (["--set", "model_path=./no-model", "--dry-run"], "model folder ./no-model does not exist"),
        (["--set", "data_path=./no-data.jsonl", "--dry-run"], "./no-data.jsonl does not exist"),
        (["--set", "model_path=./no-model"], "model folder ./no-model does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_one_line_and_exit_code_2(file, arguments, problem):
    code, output, error = invoke("train", file, *arguments)
    assert (code, output) == (2, "")
    assert error.startswith("error: ")
    assert problem in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a: [", "is not a YAML file"), ("- a", "must hold parameters"), ("lr: 1", "unknown parameter 'lr'")],
)
def test_bad_config_file_is_refused(tmp_path, text, problem):
    (tmp_path / "c.yaml").write_text(text)
    code, _, error = invoke("train", tmp_path / "c.yaml")
    assert code == 2
    assert problem in error


def test_missing_parameters_are_named():
    code, _, error = invoke("train", "--set", "model_path=m")
    assert code == 2
    missing = error.split("required parameters are missing: ")[1].strip().split(", ")
    assert sorted(missing) == sorted(set(grouped_fields()["Required"]) - {"model_path"})


def test_dry_run_explains_every_line_and_starts_nothing(file, tmp_path):
    code, output, _ = invoke("train", file, "--dry-run", "--gpu-memory", 4, "--set", "num_epochs=3")
    assert code == 0
    assert re.search(r"samples +120;", output)
    assert re.search(r"steps +6 of 60 samples, epochs: 3", output)
    for part in ("weights", "base weights", "bases", "coefficients", "activations", "logits", "allowance"):
        (line,) = [line for line in output.splitlines() if re.match(rf"\W+{part} +\W", line)]
        assert re.search(r"\d\.\d\d .* [a-z]{4,}", line)
    assert "It fits on 1 GPU of 4 GiB" in output
    assert not (tmp_path / "out").exists()


def test_dry_run_fits_80_columns(file):
    _, output, _ = invoke("train", file, "--dry-run", width=80)
    assert max(map(len, output.splitlines())) <= 80


def test_training_prints_its_result(file, tmp_path, monkeypatch):
    run_in_process(monkeypatch)
    code, output, _ = invoke("train", file, "--set", "max_steps=1")
    assert code == 0
    assert f"checkpoint  {tmp_path}/out/hf_format/samples_60.0" in output
    assert json.loads((tmp_path / "out" / "training.json").read_text())["steps"] == 1


def test_failed_training_is_exit_code_1_with_the_reason(file, monkeypatch):
    run_in_process(monkeypatch)
    code, _, error = invoke("train", file, "--set", "learning_rate=1e30", "--set", "max_grad_norm=0")
    assert code == 1
    assert "Lower learning_rate" in error


def test_decomposition_is_computed_once_and_found_by_training(file, tmp_path, model_folder, monkeypatch):
    code, output, _ = invoke("decompose", model_folder, "--store", tmp_path / "f", "--unfreeze-rank-ratio", 0.25)
    assert code == 0
    manifest = Path(output.split()[-1])
    assert len(json.loads(manifest.read_text())["weights"]) == 14
    run_in_process(monkeypatch)
    code, output, _ = invoke("train", file, "--set", f"factors={manifest}", "--set", "max_steps=1")
    assert code == 0
    assert "decompose" not in output


def test_evaluation_of_a_model_against_itself_shows_no_change(model_folder, tmp_path):
    torch.manual_seed(0)
    new, old = (
        write_jsonl(tmp_path / f"{name}.jsonl", arithmetic(4, seed)) for seed, name in enumerate(("new", "old"))
    )
    code, output, _ = invoke("evaluate", model_folder, model_folder, new, old)
    assert code == 0
    for name, role in (("new", "new task"), ("old", "anchor")):
        (line,) = [line for line in output.splitlines() if re.match(rf"\W+{name} ", line)]
        assert role in line
        assert "+0.00%" in line


def test_evaluation_decides_by_the_rules_of_a_file(model_folder, tmp_path):
    new = write_jsonl(tmp_path / "new.jsonl", arithmetic(4))
    gate = tmp_path / "gate.yaml"
    gate.write_text("min_gain: {bound: 0.1}\n")
    store = tmp_path / "scores"
    code, output, _ = invoke("evaluate", model_folder, model_folder, new, "--gate", gate, "--score-store", store)
    assert code == 0
    assert "gate: refuse: min_gain: new gained 0.00% in loss against base, at least 10.00% + 1 x 0.00%" in output
    gate.write_text("min_gain: null\n")
    code, output, _ = invoke("evaluate", model_folder, model_folder, new, "--gate", gate, "--score-store", store)
    assert (code, output.splitlines()[-1]) == (0, "gate: promote")


def test_gate_that_cannot_be_is_refused_before_anything_is_read(tmp_path):
    gate = tmp_path / "gate.yaml"
    gate.write_text("min_gains: {bound: 0.1}\n")
    code, _, error = invoke("evaluate", "./no-model", "./no-model", "./no-data", "--gate", gate)
    assert code == 2
    assert "unknown gate rule 'min_gains'. Did you mean 'min_gain'?" in error
