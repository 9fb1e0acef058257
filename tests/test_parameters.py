"""Every parameter of `osft()` has an effect, and the documented one."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import osft as package
from osft import StopTraining, TrainingCallback, osft
from osft.atomic import exclusive
from osft.checkpoint import CheckpointReader
from osft.data.records import DataError, parse_record
from osft.data.split import is_held_out
from osft.training import loop, worker
from tests.conftest import arithmetic, byte_tokenizer, tiny_llama, write_jsonl
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


# Data


@pytest.mark.covers("data_path")
def test_a_file_a_glob_and_a_folder_are_the_same_data(call, tmp_path):
    records = arithmetic(60)
    whole = write_jsonl(tmp_path / "whole.jsonl", records)
    parts = tmp_path / "parts"
    parts.mkdir()
    write_jsonl(parts / "a.jsonl", records[:20])
    write_jsonl(parts / "b.jsonl", records[20:])
    expected = losses(call(data_path=str(whole)))
    assert losses(call(data_path=str(parts))) == expected
    assert losses(call(data_path=f"{parts}/*.jsonl")) == expected


@pytest.mark.covers("model_path", "data_path")
def test_missing_model_or_data_says_what_to_give(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="(?s)neither a local folder nor a model.*give the path of its folder"):
        call(model_path="nobody/nothing")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        call(data_path=str(tmp_path / "missing.jsonl"))


@pytest.mark.covers("effective_batch_size")
def test_effective_batch_size_counts_samples(call):
    assert [line["samples"] for line in call(effective_batch_size=7).history] == [7, 14, 21, 28]


@pytest.mark.covers("max_tokens_per_gpu")
def test_no_micro_batch_exceeds_max_tokens_per_gpu(call, monkeypatch):
    sizes: list[int] = []
    original = loop.train_step

    def spy(model, optimizer, micro_batches, **options):
        sizes.extend(batch.input_ids.numel() for batch in micro_batches)
        return original(model, optimizer, micro_batches, **options)

    monkeypatch.setattr(loop, "train_step", spy)
    loose = losses(call(max_tokens_per_gpu=2000))
    assert max(sizes) > 100
    sizes.clear()
    assert losses(call(max_tokens_per_gpu=100)) == pytest.approx(loose, rel=1e-4)
    assert max(sizes) <= 100


@pytest.mark.covers("max_tokens_per_gpu")
def test_sample_longer_than_max_tokens_per_gpu_is_named_before_training(call, chats, tmp_path):
    with pytest.raises(ValueError, match=rf"{chats}:\d+: the sample has \d+ tokens, more than max_tokens_per_gpu=40"):
        call(max_tokens_per_gpu=40)
    assert not (tmp_path / "run-1").exists()


@pytest.mark.covers("max_seq_len")
def test_longer_samples_are_dropped_and_reported(call, tmp_path, capsys):
    long = [{"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}]
    data = write_jsonl(tmp_path / "data.jsonl", arithmetic(24) + long)
    call(data_path=str(data), max_steps=1)
    said = capsys.readouterr().out
    assert "1 sample" in said
    assert "longer than 128 tokens" in said
    assert "%" in said


@pytest.mark.covers("data_output_dir", "ckpt_output_dir")
def test_outputs_go_where_they_are_told(call, tmp_path):
    call(ckpt_output_dir=str(tmp_path / "out"), data_output_dir=str(tmp_path / "elsewhere"), save_final_checkpoint=True)
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"data", "factors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("hf_format", "config.json", "metrics.jsonl", "training.json", ".lock")
    }
    call(ckpt_output_dir=str(tmp_path / "other"), data_output_dir=None)
    assert (tmp_path / "other" / "_internal_data_processing" / "factors").is_dir()


@pytest.mark.covers("use_processed_dataset")
def test_processed_data_gives_the_losses_of_the_raw_data(call, chats, tmp_path):
    from osft.data.dataset_folder import load_split

    raw = call()
    (folder,) = (tmp_path / "data" / "data").iterdir()
    train = load_split(folder, "train")
    samples = [train[i] for i in range(len(train.lengths))]
    processed = write_jsonl(
        tmp_path / "tokens.jsonl", [{"input_ids": s.input_ids, "labels": s.labels} for s in samples]
    )
    result = call(data_path=str(processed), use_processed_dataset=True)
    assert result.num_loss_tokens == raw.num_loss_tokens
    assert losses(result) == losses(raw)
    with pytest.raises(DataError, match=r"larger-number.jsonl:1.*input_ids"):
        call(use_processed_dataset=True)


@pytest.mark.covers("unmask_messages")
def test_unmasked_messages_count_in_the_loss(call):
    masked, unmasked = call(), call(unmask_messages=True)
    assert unmasked.num_tokens == masked.num_tokens
    assert unmasked.num_loss_tokens > 1.5 * masked.num_loss_tokens


@pytest.mark.covers("is_pretraining", "block_size", "document_column_name")
def test_pretraining_trains_on_blocks_of_a_columns_text(call, tmp_path):
    documents = write_jsonl(tmp_path / "books.jsonl", [{"body": "once upon a time " * 20} for _ in range(10)])
    result = call(
        data_path=str(documents), is_pretraining=True, block_size=64, document_column_name="body", max_steps=2
    )
    assert [line["tokens"] for line in result.history] == [12 * 64, 24 * 64]
    assert result.num_loss_tokens == 24 * 63
    with pytest.raises(DataError, match=r"books.jsonl:1.*document.*body"):
        call(data_path=str(documents), is_pretraining=True, block_size=64)
    with pytest.raises(ValueError, match="block_size is required"):
        call(data_path=str(documents), is_pretraining=True)
    with pytest.raises(ValueError, match="is_pretraining=True and unmask_messages=True exclude"):
        call(data_path=str(documents), is_pretraining=True, block_size=64, unmask_messages=True)


# Subspace


@pytest.mark.covers("unfreeze_rank_ratio")
def test_ratio_sets_the_number_of_unfrozen_directions(call):
    layouts = {ratio: call(unfreeze_rank_ratio=ratio, max_steps=1).rank_layout for ratio in (0.25, 1.0)}
    for ratio, layout in layouts.items():
        assert {weight["unfrozen"] for weight in layout.values()} == {
            round(ratio * size)
            for size in (16, 32)  # of the key and value projections, and of all others
        }
    with pytest.raises(ValueError, match="nothing to train"):
        call(unfreeze_rank_ratio=0)
    with pytest.raises(ValueError, match="unfreeze_rank_ratio must be between 0.0 and 1.0, got 1.2"):
        call(unfreeze_rank_ratio=1.2)


@pytest.mark.covers("target_patterns")
def test_only_weights_that_match_a_pattern_change(call, model_folder):
    result = call(target_patterns=["q_proj", r"layers\.1\.mlp\.up"], save_final_checkpoint=True)
    expected = {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    assert set(result.rank_layout) == expected
    base, tuned = CheckpointReader(model_folder), CheckpointReader(result.checkpoint)
    names = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    changed = {name for name in names if name in base and not torch.equal(base.tensor(name), tuned.tensor(name))}
    assert changed == {f"{name}.weight" for name in expected}


@pytest.mark.covers("free_subspace")
def test_core_trains_fewer_coefficients(call):
    complement, core = call(max_steps=1), call(max_steps=1, free_subspace="core")
    assert core.summary["trainable_parameters"] < 0.5 * complement.summary["trainable_parameters"]


@pytest.mark.covers("rank_allocation", "min_retention_ratio", "calibration_samples")
def test_adaptive_ranks_differ_between_blocks(call, tmp_path):
    half = {"unfreeze_rank_ratio": 0.5, "rank_allocation": "adaptive", "max_steps": 1}
    adaptive = call(**half)
    ranks = {name: weight["unfrozen"] for name, weight in adaptive.rank_layout.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] != ranks["model.layers.1.self_attn.q_proj"]
    flat = call(**half, min_retention_ratio=0.5).rank_layout
    assert {flat[f"model.layers.{i}.self_attn.q_proj"]["unfrozen"] for i in (0, 1)} == {16}, "none is below the mean"
    call(**half, calibration_samples=1)
    manifests = [json.loads(file.read_text()) for file in (tmp_path / "data" / "factors" / "sets").iterdir()]
    assert len({json.dumps(manifest["importance"]) for manifest in manifests}) == 2, "one sample, another importance"


@pytest.mark.covers("factors")
def test_precomputed_factors_are_used(call, model_folder, tmp_path):
    from osft.subspace.factor_store import precompute

    made = precompute(model_folder, tmp_path / "store", package.SubspaceConfig(unfreeze_rank_ratio=0.25))
    call(factors=str(made.path), max_steps=1)
    assert not (tmp_path / "data" / "factors").exists()
    call(factors=str(tmp_path / "store"), unfreeze_rank_ratio=0.5, max_steps=1)
    assert len(list((tmp_path / "store" / "sets").iterdir())) == 2, "what a store lacks is computed into it"
    with pytest.raises(FileNotFoundError, match="there is no factor set"):
        call(factors=str(tmp_path / "store" / "sets" / "missing.json"))
    with pytest.raises(ValueError, match="was made with unfreeze_rank_ratio=0.25, this run wants 0.5"):
        call(factors=str(made.path), unfreeze_rank_ratio=0.5)


# Optimization


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


@pytest.mark.covers("num_epochs", "max_steps")
def test_epochs_and_max_steps_bound_the_run(call):
    steps = [line["epoch"] for line in call(num_epochs=2, max_steps=None, effective_batch_size=60).history]
    assert steps == [0.5, 1.0, 1.5, 2.0]
    assert len(call(num_epochs=2, max_steps=3, effective_batch_size=60).history) == 3


# Validation and checkpoints


@pytest.mark.covers("validation_split", "validation_frequency")
def test_validation_split_is_held_out_and_measured(call, tmp_path):
    result = call(validation_split=0.2, validation_frequency=2, max_steps=5)
    assert [line["validation_loss"] is not None for line in result.history] == [False, True, False, True, True]
    assert result.summary["validation_loss"] == result.history[-1]["validation_loss"]
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
    from osft.evaluation.scoring import score_set

    model = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    score = score_set(model, byte_tokenizer(), list(read_records(str(validation))))
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
    assert result.best_checkpoint.name == f"samples_{best['samples']}_best_val_loss"
    AutoModelForCausalLM.from_pretrained(result.best_checkpoint)
    both = call(validation_split=0.2, save_best_val_loss=True, save_final_checkpoint=True, max_steps=1)
    assert [path.name for path in both.checkpoints] == ["samples_12_best_val_loss", "samples_12"]
    assert both.best_checkpoint == both.checkpoints[0]
    with pytest.raises(ValueError, match="save_best_val_loss needs validation data"):
        call(save_best_val_loss=True)


@pytest.mark.covers("checkpoint_at_epoch", "save_final_checkpoint", "num_epochs")
def test_checkpoints_are_written_when_asked(call):
    epochs = {"effective_batch_size": 60, "num_epochs": 2, "max_steps": None}
    assert call(**epochs).checkpoint is None
    every = call(**epochs, checkpoint_at_epoch=True)
    assert [path.name for path in every.checkpoints] == ["samples_120", "samples_240"]
    final = call(**epochs, save_final_checkpoint=None)
    assert [path.name for path in final.checkpoints] == ["samples_240"], "the default"
    states = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in every.checkpoints]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(states[0][name], states[1][name])
    assert torch.equal(states[1][name], AutoModelForCausalLM.from_pretrained(final.checkpoint).state_dict()[name])


class Interrupt(TrainingCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, context) -> None:
        if context.step == self.step:
            raise KeyError("a bug in a callback")


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
            raise MemoryError("the pod is gone")
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dies_in_step_six)
        with pytest.raises(MemoryError):
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
    foreign = tmp_path / "out" / "hf_format" / "samples_16.0"
    foreign.mkdir(parents=True)
    with pytest.raises(ValueError, match="holds models that something else wrote"):
        call(**folder)
    assert foreign.is_dir()
    call(**folder, resume="off", save_final_checkpoint=True)
    (tmp_path / "out" / "training.json").unlink()  # as if it had died before its end, with no state
    with pytest.raises(ValueError, match="holds an unfinished run with other settings.*seed"):
        call(**folder, seed=7, save_final_checkpoint=True)
    assert (tmp_path / "out" / "hf_format" / "samples_48").is_dir()


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
    monkeypatch.setattr(worker.Outputs, "state", lambda self, optimizer, position: saved.append(position.step))
    call(save_state_minutes=1e-9)
    assert saved == [1, 2, 3], "after the last step there is nothing to go on with"
    saved.clear()
    call(save_state_minutes=0)
    assert saved == []


# Model


@pytest.mark.covers("gradient_checkpointing", "attn_implementation", "dtype", "use_liger")
def test_model_is_loaded_as_told(call, monkeypatch):
    models = []
    original = worker.load_sharded

    def spy(*args, **options):
        models.append(original(*args, **options))
        return models[-1]

    monkeypatch.setattr(worker, "load_sharded", spy)
    reference = call(max_steps=2)
    other = call(max_steps=2, gradient_checkpointing=True, attn_implementation="eager")
    plain, changed = models[0][0], models[1][0]
    assert (plain.is_gradient_checkpointing, changed.is_gradient_checkpointing) == (False, True)
    assert (plain.config._attn_implementation, changed.config._attn_implementation) == ("sdpa", "eager")
    assert losses(other) == pytest.approx(losses(reference), rel=1e-4)
    assert plain.dtype == torch.float32
    assert reference.summary["liger"] is torch.cuda.is_available()


@pytest.mark.covers("use_liger")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("installed", "lacking"), [(True, "a CUDA GPU"), (False, "the package liger-kernel")])
def test_liger_that_cannot_run_is_refused_before_training(call, tmp_path, monkeypatch, installed, lacking):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: installed or None if name == "liger_kernel" else find(name)
    )
    with pytest.raises(ValueError, match=f"use_liger=True needs {lacking}"):
        call(use_liger=True)
    assert not (tmp_path / "run-1").exists()
    assert call(use_liger=False, max_steps=1).summary["liger"] is False
    assert call(use_liger=None, max_steps=1).summary["liger"] is False, "on only where both are there"


@pytest.mark.covers("trust_remote_code")
def test_code_of_the_model_runs_only_with_trust(call, tmp_path):
    folder = tmp_path / "custom"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "modeling_custom.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class CustomConfig(LlamaConfig):\n    model_type = 'custom_llama'\n"
        "class CustomForCausalLM(LlamaForCausalLM):\n    config_class = CustomConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "custom_llama",
        "auto_map": {
            "AutoConfig": "modeling_custom.CustomConfig",
            "AutoModelForCausalLM": "modeling_custom.CustomForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        call(model_path=str(folder), max_steps=1)
    assert len(call(model_path=str(folder), max_steps=1, trust_remote_code=True).history) == 1


# Following a run


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
    assert result.checkpoint.name == f"samples_{result.num_samples}"


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


# The call itself


@pytest.mark.covers("nproc_per_node")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_processes_per_node_by_word(call):
    assert call(nproc_per_node="auto", max_steps=1).summary["world_size"] == 1
    with pytest.raises(ValueError, match="nproc_per_node is 'gpu', but there is no GPU"):
        call(nproc_per_node="gpu")


def test_every_parameter_of_the_engine_is_covered():
    """Also those beyond the documented table: a new setting needs a test that names it."""
    import ast

    from osft.parameters import parameters

    covered = set()
    for file in (
        Path(__file__),
        *Path(__file__).parent.glob("training/test_*.py"),
        Path(__file__).with_name("test_api.py"),
    ):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "covers":
                covered |= {argument.value for argument in node.args}
    assert set(parameters(package.TrainConfig)) - covered == set()
