"""Training in processes: invariance to how the work is cut, a checkpoint that opens, failures that speak."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from osft.checkpoint import CheckpointReader
from osft.config import SubspaceConfig, TrainConfig
from osft.data.prepare import prepare
from osft.subspace import factor_store
from osft.training import TrainResult, train
from tests.conftest import byte_tokenizer, tiny_llama
from tests.subspace.test_linear import frozen_directions

STEPS = 20
QUARTER = SubspaceConfig(unfreeze_rank_ratio=0.25)


@pytest.fixture(scope="module")
def config(chats: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Twenty steps of the tiny model; tests change what they are about."""
    root = tmp_path_factory.mktemp("training")
    return TrainConfig(
        model_path=str(model_folder),
        data_path=str(prepare(str(chats), model_folder, root / "data").folder),
        factors_path=str(factor_store.precompute(model_folder, root / "factors", QUARTER).path),
        output_dir=str(root / "one-process"),
        subspace=QUARTER,
        effective_batch_size=12,
        max_tokens_per_gpu=300,
        learning_rate=1e-2,
        num_epochs=3,
        max_steps=STEPS,
        warmup_steps=3,
        weight_decay=0.01,
        nproc_per_node=1,
    )


@pytest.fixture(scope="module")
def one_process(config: TrainConfig) -> TrainResult:
    return train(config)


def losses(result: TrainResult) -> list[float]:
    return [json.loads(line)["loss"] for line in result.metrics.read_text().splitlines()]


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(result.checkpoint).state_dict()


def test_training_learns(one_process):
    found = losses(one_process)
    assert len(found) == STEPS
    assert found[-1] < 0.65 * found[0]


@pytest.mark.parametrize(
    "change",
    [
        {"nproc_per_node": 2},
        {"nproc_per_node": 3, "max_tokens_per_gpu": 150},  # no dimension is a multiple of 3
        {"max_tokens_per_gpu": 2000},
        {"max_tokens_per_gpu": 100, "gradient_checkpointing": True},
    ],
    ids=["two-processes", "three-uneven-processes", "large-micro-batches", "small-micro-batches-recomputed"],
)
def test_losses_and_weights_do_not_depend_on_how_the_work_is_cut(config, one_process, tmp_path, change):
    result = train(dataclasses.replace(config, output_dir=str(tmp_path / "run"), **change))
    assert losses(result) == pytest.approx(losses(one_process), rel=1e-4)
    expected = weights(one_process)
    for name, found in weights(result).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_sharded_update_is_orthogonal_to_the_frozen_directions(config, tmp_path):
    result = train(dataclasses.replace(config, output_dir=str(tmp_path / "run"), nproc_per_node=2))
    base = CheckpointReader(config.model_path)
    tuned = CheckpointReader(result.checkpoint)
    for name, norm in result.summary["update_norms"].items():
        before = base.tensor(f"{name}.weight").double()
        update = tuned.tensor(f"{name}.weight").double() - before
        assert update.norm().item() == pytest.approx(norm, rel=1e-3)
        left, right = frozen_directions(before, round(0.25 * min(before.shape)))
        # The stored float32 weight rounds the update, so the bound is the rounding's.
        assert (left.T @ update).norm() / update.norm() < 1e-4
        assert (update @ right).norm() / update.norm() < 1e-4


def test_checkpoint_is_a_plain_folder_with_the_base_models_dtype(one_process, config, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(config.model_path)
    tuned = AutoModelForCausalLM.from_pretrained(one_process.checkpoint)
    assert tuned.state_dict().keys() == base.state_dict().keys()
    assert tuned.lm_head.weight is tuned.model.embed_tokens.weight, "tied embeddings stay tied"
    assert torch.equal(tuned.lm_head.weight, base.lm_head.weight), "what is not a target is not changed"
    names = {file.name for file in one_process.checkpoint.iterdir()}
    assert names == {file.name for file in Path(config.model_path).iterdir()}


def test_bfloat16_model_in_several_shards_is_trained_and_stays_bfloat16(chats, tmp_path):
    folder = tmp_path / "model"
    tiny_llama(tie_word_embeddings=False).to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    core = SubspaceConfig(unfreeze_rank_ratio=0.5, free_subspace="core", target_patterns=["mlp"])
    result = train(
        TrainConfig(
            model_path=str(folder),
            data_path=str(prepare(str(chats), folder, tmp_path / "data").folder),
            factors_path=str(factor_store.precompute(folder, tmp_path / "factors", core).path),
            output_dir=str(tmp_path / "run"),
            subspace=core,
            effective_batch_size=16,
            learning_rate=1e-2,
            max_steps=3,
            nproc_per_node=2,
            dtype="bfloat16",
        )
    )
    tuned, base = CheckpointReader(result.checkpoint), CheckpointReader(folder)
    assert tuned.dtype("model.layers.0.mlp.up_proj.weight") == torch.bfloat16
    changed = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(tuned.tensor(changed), base.tensor(changed))
    kept = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(tuned.tensor(kept), base.tensor(kept))


def test_finished_run_is_reused_and_other_settings_are_refused(config, one_process):
    assert train(config).reused
    with pytest.raises(ValueError, match="holds a finished run with other settings"):
        train(dataclasses.replace(config, seed=7))


def test_inputs_are_checked_before_a_process_starts(config, tmp_path):
    def with_(**changes: object) -> TrainConfig:
        return dataclasses.replace(config, output_dir=str(tmp_path / "run"), **changes)

    with pytest.raises(FileNotFoundError, match="nowhere is not a model folder"):
        train(with_(model_path=str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match="is not a prepared dataset"):
        train(with_(data_path=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="there is no factor set"):
        train(with_(factors_path=str(tmp_path / "set.json")))
    with pytest.raises(ValueError, match="max_tokens_per_gpu=40 is less than the longest training sample"):
        train(with_(max_tokens_per_gpu=40))
    assert not (tmp_path / "run").exists()


def test_error_of_a_rank_arrives_with_its_traceback(config, tmp_path):
    other = tmp_path / "other"
    tiny_llama(seed=5).save_pretrained(other)
    foreign = factor_store.precompute(other, tmp_path / "factors", QUARTER)
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 ended with exit code 1.*check_weights.*does not belong to"):
        train(dataclasses.replace(config, output_dir=str(tmp_path / "run"), factors_path=str(foreign.path)))
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert not (tmp_path / "run" / "training.json").exists()


def test_killed_process_ends_the_run_and_leaves_nothing_running(config, tmp_path):
    long = dataclasses.replace(
        config, output_dir=str(tmp_path / "run"), nproc_per_node=2, max_steps=None, num_epochs=10_000
    )
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(long.to_dict()))
    code = "import json, sys; from osft import TrainConfig; from osft.training import train; "
    code += "train(TrainConfig(**json.load(open(sys.argv[1]))))"
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, str(settings)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.is_file() or metrics.stat().st_size == 0:
        assert launcher.poll() is None, launcher.stdout.read()
        time.sleep(0.1)
    workers = psutil.Process(launcher.pid).children()
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert "training failed: rank 1 ended with signal 9" in output
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert not (tmp_path / "run" / "training.json").exists()
