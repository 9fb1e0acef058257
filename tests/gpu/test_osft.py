"""`osft()` as it really runs, on the GPU: processes of its own, a kill in between, and a checkpoint that opens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.gpu

CALL = """
import json, sys
from osft import osft

if __name__ == "__main__":
    osft(**json.loads(sys.argv[1]))
"""
STEPS = 60
ROOT = Path(__file__).parents[2]


def start(parameters: dict[str, object], log: Path) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-c", CALL, json.dumps(parameters)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
        )


def test_run_that_is_killed_resumes_learns_and_leaves_a_model(device, model_folder, chats, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    parameters = {
        "model_path": str(model_folder),
        "data_path": str(chats),
        "ckpt_output_dir": str(output),
        "protect": "activations",
        "calibration_tokens": 256,
        "stiffness": 10.0,
        "unfreeze_rank_ratio": 0.25,
        "effective_batch_size": 12,
        "max_tokens_per_gpu": 1024,
        "max_seq_len": 300,
        "learning_rate": 1e-2,
        "num_epochs": 6,
        "max_steps": STEPS,
        "save_state_steps": 1,
    }
    launcher = start(parameters, log)
    try:
        while not list((output / "state").glob("step-*[0-9]")):
            assert launcher.poll() is None, log.read_text()
            time.sleep(0.02)
    finally:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
    assert not (output / "training.json").exists(), "the run was over before it was killed"

    launcher = start(parameters, log)
    assert launcher.wait(timeout=200) == 0, log.read_text()
    history = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history] == list(range(1, STEPS + 1))
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    summary = json.loads((output / "training.json").read_text())
    assert (summary["device"] == "cpu") == (device.type == "cpu")
    folder = output / summary["checkpoints"][-1]
    assert list(folder.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
