"""Every keyword of training_hub 0.11.2's `osft()`, of its backend and of its published callers is taken."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from osft import OSFTAlgorithm, create_algorithm, osft
from osft.api import MiniTrainerBackend
from osft.cli import read_parameters
from osft.settings.compatibility import NAMES, RENAMED, SPECIAL, WITHOUT_EFFECT
from osft.settings.training import TrainConfig
from tests.test_settings import REQUIRED

KEYWORDS = json.loads((Path(__file__).parent / "contract.json").read_text(encoding="utf-8"))["keywords"]


@pytest.mark.parametrize("name", sorted({name for names in KEYWORDS.values() for name in names.split()}))
def test_name_is_a_parameter_or_has_its_counterpart(name):
    assert name in TrainConfig.model_fields or name in NAMES


def test_each_name_is_in_one_table_and_no_parameters():
    assert len(set(NAMES)) == len(NAMES)
    assert not set(NAMES) & set(TrainConfig.model_fields)
    assert set(RENAMED.values()) <= set(TrainConfig.model_fields)


RENAMED_VALUES = {
    "model_name_or_path": ("m", "m"),
    "batch_size": (8, 8),
    "output_dir": ("o", "o"),
    "osft_unfreeze_rank_ratio": (0.25, 0.25),
    "osft_target_patterns": ("q_proj, 'v_proj'", ["q_proj", "v_proj"]),
    "num_warmup_steps": (3, 3),
    "max_epochs": (4, 4),
    "use_liger_kernels": (False, False),
    "train_dtype": ("bf16", "bfloat16"),
    "resume_from_full_state_checkpoint": ("/state/step-3", "/state/step-3"),
    "random_seed": (7, 7),
    "max_batch_len": (512, 512),
    "target_modules": (["q_proj"], ["q_proj"]),
    "eval_steps": (5, 5),
}


@pytest.mark.parametrize("name", RENAMED)
def test_other_name_sets_the_parameter(name):
    given, expected = RENAMED_VALUES[name]
    own = {key: value for key, value in REQUIRED.items() if key != RENAMED[name]}
    validation = {"validation_split": 0.1} if name == "eval_steps" else {}
    config = TrainConfig.from_parameters(own | validation | {name: given})
    assert getattr(config, RENAMED[name]) == expected
    assert getattr(TrainConfig.from_parameters(REQUIRED | {name: None}), RENAMED[name]) == getattr(
        TrainConfig(**REQUIRED), RENAMED[name]
    ), "None stands for the default"


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_name_without_counterpart_is_taken_with_one_line_that_says_what_replaces_it(name, capsys):
    value = "s3://bucket/prefix" if name == "checkpoint_storage" else 17
    assert TrainConfig.from_parameters(REQUIRED | {name: value}) == TrainConfig(**REQUIRED)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"osft: {name} ")
    assert line.endswith(WITHOUT_EFFECT[name])


@pytest.mark.parametrize(
    ("given", "expected", "said"),
    [
        ({"osft": True}, {}, ""),
        ({"osft": False}, {"unfreeze_rank_ratio": 1.0}, "nothing is frozen in the target weights"),
        ({"training_mode": "epoch", "max_steps": 5, "num_epochs": 2}, {"num_epochs": 2, "max_steps": None}, ""),
        ({"training_mode": SimpleNamespace(value="step"), "max_steps": 5}, {"max_steps": 5, "num_epochs": 5}, ""),
        ({"max_steps": 0}, {"max_steps": None}, ""),
        (
            {"pretraining_config": SimpleNamespace(block_size=64)},
            {"is_pretraining": True, "block_size": 64},
            "",
        ),
        ({"pretraining_config": {"block_size": 64}, "block_size": 64}, {"block_size": 64}, ""),
        (
            {"min_samples_per_validation": 20, "validation_split": 0.1},
            {"validation_frequency": 3},
            "validation_frequency=3 steps",
        ),
        ({"validate_at_epoch": True, "validate_at_final": True, "validation_split": 0.1}, {}, "validate_at_final is"),
        (
            {"validate_at_epoch": True, "validation_split": 0.1, "validation_frequency": 2},
            {"validation_frequency": 2},
            "validate_at_epoch has no effect",
        ),
        ({"bf16": True}, {"dtype": "bfloat16"}, ""),
        ({"fp16": False}, {}, ""),
        ({"flash_attention": True}, {"attn_implementation": "flash_attention_2"}, ""),
        ({"disable_flash_attn": True}, {"attn_implementation": "sdpa"}, ""),
        ({"train_dtype": torch.bfloat16}, {"dtype": "bfloat16"}, ""),
        ({"train_dtype": "torch.float32"}, {"dtype": "float32"}, ""),
        ({"save_dtype": torch.float32}, {"save_dtype": "float32"}, ""),
        ({"save_dtype": "bf16"}, {"save_dtype": "bfloat16"}, ""),
        ({"osft_upcast_dtype": "float32", "checkpoint_storage": "pvc", "max_tokens": 0}, {}, ""),
        ({"max_epochs": 2, "num_epochs": 2}, {"num_epochs": 2}, ""),
        ({"target_modules": "all-linear"}, {"target_patterns": None}, ""),
    ],
)
def test_value_is_read_as_it_is_meant_there(given, expected, said, capsys):
    config = TrainConfig.from_parameters(REQUIRED | given)
    assert {name: getattr(config, name) for name in expected} == expected
    out = capsys.readouterr().out
    assert said in out
    assert bool(out) == bool(said)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"max_epochs": 3, "num_epochs": 2}, "max_epochs=3 and num_epochs=2 are one setting with two values"),
        ({"batch_size": 4}, "batch_size=4 and effective_batch_size=8 are one setting"),
        ({"model_name_or_path": "other"}, "model_name_or_path='other' and model_path='m' are one setting"),
        ({"train_dtype": "bf16", "dtype": "float32"}, "train_dtype='bf16'|'bfloat16' and dtype='float32'"),
        ({"bf16": True, "dtype": "float32"}, "bf16='bfloat16' and dtype='float32' are one setting"),
        ({"train_dtype": "float16"}, "train_dtype must be 'bfloat16' or 'float32'"),
        ({"save_dtype": "int8"}, "save_dtype must be 'bfloat16' or 'float32'"),
        ({"fp16": True}, "fp16=True: nothing is computed in float16 here"),
        ({"training_mode": "token"}, "training_mode='token' is none of 'epoch' and 'step'"),
        ({"training_mode": "infinite"}, "Give num_epochs or max_steps"),
        ({"training_mode": "step"}, "training_mode='step' needs max_steps"),
        ({"checkpoint_storage": "somewhere"}, "checkpoint_storage must be 'pvc' or a URI"),
        ({"max_epoch": 3}, "unknown parameter 'max_epoch'. Did you mean 'max_epochs'"),
        ({"wandb_projct": "x"}, "unknown parameter 'wandb_projct'. Did you mean 'wandb_project'"),
        ({"xyzzy_42": 1}, "unknown parameter 'xyzzy_42'"),
        ({"max_epochs": 2.5}, "num_epochs must be int, got 2.5"),
    ],
)
def test_contradiction_and_what_nobody_knows_are_refused(given, problem):
    with pytest.raises(ValueError, match=problem):
        TrainConfig.from_parameters(REQUIRED | given)


def test_the_function_the_class_and_the_command_take_the_same_names(tmp_path, monkeypatch):
    seen: list[TrainConfig] = []
    monkeypatch.setattr("osft.api.run", lambda config, callbacks: seen.append(config))
    more = {"max_epochs": 3, "num_warmup_steps": 2, "train_dtype": "bf16", "fsdp_options": object()}
    osft(**REQUIRED, **more)
    OSFTAlgorithm(MiniTrainerBackend()).train(**REQUIRED, **more)
    create_algorithm("osft").train(**REQUIRED, **more)
    mini_trainer = {other: REQUIRED[field] for other, field in RENAMED.items() if field in REQUIRED}
    del mini_trainer["max_batch_len"]
    rest = {name: value for name, value in REQUIRED.items() if name not in map(RENAMED.get, mini_trainer)}
    osft(**mini_trainer, **rest, **more)
    (tmp_path / "c.yaml").write_text("".join(f"{name}: {value}\n" for name, value in REQUIRED.items()))
    settings = ["max_epochs=3", "num_warmup_steps=2", "train_dtype=bf16", "fsdp_options={cpu_offload: true}"]
    seen.append(TrainConfig.from_parameters(read_parameters(tmp_path / "c.yaml", settings)))
    assert (seen[0].num_epochs, seen[0].warmup_steps, seen[0].dtype) == (3, 2, "bfloat16")
    assert all(one == another for one, another in itertools.pairwise(seen))
    assert len(seen) == 5


def test_every_special_name_is_tried():
    tried = {"osft", "training_mode", "pretraining_config", "min_samples_per_validation", "validate_at_epoch"}
    assert set(SPECIAL) == tried | {"bf16", "fp16", "flash_attention", "disable_flash_attn"}
