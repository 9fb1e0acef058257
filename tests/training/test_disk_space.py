"""A run that will not fit is refused with its numbers before the first step, and the numbers are those of the files."""

import errno
import shutil
from pathlib import Path

import pytest
import torch

from osft.settings.subspace import SubspaceConfig
from osft.settings.training import TrainConfig
from osft.subspace import factor_store
from osft.subspace.factor_set import load_factor_set
from osft.training import launch, loop, train
from osft.training.disk_space import output_sizes
from tests.conftest import byte_tokenizer, tiny_llama
from tests.training.in_process import run_in_process


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def settings(request, chats, tmp_path_factory) -> TrainConfig:
    root = tmp_path_factory.mktemp("disk")
    tiny_llama().to(getattr(torch, request.param)).save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    return TrainConfig(
        model_path=str(root / "model"),
        data_path=str(chats),
        data_output_dir=str(root / "prepared"),
        ckpt_output_dir=str(root / "out"),
        unfreeze_rank_ratio=0.25,
        max_seq_len=200,
        effective_batch_size=12,
        max_tokens_per_gpu=300,
        learning_rate=1e-2,
        max_steps=2,
        save_state_steps=1,
        nproc_per_node=1,
    )


def measured(folder, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


@pytest.mark.parametrize("save_dtype", ["auto", "bfloat16"])
def test_sizes_are_those_of_the_written_files(save_dtype, settings, tmp_path, monkeypatch):
    run_in_process(monkeypatch)
    monkeypatch.setattr(launch, "remove_states", lambda *_: None)  # which takes them away when the run has ended
    run = settings.replace(ckpt_output_dir=str(tmp_path / "out"), save_dtype=save_dtype)
    result = train(run)
    quarter = SubspaceConfig(unfreeze_rank_ratio=0.25)
    factors = factor_store.precompute(run.model_path, f"{run.data_output_dir}/factors", quarter)
    sizes = output_sizes(run, Path(run.model_path), factors)
    slack = 100_000  # what describes the tensors, and an archive of each in the state
    assert sizes.models == 1
    assert sizes.model <= measured(result.checkpoint, "*.safetensors") < sizes.model + slack
    assert sizes.exact <= measured(result.checkpoint, "exact/*.safetensors") < sizes.exact + slack
    assert sizes.state <= measured(result.output_dir, "state/*/*.distcp") < sizes.state + slack


def test_size_of_the_statistics_is_that_of_what_a_run_adds(settings, tmp_path, monkeypatch):
    run_in_process(monkeypatch)
    run = settings.replace(
        ckpt_output_dir=str(tmp_path / "out"),
        data_output_dir=str(tmp_path / "data"),
        protect="activations",
        calibration_tokens=256,
    )
    train(run)
    (manifest,) = tmp_path.glob("data/factors/sets/*.json")
    sizes = output_sizes(run, Path(run.model_path), load_factor_set(manifest))
    files = measured(tmp_path, "data/factors/moments/*")
    assert 2 * sizes.statistics <= files < 2 * sizes.statistics + 100_000, "of the base model, and of what it learned"
    assert sizes.statistics > 10_000


def test_run_that_does_not_fit_is_refused_with_numbers_and_nothing_is_removed(settings, tmp_path, monkeypatch):
    run_in_process(monkeypatch)
    run = settings.replace(ckpt_output_dir=str(tmp_path / "out"))
    first = train(run)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(loop, "train_step", lambda *arguments, **options: pytest.fail("it trains"))
    epochs = {"num_epochs": 50, "max_steps": None, "checkpoint_at_epoch": True}
    with pytest.raises(OSError, match=r"room for .* GB, and the run writes .*50 models of .* GB") as found:
        train(run.replace(resume="off", **epochs))
    assert found.value.errno == errno.ENOSPC
    assert (first.checkpoint / "config.json").is_file()
    assert train(run).reused, "a finished run needs no room"
