"""What the parameters of self-distillation and of the step that fits do."""

import pytest
import torch

from osft.data.dataset_folder import load_split
from osft.data.packing import Feeding
from osft.data.samples import SubsetOfSamples
from osft.data.selection import select
from osft.models.likelihood import mean_nll
from osft.models.loading import load_model
from osft.training.own_text import read_own_text
from tests.conftest import arithmetic, write_jsonl
from tests.parameters.conftest import losses
from tests.training.test_distillation import mean_divergence

SHORT = {"calibration_tokens": 400}


def own_text(tmp_path):
    (file,) = (tmp_path / "data" / "factors" / "texts").iterdir()
    return read_own_text(file)


def tuned(result):
    return load_model(result.checkpoint, dtype=torch.float32)


@pytest.mark.covers("distill_weight")
def test_distill_weight_keeps_the_model_closer_to_its_start(call, tmp_path):
    steps = {"max_steps": 12, "effective_batch_size": 24, "num_epochs": 4, "save_final_checkpoint": True}
    free, held = (call(distill_weight=weight, distill_tokens=200, **steps, **SHORT) for weight in (0.0, 30.0))
    assert [line["distillation_loss"] for line in free.history] == [None] * 12
    assert held.history[0]["distillation_loss"] == 0.0
    assert held.history[-1]["distillation_loss"] > 0
    text = own_text(tmp_path)
    assert mean_divergence(tuned(held), text) < 0.5 * mean_divergence(tuned(free), text)


@pytest.mark.covers("distill_tokens")
def test_distill_tokens_is_what_a_step_distils(call, monkeypatch):
    from osft.training import loop

    original, seen = loop.train_step, []

    def spy(*arguments, distilled, **options):
        seen.append(sum(taught.batch.input_ids.numel() for taught in distilled.batches))
        return original(*arguments, distilled=distilled, **options)

    monkeypatch.setattr(loop, "train_step", spy)
    call(distill_weight=1.0, distill_tokens=32, **SHORT)
    assert len(seen) == 4
    assert all(16 <= tokens <= 32 for tokens in seen)
    with pytest.raises(ValueError, match="distill_tokens=500 is more than max_tokens_per_gpu=300"):
        call(distill_weight=1.0, distill_tokens=500)


@pytest.mark.covers("fit_step", "step_scales", "selection_samples")
def test_fit_step_writes_the_model_that_gains_most_of_those_it_tried(call, chats, tmp_path, capsys):
    settings = {"learning_rate": 0.1, "save_final_checkpoint": True, "max_step_drift": 1e3, "save_dtype": "float32"}
    whole = call(**settings)
    fitted = call(fit_step=True, step_scales=[0.05, 0.2, 1.0], selection_samples=20, **settings, **SHORT)
    found = fitted.summary.fitted_step
    assert [tried.scale for tried in found.tried] == [0.05, 0.2, 1.0]
    assert whole.summary.fitted_step is None
    assert fitted.history[-1]["step_scale"] == found.scale
    assert f"{found.scale:g} of the update is kept" in capsys.readouterr().out

    (folder,) = (tmp_path / "data" / "data").iterdir()
    train = load_split(folder, "train")
    selection = SubsetOfSamples(train, select(train, 20))
    assert found.num_samples == len(selection.lengths) == 16
    loss = mean_nll(tuned(fitted), selection, Feeding(max_tokens=300, device=torch.device("cpu")))
    by_scale = {tried.scale: tried.loss for tried in found.tried}
    assert loss == pytest.approx(by_scale[found.scale], rel=1e-4)
    assert loss == pytest.approx(min(by_scale.values()), rel=1e-4)
    drift = next(tried.drift for tried in found.tried if tried.scale == found.scale)
    assert mean_divergence(tuned(fitted), own_text(tmp_path)) == pytest.approx(drift, rel=1e-2)


@pytest.mark.covers("fit_step", "selection_samples")
def test_selection_is_not_trained_on(call, tmp_path, monkeypatch):
    from osft.training import loop

    original, trained = loop.plan_steps, []
    monkeypatch.setattr(loop, "plan_steps", lambda number, *a, **o: trained.append(number) or original(number, *a, **o))
    records = write_jsonl(tmp_path / "many.jsonl", arithmetic(400, seed=8))
    call(data_path=str(records), fit_step=True, selection_samples=30, max_steps=1, **SHORT)
    assert 400 - 40 < trained[0] <= 400 - 30
    planned = call(data_path=str(records), fit_step=True, selection_samples=30, dry_run=True)
    assert any("fit_step holds out about 30 of the samples" in note for note in planned.notes)


@pytest.mark.covers("fit_step")
def test_too_few_samples_to_hold_any_out_are_refused_before_training(call, tmp_path):
    records = write_jsonl(tmp_path / "few.jsonl", arithmetic(30))
    with pytest.raises(ValueError, match="holds out at least 16 of the training samples, and there are 30"):
        call(data_path=str(records), fit_step=True)
    assert not (tmp_path / "run-1" / "metrics.jsonl").exists()


@pytest.mark.covers("max_step_drift")
def test_max_step_drift_bounds_the_drift_of_what_is_written(call):
    settings = {"learning_rate": 0.03, "fit_step": True} | SHORT
    curve = call(max_step_drift=1e3, **settings).summary.fitted_step.tried
    bound = (curve[1].drift + curve[2].drift) / 2
    found = call(max_step_drift=bound, **settings).summary.fitted_step
    assert found.scale == min(curve[:2], key=lambda tried: tried.loss).scale
    assert found.max_drift == bound


@pytest.mark.covers("step_scales")
@pytest.mark.parametrize("scales", [[], [0.0, 1.0], [0.5, 1.5]])
def test_scales_are_shares_of_the_update(call, scales):
    with pytest.raises(ValueError, match="step_scales must be factors in"):
        call(step_scales=scales)


def test_resumed_run_fits_the_same_step_once_at_its_end(call, tmp_path, monkeypatch):
    from osft.training import loop

    settings = {"fit_step": True, "distill_weight": 1.0, "save_state_steps": 1, "max_steps": 5} | SHORT
    expected = call(**settings)
    original, done = loop.train_step, []

    def dies_in_step_four(*arguments, **options):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return original(*arguments, **options)

    output = str(tmp_path / "interrupted")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dies_in_step_four)
        with pytest.raises(KeyboardInterrupt):
            call(ckpt_output_dir=output, **settings)
    resumed = call(ckpt_output_dir=output, **settings)
    assert losses(resumed) == losses(expected)
    assert [line["distillation_loss"] for line in resumed.history] == [
        line["distillation_loss"] for line in expected.history
    ]
    assert resumed.summary.fitted_step == expected.summary.fitted_step
    assert [line["step_scale"] for line in resumed.history][:4] == [None] * 4


def test_own_text_is_written_once_for_a_model(call, tmp_path, monkeypatch):
    from osft.training import own_text as module

    original, written = module.write_text, []
    monkeypatch.setattr(module, "write_text", lambda *a, **o: written.append(o["num_tokens"]) or original(*a, **o))
    for _ in range(2):
        call(distill_weight=1.0, max_steps=1, **SHORT)
    assert written == [400]
    call(distill_weight=1.0, max_steps=1, calibration_tokens=300)
    assert written == [400, 300]
    call(protect="activations", max_steps=1, calibration_tokens=300)
    assert written == [400, 300], "what its layers are measured on is the same"


def test_drift_is_predicted_for_every_step_and_layer(call):
    settings = {"protect": "activations", "fit_step": True, "max_step_drift": 1e3, "learning_rate": 1e-3} | SHORT
    result = call(**settings)
    steps = [line["predicted_drift"] for line in result.history]
    assert 0 < steps[0] < steps[2]
    by_layer = {name: layout.predicted_drift for name, layout in result.rank_layout.items()}
    assert sum(by_layer.values()) == pytest.approx(steps[-1])
    assert steps[-1] == pytest.approx(result.history[-1]["step_drift"], rel=0.5), "it is what is measured"
    other = call(**settings | {"protect": "weights"})
    assert other.history[-1]["predicted_drift"] is None
    assert all(layout.predicted_drift is None for layout in other.rank_layout.values())
