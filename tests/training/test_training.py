"""Training in processes: invariance to how the work is cut, a checkpoint that opens, failures that speak."""

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

from osft.data.prepare import prepare
from osft.models.checkpoint import CheckpointReader
from osft.settings.subspace import SubspaceConfig
from osft.settings.training import TrainConfig
from osft.subspace import factor_store
from osft.training import TrainResult, train
from tests.conftest import byte_tokenizer, tiny_llama
from tests.subspace.test_linear import frozen_directions
from tests.training.in_process import run_in_process

STEPS = 20
QUARTER = SubspaceConfig(unfreeze_rank_ratio=0.25)


@pytest.fixture(scope="module")
def config(chats: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Twenty steps of the tiny model; tests change what they are about."""
    root = tmp_path_factory.mktemp("training")
    return TrainConfig(
        model_path=str(model_folder),
        data_path=str(prepare(str(chats), model_folder, root / "data").folder),
        use_processed_dataset=True,
        factors=str(factor_store.precompute(model_folder, root / "factors", QUARTER).path),
        ckpt_output_dir=str(root / "one-process"),
        unfreeze_rank_ratio=0.25,
        max_seq_len=300,
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


def assert_same_training(result: TrainResult, expected: TrainResult) -> None:
    """The same losses at every step, and the same weights at the end, up to the rounding of sums."""
    assert losses(result) == pytest.approx(losses(expected), rel=1e-5)
    wanted = weights(expected)
    for name, found in weights(result).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


def test_training_learns(one_process):
    found = losses(one_process)
    assert len(found) == STEPS
    assert found[-1] < 0.65 * found[0]


@pytest.mark.parametrize(
    "change",
    [
        {"nproc_per_node": 3, "max_tokens_per_gpu": 150},  # no dimension is a multiple of 3
        pytest.param({"nproc_per_node": 4}, marks=pytest.mark.slow),
        {"max_tokens_per_gpu": 2000},
        {"max_tokens_per_gpu": 100, "gradient_checkpointing": True},
    ],
    ids=["three-uneven-processes", "four-processes", "large-micro-batches", "small-micro-batches-recomputed"],
)
def test_losses_and_weights_do_not_depend_on_how_the_work_is_cut(config, one_process, tmp_path, monkeypatch, change):
    if "nproc_per_node" not in change:
        run_in_process(monkeypatch)
    assert_same_training(train(config.replace(ckpt_output_dir=str(tmp_path / "run"), **change)), one_process)


@pytest.fixture(scope="module")
def two_processes(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    output = tmp_path_factory.mktemp("two-processes") / "run"
    return train(config.replace(ckpt_output_dir=str(output), nproc_per_node=2))


def test_two_processes_train_as_one(one_process, two_processes):
    assert two_processes.summary.world_size == 2
    assert_same_training(two_processes, one_process)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_compiled_blocks_that_are_sharded_train_as_the_others(one_process, config, tmp_path, gradient_checkpointing):
    change = {"torch_compile": True, "gradient_checkpointing": gradient_checkpointing, "nproc_per_node": 2}
    assert_same_training(train(config.replace(ckpt_output_dir=str(tmp_path / "run"), **change)), one_process)


def test_sharded_update_is_orthogonal_to_the_frozen_directions(config, two_processes):
    result = two_processes
    base = CheckpointReader(config.model_path)
    tuned = CheckpointReader(result.checkpoint)
    for name, layout in result.rank_layout.items():
        before = base.tensor(f"{name}.weight").double()
        update = tuned.tensor(f"{name}.weight").double() - before
        assert update.norm().item() == pytest.approx(layout.update_norm, rel=1e-3)
        shares = torch.linalg.svdvals(update).square() / update.square().sum()
        assert torch.special.entr(shares).sum().exp().item() == pytest.approx(layout.effective_rank, rel=1e-2)
        assert layout.effective_rank <= layout.unfrozen + 1e-4
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
    assert names == {file.name for file in Path(config.model_path).iterdir()} | {"README.md", "osft.json"}


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
            use_processed_dataset=True,
            factors=str(factor_store.precompute(folder, tmp_path / "factors", core).path),
            ckpt_output_dir=str(tmp_path / "run"),
            **core.to_dict(),
            effective_batch_size=16,
            max_tokens_per_gpu=2048,
            max_seq_len=2048,
            learning_rate=1e-2,
            max_steps=3,
            nproc_per_node=2,
            dtype="bfloat16",
        )
    )
    tuned, base = CheckpointReader(result.checkpoint), CheckpointReader(folder)
    changed = "model.layers.0.mlp.up_proj.weight"
    assert tuned.served_dtype(changed) == torch.bfloat16
    assert not torch.equal(tuned.tensor(changed), base.tensor(changed))
    kept = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(tuned.tensor(kept), base.tensor(kept))


def test_inputs_are_checked_before_a_process_starts(config, tmp_path):
    def with_(**changes: object) -> TrainConfig:
        return config.replace(ckpt_output_dir=str(tmp_path / "run"), **changes)

    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        train(with_(model_path=str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match="missing.jsonl does not exist"):
        train(with_(data_path=str(tmp_path / "missing.jsonl")))
    with pytest.raises(FileNotFoundError, match="there is no factor set"):
        train(with_(factors=str(tmp_path / "set.json")))
    with pytest.raises(ValueError, match="more than max_tokens_per_gpu=40"):
        train(with_(max_tokens_per_gpu=40))
    assert not (tmp_path / "run").exists()


def test_error_of_a_rank_arrives_with_its_traceback(config, tmp_path):
    other = tmp_path / "other"
    tiny_llama(seed=5).save_pretrained(other)
    foreign = factor_store.precompute(other, tmp_path / "factors", QUARTER)
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 ended with exit code 1.*check_weights.*does not belong to"):
        train(config.replace(ckpt_output_dir=str(tmp_path / "run"), factors=str(foreign.path)))
    assert not (tmp_path / "run" / "hf_format").exists()
    assert not (tmp_path / "run" / "training.json").exists()


def start(config: TrainConfig, folder: Path) -> subprocess.Popen:
    """A training call in a process of its own, with its first step done."""
    settings = folder / "settings.json"
    settings.write_text(json.dumps(config.to_dict()))
    code = "import json, sys; from osft import TrainConfig; from osft.training import train; "
    code += "train(TrainConfig(**json.load(open(sys.argv[1]))))"
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, str(settings)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = Path(config.ckpt_output_dir) / "metrics.jsonl"
    while not metrics.is_file() or metrics.stat().st_size == 0:
        assert launcher.poll() is None, launcher.stdout.read()
        time.sleep(0.02)
    return launcher


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.covers("resume", "save_state_steps")
def test_killed_process_ends_the_run_which_resumes_with_other_processes(config, one_process, tmp_path, monkeypatch):
    """One of two processes is killed; the next call resumes in one, and repeats the uninterrupted run's losses."""
    run = config.replace(
        ckpt_output_dir=str(tmp_path / "run"), nproc_per_node=2, save_state_steps=1, max_tokens_per_gpu=100
    )
    launcher = start(run, tmp_path)
    workers = psutil.Process(launcher.pid).children()
    assert len(workers) == 2
    state = tmp_path / "run" / "state"
    while not list(state.glob("step-*[0-9]")):
        time.sleep(0.02)
    workers[1].send_signal(signal.SIGKILL)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert "training failed: rank 1 ended with signal 9" in output
    assert running(workers) == []
    assert not (tmp_path / "run" / "training.json").exists()

    run_in_process(monkeypatch)
    assert_same_training(train(run.replace(nproc_per_node=1)), one_process)


@pytest.mark.covers("resume", "save_state_minutes")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_launcher_that_ends_leaves_the_state_and_no_process(config, one_process, tmp_path, monkeypatch, signum):
    run = config.replace(ckpt_output_dir=str(tmp_path / "run"), max_tokens_per_gpu=100)
    launcher = start(run, tmp_path)
    workers = psutil.Process(launcher.pid).children()
    launcher.send_signal(signum)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == (-signum if signum == signal.SIGKILL else 128 + signum), output
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    (state,) = (tmp_path / "run" / "state").iterdir()
    assert int(state.name.removeprefix("step-")) < STEPS
    run_in_process(monkeypatch)
    assert_same_training(train(run), one_process)
