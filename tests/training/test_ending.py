"""`osft train` as process 1 of a container, asked to end at different moments."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import pytest

from osft.process.exit_codes import ABANDONED
from osft.settings.training import TrainConfig
from osft.storage.lock import exclusive
from osft.training.job import train_arguments

ROOT = Path(__file__).parents[2]
UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def configuration(model: Path, data: Path, output: Path) -> TrainConfig:
    return TrainConfig(
        model_path=str(model),
        data_path=str(data),
        ckpt_output_dir=str(output),
        unfreeze_rank_ratio=0.5,
        effective_batch_size=2,
        max_tokens_per_gpu=128,
        max_seq_len=128,
        learning_rate=1e-3,
        num_epochs=1000,
        nproc_per_node=2,
    )


@contextmanager
def container(config: TrainConfig, **more: str) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """The process that waits for the container, and the container's process 1."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OSFT_LOCK_SECONDS": "300"} | more
    command = [*UNSHARE, sys.executable, "-u", "-m", "osft", *train_arguments(config)]
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit SIG_IGN
    ) as process:
        try:
            wait_for(process, lambda: psutil.Process(process.pid).children())
            yield process, psutil.Process(process.pid).children()[0]
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_importing_torch_is_ended(model_folder, chats, tmp_path):
    with container(configuration(model_folder, chats, tmp_path / "run")) as (process, first):
        wait_for(process, lambda: b"libtorch" in Path(f"/proc/{first.pid}/maps").read_bytes())
        first.send_signal(signal.SIGTERM)
        assert process.wait(8) == 143
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_run_that_nobody_follows_saves_its_state_and_ends_for_good(model_folder, chats, tmp_path):
    output = tmp_path / "run"
    with container(configuration(model_folder, chats, output), OSFT_LEASE_MINUTES="0.1") as (process, _):
        printed, _ = process.communicate(timeout=200)
    assert "nobody has followed it for too long" in printed
    assert process.returncode == ABANDONED
    assert list(output.glob("state/step-*/position.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "signum"),
    [("waiting for the lock", signal.SIGTERM), ("training", signal.SIGTERM), ("training", signal.SIGINT)],
)
def test_run_ends_with_what_it_has(model_folder, chats, tmp_path, moment, signum):
    output = tmp_path / "run"
    waits = moment == "waiting for the lock"
    begun = "_internal_data_processing/data/*/dataset.json" if waits else "metrics.jsonl"
    with (
        exclusive(output) if waits else nullcontext(),
        container(configuration(model_folder, chats, output)) as (process, first),
    ):
        wait_for(process, lambda: list(output.glob(begun)))
        if waits:
            time.sleep(1)
        else:
            wait_for(process, lambda: (output / "metrics.jsonl").stat().st_size)
        for _ in range(3):
            first.send_signal(signum)
            time.sleep(0.02)
        assert process.wait(8 if waits else 120) == 128 + signum, process.communicate()[0]
    assert bool(list(output.glob("state/step-*/position.json"))) is not waits
    assert not list(output.glob("**/*incomplete*"))
    with exclusive(output):  # the lock is free
        pass
