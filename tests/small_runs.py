"""Training runs that are over in a second, here or in a process of their own; tests change what they are about."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from osft.settings.training import TrainConfig


def run_settings(model: Path | str, data: Path | str, output: Path | str, **changes: Any) -> dict[str, Any]:
    settings = {
        "model_path": str(model),
        "data_path": str(data),
        "ckpt_output_dir": str(output),
        "unfreeze_rank_ratio": 0.25,
        "effective_batch_size": 12,
        "max_tokens_per_gpu": 300,
        "max_seq_len": 200,
        "learning_rate": 1e-2,
        "nproc_per_node": 1,
    }
    return settings | changes


def run_config(model: Path | str, data: Path | str, output: Path | str, **changes: Any) -> TrainConfig:
    return TrainConfig(**run_settings(model, data, output, **changes))


def start(config: TrainConfig, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """A training call in a process of its own; its settings lie in `folder`."""
    settings = folder / f"settings-{config.node_rank}.json"
    settings.write_text(json.dumps(config.to_dict()))
    code = "import json, sys; from osft import TrainConfig; from osft.training import train; "
    code += "train(TrainConfig(**json.load(open(sys.argv[1]))))"
    command = [sys.executable, "-c", code, str(settings)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    )
