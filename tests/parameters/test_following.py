"""What callbacks and loggers are told of a run."""

import pytest

from osft import StopTraining, TrainingCallback
from tests.parameters.conftest import losses


class Interrupt(TrainingCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, context) -> None:
        if context.step == self.step:
            raise KeyError("a bug in a callback")


class Recorder(TrainingCallback):
    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def on_train_begin(self, context) -> None:
        self.calls.append(("begin",))

    def on_step_end(self, context) -> None:
        self.calls.append(("step", context.step, context.loss))

    def on_evaluate(self, context) -> None:
        self.calls.append(("evaluate", context.validation_loss))

    def on_save(self, context) -> None:
        self.calls.append(("save", context.checkpoints))

    def on_epoch_end(self, context) -> None:
        self.calls.append(("epoch", context.epoch))

    def on_train_end(self, context) -> None:
        self.calls.append(("end", context.step))


@pytest.mark.covers("callbacks")
def test_callbacks_are_told_of_every_step_in_order(call):
    recorder = Recorder()
    result = call(
        callbacks=recorder, validation_split=0.2, effective_batch_size=100, max_steps=1, save_final_checkpoint=True
    )
    (step,) = result.history
    assert recorder.calls == [
        ("begin",),
        ("step", 1, step["loss"]),
        ("evaluate", step["validation_loss"]),
        ("save", (result.checkpoint,)),
        ("epoch", 1.0),
        ("end", 1),
    ]


@pytest.mark.covers("callbacks")
@pytest.mark.parametrize("wrong", [Recorder, print, ["on_step_end"]], ids=["class", "function", "name"])
def test_what_would_never_be_called_is_refused(call, tmp_path, wrong):
    with pytest.raises(ValueError, match="callbacks must be TrainingCallback objects, got"):
        call(callbacks=wrong)
    assert not (tmp_path / "run-1").exists()


@pytest.mark.covers("callbacks")
def test_callback_ends_training_early_with_a_model(call, monkeypatch):
    class Stop(TrainingCallback):
        def on_step_end(self, context) -> None:
            raise StopTraining

    result = call(callbacks=[Stop()], max_steps=500, num_epochs=50, save_final_checkpoint=True)
    assert result.num_steps < 500
    assert result.checkpoint.name == f"samples_{result.num_samples}.0"


@pytest.mark.covers("callbacks")
def test_exception_of_a_callback_ends_training_and_is_raised(call, tmp_path):
    settings = {"ckpt_output_dir": str(tmp_path / "run"), "max_steps": 300, "num_epochs": 50}
    with pytest.raises(KeyError, match="a bug in a callback"):
        call(callbacks=[Interrupt(1)], **settings)
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert done < 300
    assert (tmp_path / "run" / "state" / f"step-{done}").is_dir()
    assert call(**settings).num_steps == 300, "the same call goes on"


@pytest.mark.covers("callbacks")
@pytest.mark.parametrize("hook", ["on_train_begin", "on_step_end"])
def test_callback_that_fails_takes_no_log_from_the_others(call, hook):
    def fail(self, context) -> None:
        raise KeyError("a bug in a callback")

    broken, recorder = type("Broken", (TrainingCallback,), {hook: fail})(), Recorder()
    with pytest.raises(KeyError, match="a bug in a callback"):
        call(callbacks=[broken, recorder])
    assert [name for name, *_ in recorder.calls] == ["begin", *["step"] * (len(recorder.calls) - 2), "end"]
    assert len(recorder.calls) > 2


@pytest.mark.covers("mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name")
def test_run_is_logged_to_mlflow(call, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    result = call(mlflow_tracking_uri=uri, mlflow_experiment_name="mine", mlflow_run_name="first")
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.data.params["unfreeze_rank_ratio"] == "0.25"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.value for metric in history] == losses(result)


@pytest.mark.covers("tensorboard_log_dir")
def test_run_is_logged_to_tensorboard(call, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = call(tensorboard_log_dir=str(tmp_path / "tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(result))
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
