"""Settings are refused where they are set, by name and with the allowed range."""

import json
import re

import numpy as np
import pytest
import torch

from osft.settings import schedule
from osft.settings.subspace import SubspaceConfig
from osft.settings.training import TrainConfig

REQUIRED = {
    "model_path": "m",
    "data_path": "d",
    "ckpt_output_dir": "o",
    "unfreeze_rank_ratio": 0.25,
    "effective_batch_size": 8,
    "max_tokens_per_gpu": 512,
    "max_seq_len": 256,
    "learning_rate": 1e-4,
}


@pytest.mark.parametrize(
    ("ratio", "problem"),
    [
        (0, "nothing to train"),
        (1.5, r"between 0.0 and 1.0, got 1.5"),
        (-0.1, r"between 0.0 and 1.0"),
        (float("nan"), r"between 0.0 and 1.0"),
        ("a", r"must be float, got 'a' \(str\)"),
        (True, "must be float"),
        (None, "must be float"),
    ],
)
def test_bad_ratio_is_refused(ratio, problem):
    with pytest.raises(ValueError, match=rf"unfreeze_rank_ratio.*{problem}"):
        SubspaceConfig(unfreeze_rank_ratio=ratio)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"free_subspace": "both"}, "free_subspace must be 'complement' | 'core', got 'both'"),
        ({"rank_allocation": "best"}, "rank_allocation must be 'uniform' | 'adaptive'"),
        ({"target_patterns": "q_proj"}, "target_patterns must be list[str] | None"),
        ({"target_patterns": ["("]}, "'(' is not a regular expression"),
    ],
)
def test_bad_subspace_is_refused(setting, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        SubspaceConfig(unfreeze_rank_ratio=0.25, **setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"effective_batch_size": 0},
        {"effective_batch_size": 2.5},
        {"max_tokens_per_gpu": 0},
        {"max_seq_len": 1},
        {"learning_rate": -1e-4},
        {"learning_rate": "fast"},
        {"num_epochs": 0},
        {"max_steps": 0},
        {"warmup_steps": -1},
        {"beta1": 1.5},
        {"lr_scheduler": "cosinus"},
        {"dtype": "int8"},
        {"nproc_per_node": 0},
        {"nproc_per_node": "all"},
        {"master_port": 70000},
        {"seed": -1},
        {"model_path": ""},
        {"save_best_val_loss": True},
        {"validation_frequency": 2},
    ],
    ids=str,
)
def test_bad_training_setting_is_refused_by_name(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        TrainConfig(**(REQUIRED | setting))


def test_values_of_numpy_and_of_whole_numbers_become_plain():
    config = TrainConfig(**(REQUIRED | {"seed": np.int64(3), "learning_rate": 1, "max_steps": np.int32(5)}))
    assert json.loads(json.dumps(config.to_dict()))["seed"] == 3
    assert isinstance(config.learning_rate, float)


def test_block_size_without_pretraining_is_said_to_be_ignored():
    with pytest.warns(UserWarning, match="block_size is of use with is_pretraining=True only"):
        TrainConfig(**REQUIRED, block_size=16)


@pytest.mark.parametrize("name", sorted(schedule._NEED_NO_ARGUMENTS))
def test_schedule_that_is_not_tried_can_be_made(name):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for warmup_steps in (0, 2):
        made = schedule.make(name, {}, optimizer, warmup_steps=warmup_steps, num_training_steps=9)
        assert made.get_last_lr() == [0.0 if warmup_steps and name != "greedy" else 1.0]


def test_settings_survive_json():
    config = TrainConfig(**REQUIRED, max_steps=3, lr_scheduler_kwargs={"num_cycles": "0.5"})
    assert TrainConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_none_stands_for_the_default():
    given = REQUIRED | {"seed": None, "lr_scheduler": None, "nnodes": None}
    assert TrainConfig.from_parameters(given) == TrainConfig(**REQUIRED)


def test_every_setting_is_documented():
    undocumented = [name for name, field in TrainConfig.model_fields.items() if len(field.description or "") < 20]
    assert undocumented == []


def test_subspace_settings_are_a_part_of_the_training_settings():
    config = TrainConfig(**REQUIRED, free_subspace="core", target_patterns=["q_proj"])
    expected = SubspaceConfig(unfreeze_rank_ratio=0.25, free_subspace="core", target_patterns=["q_proj"])
    assert config.subspace == expected
