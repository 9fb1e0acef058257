"""What the parameters of the optimization do."""

import math

import pytest
import torch

from osft.training import worker
from tests.parameters.conftest import losses, rates


@pytest.mark.covers("learning_rate", "lr_scheduler")
def test_learning_rate_is_the_peak_of_the_schedule(call):
    assert rates(call(learning_rate=3e-3, lr_scheduler="constant")) == [3e-3] * 4
    assert rates(call(lr_scheduler="linear")) == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert rates(call()) == pytest.approx([1e-2 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]), "cosine"


@pytest.mark.covers("lr_scheduler")
@pytest.mark.parametrize(
    "schedule",
    [
        *("cosine_with_restarts", "polynomial", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau"),
        *("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"),
    ],
)
def test_every_schedule_of_transformers_trains(call, schedule):
    arguments = {
        "cosine_with_min_lr": {"min_lr": "1e-3"},
        "cosine_warmup_with_min_lr": {"min_lr": "1e-3"},
        "warmup_stable_decay": {"num_decay_steps": "2"},
        "reduce_lr_on_plateau": {"patience": "0", "factor": "0.5", "threshold": "10"},
    }
    found = rates(call(lr_scheduler=schedule, lr_scheduler_kwargs=arguments.get(schedule)))
    assert all(0 <= rate <= 1e-2 * 1.01 for rate in found)
    if schedule not in ("constant_with_warmup", "greedy", "inverse_sqrt"):
        assert found[-1] < found[0]


def test_schedules_above_are_all_that_transformers_knows():
    from transformers import SchedulerType

    tested = set(test_every_schedule_of_transformers_trains.pytestmark[0].args[1]) | {"linear", "cosine", "constant"}
    assert tested == {schedule.value for schedule in SchedulerType}


@pytest.mark.covers("warmup_steps")
def test_warmup_rises_linearly_to_the_peak(call):
    for schedule in ("cosine", "constant"):
        assert rates(call(warmup_steps=2, lr_scheduler=schedule))[:3] == pytest.approx([0, 5e-3, 1e-2])
    with pytest.raises(ValueError, match="'reduce_lr_on_plateau' has no warm-up"):
        call(lr_scheduler="reduce_lr_on_plateau", warmup_steps=1)


@pytest.mark.covers("warmup_steps")
@pytest.mark.parametrize(
    ("warmup_steps", "is_said"), [(0, False), (1, False), (3, False), (4, True), (5, True), (100, True)]
)
def test_warmup_that_the_run_does_not_get_to_the_end_of_is_said(call, capsys, warmup_steps, is_said):
    """By the plan; and by training, which then really stays below the peak."""
    text = f"warmup_steps={warmup_steps} but the run has 4 steps: the peak learning rate is never reached"
    planned = call(warmup_steps=warmup_steps, dry_run=True)
    assert any(text in note for note in planned.notes) is is_said
    if warmup_steps in (3, 4):
        found = rates(call(warmup_steps=warmup_steps, lr_scheduler="constant"))
        assert (max(found) < 1e-2) is is_said
        assert (text in capsys.readouterr().out) is is_said


@pytest.mark.covers("lr_scheduler_kwargs")
def test_string_values_of_schedule_arguments_are_converted(call):
    found = rates(call(lr_scheduler="polynomial", lr_scheduler_kwargs={"power": "2", "lr_end": "1e-3"}))
    assert found == pytest.approx([(1e-2 - 1e-3) * (1 - i / 4) ** 2 + 1e-3 for i in range(4)])
    with pytest.raises(ValueError, match="lr_scheduler_kwargs of 'polynomial'.*'powr'. Did you mean 'power'"):
        call(lr_scheduler="polynomial", lr_scheduler_kwargs={"powr": "2"})


@pytest.mark.covers("beta1", "beta2", "eps", "weight_decay", "max_grad_norm", "dtype", "seed")
@pytest.mark.parametrize(
    "change",
    [
        {"beta1": 0.5},
        {"beta2": 0.5},
        {"eps": 1.0},
        {"weight_decay": 5.0},
        {"max_grad_norm": 1e-9},
        {"dtype": "bfloat16"},
        {"seed": 7},
    ],
    ids=lambda change: next(iter(change)),
)
def test_setting_changes_the_losses(call, change):
    reference = losses(call())
    found = losses(call(**change))
    assert max(abs(a - b) for a, b in zip(found, reference, strict=True)) > 1e-4


@pytest.mark.covers("max_grad_norm")
def test_clipping_off_is_not_clipping_to_zero(call):
    assert losses(call(max_grad_norm=0)) == losses(call(max_grad_norm=1e9))


@pytest.mark.covers("seed")
def test_same_seed_gives_the_same_losses_bit_for_bit(call):
    assert losses(call()) == losses(call())


@pytest.mark.covers("deterministic")
@pytest.mark.parametrize(
    ("device", "deterministic", "is_on"), [("cuda", False, False), ("cuda", True, True), ("cpu", False, True)]
)
def test_deterministic_algorithms_are_a_setting_on_cuda(call, monkeypatch, device, deterministic, is_on):
    class Reached(Exception):
        pass

    asked: list[bool] = []

    def load(*arguments, **named):
        raise Reached

    monkeypatch.setattr(worker, "_device", lambda: torch.device(device))
    monkeypatch.setattr(worker, "load_split", load)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, warn_only=False: asked.append(on))
    with pytest.raises(Reached):
        call(deterministic=deterministic)
    assert asked[: len(asked) - 1] == [True] * is_on  # the last one puts back what was before


@pytest.mark.covers("num_epochs", "max_steps")
def test_epochs_and_max_steps_bound_the_run(call):
    steps = [line["epoch"] for line in call(num_epochs=2, max_steps=None, effective_batch_size=60).history]
    assert steps == [0.5, 1.0, 1.5, 2.0]
    assert len(call(num_epochs=2, max_steps=3, effective_batch_size=60).history) == 3
