"""Distillation, the predicted drift and the step that fits are the same for any number of processes."""

from collections.abc import Callable

import pytest

from osft.settings.training import TrainConfig
from osft.training import train
from osft.training.result import TrainResult
from tests.training.in_process import run_in_process


@pytest.fixture
def on_two_and_one(chats, model_folder, tmp_path, monkeypatch) -> Callable[..., tuple[TrainResult, TrainResult]]:
    """The same training by two processes and by one."""

    def call(**settings) -> tuple[TrainResult, TrainResult]:
        config = TrainConfig(
            model_path=str(model_folder),
            data_path=str(chats),
            data_output_dir=str(tmp_path / "data"),
            ckpt_output_dir=str(tmp_path / "two"),
            protect="activations",
            unfreeze_rank_ratio=0.5,
            stiffness=1.0,  # so that there is a drift to compare
            max_seq_len=300,
            nproc_per_node=2,
            **settings,
        )
        two = train(config)
        run_in_process(monkeypatch)
        return two, train(config.replace(nproc_per_node=1, ckpt_output_dir=str(tmp_path / "one")))

    return call


def test_two_processes_hold_fit_and_predict_as_one(on_two_and_one):
    two, one = on_two_and_one(
        calibration_tokens=400,
        distill_weight=3.0,
        distill_tokens=100,
        fit_step=True,
        max_step_drift=100.0,
        effective_batch_size=12,
        max_tokens_per_gpu=140,
        learning_rate=1e-2,
        max_steps=4,
    )
    assert (two.summary.world_size, one.summary.world_size) == (2, 1)
    for name in ("loss", "distillation_loss", "predicted_drift"):
        found, expected = ([line[name] for line in result.history] for result in (two, one))
        assert found == pytest.approx(expected, rel=1e-3), name
    assert two.fitted_step.scale == one.fitted_step.scale
    for found, expected in zip(two.fitted_step.tried, one.fitted_step.tried, strict=True):
        assert found.to_dict() == pytest.approx(expected.to_dict(), rel=1e-2, abs=1e-5)
    layouts = [{name: layout.predicted_drift for name, layout in r.rank_layout.items()} for r in (two, one)]
    assert layouts[0] == pytest.approx(layouts[1], rel=1e-2)


@pytest.mark.slow
def test_two_processes_sample_the_drift_of_one(on_two_and_one):
    """Each draw is of both processes' texts; FSDP2 averages their gradients."""
    two, one = on_two_and_one(
        calibration_tokens=800, effective_batch_size=60, max_tokens_per_gpu=1000, learning_rate=1e-3, num_epochs=30
    )
    for result in (two, one):
        assert result.summary.sampled_drift.draws >= 50
    sums = [sum(layout.sampled_drift for layout in result.rank_layout.values()) for result in (two, one)]
    assert sums[0] == pytest.approx(sums[1], rel=0.5)
