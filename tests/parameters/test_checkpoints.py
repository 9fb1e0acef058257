"""What the parameters of validation, checkpoints and resuming do."""

import glob
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from osft.data.records import parse_record
from osft.data.split import is_held_out
from osft.models.checkpoint import CheckpointReader
from osft.storage.lock import exclusive
from osft.training import loop, worker
from tests.conftest import arithmetic, byte_tokenizer, write_jsonl
from tests.parameters.conftest import losses, rates


@pytest.mark.covers("validation_split", "validation_frequency")
def test_validation_split_is_held_out_and_measured(call, tmp_path):
    result = call(validation_split=0.2, validation_frequency=2, max_steps=5)
    assert [line["validation_loss"] is not None for line in result.history] == [False, True, False, True, True]
    assert result.summary.validation_loss == result.history[-1]["validation_loss"]
    (folder,) = (tmp_path / "data" / "data").iterdir()
    counts = json.loads((folder / "dataset.json").read_text())
    assert counts["num_validation_samples"] > 5
    assert counts["num_train_samples"] + counts["num_validation_samples"] == 120


@pytest.mark.covers("validation_data_path", "validation_frequency")
def test_validation_loss_is_that_of_the_model_on_the_validation_data(call, chats, tmp_path):
    validation = write_jsonl(tmp_path / "validation.jsonl", arithmetic(10, seed=3))
    result = call(
        validation_data_path=str(validation), save_final_checkpoint=True, effective_batch_size=60, num_epochs=2
    )
    measured = [line["validation_loss"] for line in result.history]
    assert [value is not None for value in measured] == [False, True, False, True], "without a frequency, each epoch"
    from osft.data.records import read_records
    from osft.evaluation.scoring import score_records

    model = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    score = score_records(model, byte_tokenizer(), list(read_records(str(validation)))).summary()
    assert score.loss == pytest.approx(measured[-1], rel=1e-4)


@pytest.mark.covers("validation_data_path", "max_tokens_per_gpu", "max_seq_len")
def test_validation_data_that_cannot_be_used_is_refused_before_training(call, tmp_path):
    turns = [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y" * 20}]
    long = write_jsonl(tmp_path / "long.jsonl", [{"messages": turns}])
    with pytest.raises(ValueError, match=r"long.jsonl:1: the sample has \d+ tokens, more than max_tokens_per_gpu=120"):
        call(validation_data_path=str(long), max_tokens_per_gpu=120, max_seq_len=300)
    with pytest.raises(ValueError, match="every validation sample is longer than max_seq_len=128"):
        call(validation_data_path=str(long))
    assert not list(tmp_path.glob("run-*"))


@pytest.mark.covers("validation_split", "max_seq_len")
def test_held_out_part_of_which_nothing_is_left_is_refused(call, tmp_path):
    records = [{"messages": record["messages"]} for record in arithmetic(40)]
    held_out = 0
    for number, record in enumerate(records):
        prompt = parse_record(json.dumps(record), f"line {number}").prompt_hash
        if is_held_out(prompt, 0.2):
            record["messages"][1]["content"] = "y" * 200
            held_out += 1
    assert 0 < held_out < 40
    with pytest.raises(ValueError, match="every held-out sample is longer than max_seq_len=128 tokens"):
        call(data_path=str(write_jsonl(tmp_path / "data.jsonl", records)), validation_split=0.2)


@pytest.mark.covers("save_best_val_loss")
def test_best_model_is_kept_under_its_own_name(call):
    result = call(validation_split=0.2, validation_frequency=1, save_best_val_loss=True)
    best = min(result.history, key=lambda line: line["validation_loss"])
    assert result.best_checkpoint.name == f"samples_{best['samples']}.0_best_val_loss"
    AutoModelForCausalLM.from_pretrained(result.best_checkpoint)
    both = call(validation_split=0.2, save_best_val_loss=True, save_final_checkpoint=True, max_steps=1)
    assert [path.name for path in both.checkpoints] == ["samples_12.0_best_val_loss", "samples_12.0"]
    assert both.best_checkpoint == both.checkpoints[0]
    with pytest.raises(ValueError, match="save_best_val_loss needs validation data"):
        call(save_best_val_loss=True)


@pytest.mark.covers("checkpoint_at_epoch", "save_final_checkpoint", "num_epochs")
def test_checkpoints_are_written_when_asked(call):
    epochs = {"effective_batch_size": 60, "num_epochs": 2, "max_steps": None}
    assert call(**epochs).checkpoint is None
    every = call(**epochs, checkpoint_at_epoch=True)
    assert [path.name for path in every.checkpoints] == ["samples_120.0", "samples_240.0"]
    final = call(**epochs, save_final_checkpoint=None)
    assert [path.name for path in final.checkpoints] == ["samples_240.0"], "the default"
    states = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in every.checkpoints]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(states[0][name], states[1][name])
    assert torch.equal(states[1][name], AutoModelForCausalLM.from_pretrained(final.checkpoint).state_dict()[name])


@pytest.mark.covers("resume", "save_state_steps")
def test_resumed_run_repeats_the_losses_of_an_uninterrupted_one(call, tmp_path, monkeypatch):
    settings = {"max_steps": 9, "lr_scheduler": "cosine", "warmup_steps": 2, "save_final_checkpoint": True}
    whole = call(**settings)
    broken = {"ckpt_output_dir": str(tmp_path / "broken"), "save_state_steps": 2, **settings}
    original = loop.train_step
    done = 0

    def dies_in_step_six(*args, **options):
        nonlocal done
        done += 1
        if done == 6:
            raise OSError("the pod is gone")
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dies_in_step_six)
        with pytest.raises(OSError, match="the pod is gone"):
            call(**broken)
    assert [folder.name for folder in (tmp_path / "broken" / "state").iterdir()] == ["step-4"]
    resumed = call(**broken)
    assert losses(resumed) == losses(whole)
    assert rates(resumed) == rates(whole)
    assert resumed.num_tokens == whole.num_tokens
    weights = [CheckpointReader(result.checkpoint) for result in (resumed, whole)]
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(weights[0].tensor(name), weights[1].tensor(name))


@pytest.mark.covers("resume")
def test_finished_run_is_returned_and_another_one_refused(call, tmp_path):
    folder = {"ckpt_output_dir": str(tmp_path / "out")}
    first = losses(call(**folder))
    again = call(**folder)
    assert again.reused
    assert losses(again) == first
    with pytest.raises(ValueError, match=r"finished run with other settings \(seed: 42 there, 7 now\).*resume='off'"):
        call(**folder, seed=7)
    replaced = call(**folder, seed=7, resume="off")
    assert not replaced.reused
    assert losses(replaced) != first
    with pytest.raises(FileNotFoundError, match="not a complete training state"):
        call(resume=str(tmp_path / "nowhere"))


@pytest.mark.covers("resume")
def test_models_of_another_run_or_program_are_not_lost(call, tmp_path):
    folder = {"ckpt_output_dir": str(tmp_path / "out")}
    foreign = tmp_path / "out" / "hf_format" / "samples_16"
    foreign.mkdir(parents=True)
    with pytest.raises(ValueError, match="holds models that something else wrote"):
        call(**folder)
    assert foreign.is_dir()
    call(**folder, resume="off", save_final_checkpoint=True)
    (tmp_path / "out" / "training.json").unlink()  # as if it had died before its end, with no state
    with pytest.raises(ValueError, match="holds an unfinished run with other settings.*seed"):
        call(**folder, seed=7, save_final_checkpoint=True)
    assert (tmp_path / "out" / "hf_format" / "samples_48.0").is_dir()


@pytest.mark.covers("ckpt_output_dir")
def test_two_runs_do_not_write_to_one_folder(call, tmp_path):
    with (
        exclusive(tmp_path / "out"),
        pytest.raises(RuntimeError, match=f"another process is writing to {tmp_path}/out"),
    ):
        call(ckpt_output_dir=str(tmp_path / "out"))
    assert call(ckpt_output_dir=str(tmp_path / "out")).num_steps == 4


@pytest.mark.covers("resume")
def test_finished_run_is_not_returned_for_other_data_under_the_same_name(call, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", arithmetic(30))
    folder = {"ckpt_output_dir": str(tmp_path / "out"), "data_path": str(data)}
    call(**folder)
    write_jsonl(data, arithmetic(30, seed=5))
    with pytest.raises(ValueError, match="other settings.*dataset"):
        call(**folder)


@pytest.mark.covers("save_state_minutes")
def test_state_is_saved_by_the_clock(call, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(worker.Checkpointer, "state", lambda self, optimizer, position: saved.append(position.step))
    call(save_state_minutes=1e-9)
    assert saved == [1, 2, 3], "after the last step there is nothing to resume"
    saved.clear()
    call(save_state_minutes=0)
    assert saved == []


@pytest.mark.covers("ckpt_output_dir")
def test_checkpoints_of_a_run_made_before_their_names_changed_are_found(call, tmp_path):
    folder = {"ckpt_output_dir": str(tmp_path / "out")}
    made = call(**folder, save_final_checkpoint=True)
    made.checkpoint.rename(made.checkpoint.with_name("samples_48"))
    file = tmp_path / "out" / "training.json"
    summary = json.loads(file.read_text().replace("samples_48.0", "samples_48"))
    for name in ("sha256", "format", "checkpoint_files", "metrics_sha256"):
        del summary[name]
    del summary["config"]["made_of"]
    file.write_text(json.dumps(summary))
    again = call(**folder, save_final_checkpoint=True)
    assert again.reused
    assert [path.name for path in again.checkpoints] == ["samples_48"]
    AutoModelForCausalLM.from_pretrained(again.checkpoint)


@pytest.mark.covers("save_final_checkpoint")
def test_glob_of_the_notebooks_finds_the_models_that_are_not_the_best_ones(call):
    result = call(validation_split=0.2, save_best_val_loss=True, save_final_checkpoint=True, max_steps=1)
    found = glob.glob(f"{result.output_dir}/hf_format/samples_*.0")
    assert found == [str(result.checkpoint)]
