"""Every parameter of `osft()` has an effect, and the documented one: the call that the tests here change."""

import pytest

from osft import osft
from tests.training.in_process import run_in_process


@pytest.fixture
def call(model_folder, chats, tmp_path, monkeypatch):
    """`osft()` on the tiny model with a few steps, in this process; `call(name=value)` changes a parameter."""
    run_in_process(monkeypatch)
    calls = 0

    def call_osft(**changes):
        nonlocal calls
        calls += 1
        given = {
            "model_path": str(model_folder),
            "data_path": str(chats),
            "unfreeze_rank_ratio": 0.25,
            "effective_batch_size": 12,
            "max_tokens_per_gpu": 300,
            "max_seq_len": 128,
            "learning_rate": 1e-2,
            "ckpt_output_dir": str(tmp_path / f"run-{calls}"),
            "data_output_dir": str(tmp_path / "data"),
            "max_steps": 4,
            "save_final_checkpoint": False,
        }
        return osft(**(given | changes))

    return call_osft


def losses(result) -> list[float]:
    return [line["loss"] for line in result.history]


def rates(result) -> list[float]:
    return [line["learning_rate"] for line in result.history]
