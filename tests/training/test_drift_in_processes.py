"""Distillation, the predicted drift and the step that fits are the same for any number of processes."""

import dataclasses

import pytest

from osft.config import TrainConfig
from osft.training import train
from tests.training.in_process import run_in_process


def test_two_processes_hold_fit_and_predict_as_one(chats, model_folder, tmp_path, monkeypatch):
    config = TrainConfig(
        model_path=str(model_folder),
        data_path=str(chats),
        data_output_dir=str(tmp_path / "data"),
        ckpt_output_dir=str(tmp_path / "two"),
        protect="activations",
        unfreeze_rank_ratio=0.5,
        calibration_tokens=400,
        stiffness=1.0,  # so that there is a drift to compare
        distill_weight=3.0,
        distill_tokens=100,
        fit_step=True,
        max_step_drift=100.0,
        max_seq_len=300,
        effective_batch_size=12,
        max_tokens_per_gpu=140,
        learning_rate=1e-2,
        max_steps=4,
        nproc_per_node=2,
    )
    two = train(config)
    run_in_process(monkeypatch)
    one = train(dataclasses.replace(config, nproc_per_node=1, ckpt_output_dir=str(tmp_path / "one")))
    assert (two.summary["world_size"], one.summary["world_size"]) == (2, 1)
    for name in ("loss", "distillation_loss", "predicted_drift"):
        found, expected = ([line[name] for line in result.history] for result in (two, one))
        assert found == pytest.approx(expected, rel=1e-3), name
    assert two.fitted_step["scale"] == one.fitted_step["scale"]
    for found, expected in zip(two.fitted_step["tried"], one.fitted_step["tried"], strict=True):
        assert found == pytest.approx(expected, rel=1e-2, abs=1e-5)
    layouts = [{name: layout["predicted_drift"] for name, layout in r.rank_layout.items()} for r in (two, one)]
    assert layouts[0] == pytest.approx(layouts[1], rel=1e-2)


@pytest.mark.slow
def test_two_processes_sample_the_drift_of_one(chats, model_folder, tmp_path, monkeypatch):
    """Each draw is of both processes' texts; FSDP2 averages their gradients."""
    config = TrainConfig(
        model_path=str(model_folder),
        data_path=str(chats),
        data_output_dir=str(tmp_path / "data"),
        ckpt_output_dir=str(tmp_path / "two"),
        protect="activations",
        unfreeze_rank_ratio=0.5,
        calibration_tokens=800,
        stiffness=1.0,
        max_seq_len=300,
        effective_batch_size=60,
        max_tokens_per_gpu=1000,
        learning_rate=1e-3,
        num_epochs=30,
        nproc_per_node=2,
    )
    two = train(config)
    run_in_process(monkeypatch)
    one = train(dataclasses.replace(config, nproc_per_node=1, ckpt_output_dir=str(tmp_path / "one")))
    for result in (two, one):
        assert result.summary["sampled_drift"]["draws"] >= 50
    sums = [sum(layout["sampled_drift"] for layout in result.rank_layout.values()) for result in (two, one)]
    assert sums[0] == pytest.approx(sums[1], rel=0.5)
