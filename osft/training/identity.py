"""What a training run is made of, and whether two runs are the same.

    what                    by its content                                        written to
    weights                 the shards that the model reads, their index, exact/  config.json, training.json and
    model_config            config.json and code beside it                        state/step-<n>/position.json of the
    tokenizer               its files and chat templates                          run, as `made_of`
    dataset                 the prepared data: its key
    replay                  the samples that were drawn from earlier data: the key of their dataset
    own_text                what the model wrote to be held to and measured on: the text's file
    factors                 the bases of all target weights
    settings                those that determine the result (all but _NOT_IDENTITY)

A finished run is returned, and an unfinished one is resumed, only if all of that is what it was. Where the model, the
data and the factors lie, and what those places are called, does not matter.

    what happened since the run was started        what the next call does
    other weights, code or data at the same path   refused, with the hash there and the hash now
    the factors were computed on other hardware    a resume is refused: coefficients in other bases mean another update
    a model of a finished run was removed          trained again, from the training state where that has what is needed
    the run is of a release that wrote no hashes   settings, paths and data are compared, and it is said that the rest
                                                   cannot be
"""

import json
from pathlib import Path
from typing import Any

from osft.models.checkpoint import EXACT
from osft.models.weight_files import read_index
from osft.settings.base import default
from osft.settings.training import TrainConfig
from osft.storage.hashes import files_sha256, named_sha256

MADE_OF = "made_of"
_NOT_IDENTITY = frozenset(
    {
        *("ckpt_output_dir", "data_output_dir", "resume", "save_state_minutes", "save_state_steps", "dry_run"),
        *("nproc_per_node", "nnodes", "node_rank", "rdzv_id", "rdzv_endpoint", "master_addr", "master_port"),
        *("rdzv_timeout_minutes", "process_group_timeout_minutes", "deterministic"),
        *("max_tokens_per_gpu", "gradient_checkpointing", "use_liger", "torch_compile", "attn_implementation"),
        "trust_remote_code",
        *("mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name", "tensorboard_log_dir"),
        *("wandb_project", "wandb_entity", "wandb_run_name"),
    }
)
"""How and where a run is executed, saved and logged, not what it computes: two that differ only in this are one run."""
_PATHS = {
    "model_path": "weights",
    "factors": "factors",
    "calibration_data": "factors",
    "data_path": "dataset",
    "validation_data_path": "dataset",
    "replay_data": "replay",
}
"""Settings that name what has a hash of its own."""


def model_contents(folder: Path) -> dict[str, str]:
    """The hashes of a model's `weights`, `model_config` and `tokenizer`, as hexadecimal digits."""
    from osft.data.dataset_folder import hash_tokenizer  # brings the datasets library

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = [index.name, *sorted(set(read_index(index).values()))]
    exact = sorted(file.relative_to(folder).as_posix() for file in (folder / EXACT).rglob("*") if file.is_file())
    code = sorted(file.name for file in folder.glob("*.py"))
    groups = {"weights": [*names, *exact], "model_config": ["config.json", *code]}
    digests = files_sha256(folder / name for group in groups.values() for name in group)
    contents = {what: named_sha256({name: digests[folder / name] for name in group}) for what, group in groups.items()}
    return contents | {"tokenizer": hash_tokenizer(folder)}


def differences(recorded: dict[str, Any], config: TrainConfig, made_of: dict[str, str]) -> list[str]:
    """How a run whose settings file is `recorded` differs from one of these settings that is made of `made_of`.

    What only one of them is made of is not compared. A setting that the recorded run does not know is one of a newer
    release, and was at its default.
    """
    there = recorded.get(MADE_OF) or {}
    if "dataset" in recorded:
        there = {"dataset": recorded["dataset"]} | there
    found = [
        f"{what}: {there[what][:12]} there, {now[:12]} now"
        for what, now in made_of.items()
        if what in there and there[what] != now
    ]
    determining = {name: value for name, value in config.to_dict().items() if name not in _NOT_IDENTITY}
    settings = json.loads(json.dumps(determining))
    before = {name: default(field) for name, field in TrainConfig.model_fields.items() if not field.is_required()}
    before |= recorded
    for name, now in settings.items():
        what = _PATHS.get(name)
        if what in there and what in made_of and there[what] == made_of[what]:
            continue  # the same, wherever it lies
        if before.get(name) != now:
            found.append(f"{name}: {before.get(name)!r} there, {now!r} now")
    return found


def cannot_be_compared(recorded: dict[str, Any], made_of: dict[str, str]) -> list[str]:
    """What a run of an older release does not say of itself."""
    there = {"dataset", *(recorded.get(MADE_OF) or {})}
    return [what for what in made_of if what not in there]
