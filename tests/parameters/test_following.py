"""What callbacks and loggers are told of a run."""

import errno
import importlib.util
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

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
    assert call(**settings).num_steps == 300, "the same call resumes"


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


def records(file: Path) -> Iterator[bytes]:
    """The records of a file of W&B: the log format of LevelDB behind a header of 7 bytes."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block is padding
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def logged_offline(folder: Path) -> tuple[dict, dict[int, float], dict]:
    """Names, losses by step and settings of the one run that W&B wrote below a folder, by a process of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.rglob("run-*.wandb")
    for _ in range(600):
        if any(Record.FromString(record).WhichOneof("record_type") == "exit" for record in records(file)):
            break
        time.sleep(0.1)
    names, found, settings = {}, {}, {}
    for record in map(Record.FromString, records(file)):
        if record.WhichOneof("record_type") == "run":
            names |= {"project": record.run.project, "entity": record.run.entity, "name": record.run.display_name}
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if "train/loss" in items:
                found[int(record.history.step.num)] = json.loads(items["train/loss"])
    return names, found, settings


@pytest.mark.covers("wandb_project", "wandb_entity", "wandb_run_name")
@pytest.mark.parametrize("by", ["parameters", "environment"])
def test_run_is_logged_to_weights_and_biases(call, monkeypatch, by):
    given = {"wandb_project": "continual", "wandb_entity": "team", "wandb_run_name": "first"}
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name, value in given.items() if by == "environment" else ():
        monkeypatch.setenv(name.upper(), value)
    result = call(**(given if by == "parameters" else {}))
    names, found, settings = logged_offline(result.output_dir)
    assert names == {"project": "continual", "entity": "team", "name": "first"}
    assert list(found.values()) == losses(result)
    assert list(found) == [1, 2, 3, 4]
    assert settings["unfreeze_rank_ratio"] == 0.25


@pytest.mark.covers("wandb_project")
def test_training_continues_where_weights_and_biases_cannot_be_used(call, monkeypatch, capsys):
    found = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest))
        assert call(wandb_project="p").num_steps == 4
    assert "wandb: not installed" in (told := capsys.readouterr().out)
    assert "pip install 'osft[wandb]'" in told
    monkeypatch.setattr("wandb.init", lambda **_: (_ for _ in ()).throw(RuntimeError("no API key configured")))
    assert call(wandb_project="p").num_steps == 4
    assert "wandb: no API key configured. Nothing is logged to it, training continues" in capsys.readouterr().out


@pytest.mark.covers("wandb_entity", "wandb_run_name")
def test_run_without_a_project_is_said_not_to_be_logged(call, capsys):
    call(wandb_run_name="first")
    assert "wandb: nothing is logged without a project. Give wandb_project" in capsys.readouterr().out


def test_logger_that_fails_in_the_middle_is_told_once_and_ends_nothing(call, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full_disk)
    result = call(tensorboard_log_dir=str(tmp_path / "tensorboard"))
    assert result.num_steps == 4
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tensorboard:")]
    assert "no space is left on the disk" in line


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
