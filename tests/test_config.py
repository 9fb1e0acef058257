"""Settings are refused where they are set, by name and with the allowed range."""

import pytest

from osft.config import SubspaceConfig, TrainConfig

PATHS = {"model_path": "m", "data_path": "d", "factors_path": "f", "output_dir": "o"}
QUARTER = SubspaceConfig(unfreeze_rank_ratio=0.25)


@pytest.mark.parametrize(
    ("ratio", "problem"),
    [
        (0, "nothing to train"),
        (1.5, r"between 0.0 and 1.0, got 1.5"),
        (-0.1, r"between 0.0 and 1.0"),
        (float("nan"), r"between 0.0 and 1.0"),
        ("a", r"must be a number, got 'a' \(str\)"),
        (True, "must be a number"),
        (None, "must be a number"),
    ],
)
def test_bad_ratio_is_refused(ratio, problem):
    with pytest.raises(ValueError, match=rf"unfreeze_rank_ratio.*{problem}"):
        SubspaceConfig(unfreeze_rank_ratio=ratio)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"free_subspace": "both"}, "free_subspace must be one of"),
        ({"target_patterns": "q_proj"}, "must be a list of strings"),
        ({"target_patterns": ["("]}, "'\\(' is not a regular expression"),
    ],
)
def test_bad_subspace_is_refused(setting, problem):
    with pytest.raises(ValueError, match=problem):
        SubspaceConfig(unfreeze_rank_ratio=0.25, **setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"effective_batch_size": 0},
        {"effective_batch_size": 2.5},
        {"max_tokens_per_gpu": 0},
        {"learning_rate": -1e-4},
        {"learning_rate": "fast"},
        {"num_epochs": 0},
        {"max_steps": 0},
        {"warmup_steps": -1},
        {"beta1": 1.5},
        {"lr_scheduler": "cosinus"},
        {"dtype": "int8"},
        {"nproc_per_node": 0},
        {"seed": -1},
        {"model_path": ""},
    ],
)
def test_bad_training_setting_is_refused_by_name(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        TrainConfig(**(PATHS | {"subspace": QUARTER} | setting))


def test_settings_survive_json():
    import json

    config = TrainConfig(**PATHS, subspace=QUARTER, max_steps=3)
    assert TrainConfig(**json.loads(json.dumps(config.to_dict()))) == config
