"""Training from and to an object store: what a run needs and leaves is there, whatever became of the machine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from osft import StopTraining, TrainingCallback, storage
from osft.settings.training import TrainConfig
from osft.training import TrainResult, loop, mirror, train
from osft.training.callbacks import Follower
from tests.object_store import SECRET
from tests.training.in_process import run_in_process

STEPS = 8


@pytest.fixture
def config(chats: Path, model_folder: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model_path=str(model_folder),
        data_path=str(chats),
        ckpt_output_dir=str(tmp_path / "plain"),
        unfreeze_rank_ratio=0.25,
        max_seq_len=300,
        effective_batch_size=12,
        max_tokens_per_gpu=300,
        learning_rate=1e-2,
        max_steps=STEPS,
        nproc_per_node=1,
    )


@pytest.fixture
def remote(config: TrainConfig, bucket: str, object_store) -> TrainConfig:
    """The same run with all of its paths in the store."""
    for location in (config.model_path, config.data_path):
        object_store.files.put(location, f"{bucket}/inputs/{Path(location).name}", recursive=True)
    return config.replace(
        model_path=f"{bucket}/inputs/{Path(config.model_path).name}",
        data_path=f"{bucket}/inputs/{Path(config.data_path).name}",
        data_output_dir=f"{bucket}/prepared",
        factors=f"{bucket}/prepared/factors",
        ckpt_output_dir=f"{bucket}/run",
    )


def losses(result: TrainResult) -> list[float]:
    return [line["loss"] for line in result.history]


def lose_scratch() -> None:
    shutil.rmtree(os.environ["OSFT_SCRATCH"])


def start(config: TrainConfig, folder: Path, **environment: str) -> subprocess.Popen:
    """A training call in a process of its own."""
    settings = folder / f"settings-{config.node_rank}.json"
    settings.write_text(json.dumps(config.to_dict()))
    code = "import json, sys; from osft import TrainConfig; from osft.training import train; "
    code += "train(TrainConfig(**json.load(open(sys.argv[1]))))"
    command = [sys.executable, "-c", code, str(settings)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    )


def kill_all(launcher: subprocess.Popen) -> str:
    """End a launcher and its processes as a machine that loses its power. Returns what they printed."""
    processes = [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    for process in processes:
        process.kill()
    return launcher.communicate(timeout=60)[0]


@pytest.mark.slow
def test_two_processes_train_from_and_to_uris_as_one_does_with_paths(config, remote, bucket, object_store, monkeypatch):
    result = train(remote.replace(nproc_per_node=2, save_state_steps=3))
    assert result.summary.world_size == 2
    assert result.uri == f"{bucket}/run"
    assert result.checkpoint_uri == f"{bucket}/run/hf_format/samples_{12 * STEPS}.0"
    names = object_store.names(f"{bucket}/run")
    model = f"hf_format/samples_{12 * STEPS}.0"
    for file in result.checkpoint.iterdir():
        assert object_store.files.cat(f"{bucket}/run/{model}/{file.name}") == file.read_bytes()
    # The states are gone when the run is finished; while it ran both processes put their shards there.
    assert {name for name in names if not name.startswith(model)} == {"config.json", "metrics.jsonl", "training.json"}
    state = f"{bucket.removeprefix('s3:/')}/run/state/step-6"
    put = {path for method, path in object_store.requests if method == "PUT" and path.startswith(state)}
    assert put == {f"{state}/{name}" for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "position.json")}
    assert json.loads(object_store.files.cat(f"{bucket}/run/config.json"))["model_path"] == remote.model_path

    run_in_process(monkeypatch)
    assert losses(result) == pytest.approx(losses(train(config)), rel=1e-4)


def test_nothing_is_prepared_or_trained_twice_with_an_empty_scratch_folder(remote, object_store, monkeypatch, capsys):
    run_in_process(monkeypatch)
    first = train(remote)
    expected, model = losses(first), {file.name for file in first.checkpoint.iterdir()}
    lose_scratch()
    capsys.readouterr()
    object_store.requests.clear()
    second = train(remote)
    printed = capsys.readouterr().out
    assert "data: reused" in printed
    assert second.reused
    assert losses(second) == expected
    assert {file.name for file in second.checkpoint.iterdir()} == model
    assert not [path for method, path in object_store.requests if method == "PUT"]
    lose_scratch()
    capsys.readouterr()
    third = train(remote.replace(ckpt_output_dir=f"{remote.ckpt_output_dir}-2"))
    assert "factors: computed 0, reused 14 of 14" in capsys.readouterr().out
    assert losses(third) == expected
    with pytest.raises(ValueError, match="holds a finished run with other settings"):
        train(remote.replace(seed=1))


@pytest.mark.slow
@pytest.mark.covers("process_group_timeout_minutes")
def test_store_that_is_slower_than_the_timeout_of_collectives_does_not_end_training(remote, bucket, object_store):
    """Every state's second shard takes 20 s, where a process waits for another one for 12 s at most."""
    run = remote.replace(nproc_per_node=2, save_state_steps=4, process_group_timeout_minutes=0.2)

    def slow(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("__1_0.distcp"):
            time.sleep(20)

    with object_store.failing(slow):
        result = train(run)
    assert result.num_steps == STEPS
    position = f"{bucket.removeprefix('s3:/')}/run/state/step-4/position.json"
    assert ("PUT", position) in object_store.requests


@pytest.mark.slow
def test_killed_run_resumes_from_the_store_with_an_empty_scratch_folder(
    config, remote, bucket, object_store, tmp_path, monkeypatch
):
    length = {"max_steps": 20, "num_epochs": 2}
    run = remote.replace(save_state_steps=1, nproc_per_node=2, **length)
    launcher = start(run, tmp_path)
    while not any(name.endswith("position.json") for name in object_store.names(f"{bucket}/run")):
        assert launcher.poll() is None, launcher.stdout.read()
        time.sleep(0.05)
    output = kill_all(launcher)
    assert "training.json" not in object_store.names(f"{bucket}/run")
    lose_scratch()
    run_in_process(monkeypatch)
    expected = losses(train(config.replace(**length)))
    done = []
    original = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *args, **options: done.append(1) or original(*args, **options))
    resumed = train(run.replace(nproc_per_node=1, save_state_steps=None))
    assert len(resumed.history) == 20
    assert 0 < len(done) < 20, f"the steps before are not repeated\n{output}"
    assert losses(resumed) == pytest.approx(expected, rel=1e-4)
    assert object_store.files.cat(f"{bucket}/run/metrics.jsonl") == resumed.metrics.read_bytes()


def test_state_that_was_uploaded_in_part_does_not_count(config, remote, bucket, object_store, monkeypatch):
    run_in_process(monkeypatch)
    run = remote.replace(save_state_steps=2)

    def refuses_the_second_state(method: str, path: str) -> int | None:
        return 403 if method == "PUT" and path.endswith("step-4/.metadata") else None

    with object_store.failing(refuses_the_second_state), pytest.raises(PermissionError, match="step-4/.metadata"):
        train(run)
    left = object_store.names(f"{bucket}/run/state")
    assert {name for name in left if name.endswith("position.json")} == {"step-2/position.json"}
    assert "step-4/__0_0.distcp" in left
    lines = object_store.files.cat(f"{bucket}/run/metrics.jsonl").decode().splitlines()
    seen = [json.loads(line)["step"] for line in lines]
    assert seen[:4] == [1, 2, 3, 4], "whoever follows sees the steps before the end"
    lose_scratch()
    resumed = train(run)
    assert losses(resumed) == losses(train(config))
    assert not object_store.names(f"{bucket}/run/state"), "the run is finished"


def test_model_is_read_only_when_it_is_complete(remote, bucket, object_store, monkeypatch):
    run_in_process(monkeypatch)

    def refuses_weights(method: str, path: str) -> int | None:
        return 403 if method in ("PUT", "POST") and path.endswith("/model.safetensors") else None

    with object_store.failing(refuses_weights), pytest.raises(PermissionError):
        train(remote)
    names = object_store.names(f"{bucket}/run")
    model = f"hf_format/samples_{12 * STEPS}.0"
    assert f"{model}/tokenizer.json" in names
    assert f"{model}/config.json" not in names
    assert "training.json" not in names, "the run is not finished"
    assert train(remote).checkpoint is not None
    assert {f"{model}/config.json", "training.json"} <= object_store.names(f"{bucket}/run")


def test_run_starts_over_in_the_store_too(remote, bucket, object_store, monkeypatch):
    run_in_process(monkeypatch)
    run = remote.replace(data_output_dir=None, factors=None)
    train(run.replace(save_state_steps=4))
    lose_scratch()
    replaced = train(run.replace(max_steps=2, resume="off"))
    assert not replaced.reused
    names = object_store.names(f"{bucket}/run")
    assert any(name.startswith("_internal_data_processing/factors/sets/") for name in names)
    assert {name.split("/")[1] for name in names if name.startswith("hf_format")} == {"samples_24.0"}
    assert not [name for name in names if name.startswith("state/")]


def test_resume_takes_the_uri_of_a_state(config, remote, bucket, monkeypatch):
    run_in_process(monkeypatch)
    expected = losses(train(config))
    done = []
    original = loop.train_step

    def dies_in_step_seven(*args, **options):
        done.append(1)
        if len(done) == 7:
            raise MemoryError("the pod is gone")
        return original(*args, **options)

    monkeypatch.setattr(loop, "train_step", dies_in_step_seven)
    with pytest.raises(MemoryError):
        train(remote.replace(save_state_steps=5))
    lose_scratch()
    with pytest.raises(FileNotFoundError, match="run/state/step-4 is not a complete training state"):
        train(remote.replace(resume=f"{bucket}/run/state/step-4"))
    assert losses(train(remote.replace(resume=f"{bucket}/run/state/step-5"))) == expected
    assert len(done) == 7 + 3


class Recorder(TrainingCallback):
    def __init__(self, stop_after: int | None = None) -> None:
        self.steps: list[int] = []
        self.saved: list[object] = []
        self._stop_after = stop_after

    def on_step_end(self, context):
        self.steps.append(context.step)
        if self._stop_after is not None and context.step >= self._stop_after:
            raise StopTraining

    def on_save(self, context):
        self.saved += context.checkpoints


def test_run_is_followed_and_stopped_from_elsewhere(remote, bucket, monkeypatch):
    """All that connects the two is the store: the follower has the URI only."""
    run_in_process(monkeypatch)
    monkeypatch.setattr(mirror, "INTERVAL_SECONDS", 0.05)
    seen = Recorder(stop_after=3)
    with Follower(f"{bucket}/run", [seen], after=0, interval_seconds=0.05):
        result = train(remote.replace(max_steps=10_000, num_epochs=1_000))
    assert 3 <= result.num_steps < 10_000
    assert seen.steps == list(range(1, result.num_steps + 1))
    assert seen.saved == [result.checkpoint_uri]
    assert storage.fetch(seen.saved[-1]) == result.checkpoint


def test_follower_of_a_uri_waits_for_what_is_not_there_yet(bucket, object_store):
    seen = Recorder()
    line = {"epoch": 0.5, "loss": 1.0, "learning_rate": 0.1, "validation_loss": None, "checkpoints": []}
    lines = [json.dumps(line | {"step": step}) + "\n" for step in range(1, 5)]
    with Follower(f"{bucket}/run", [seen], after=1, interval_seconds=0.02):
        time.sleep(0.2)
        object_store.files.pipe(f"{bucket}/run/metrics.jsonl", "".join(lines[:3]).encode())
        time.sleep(0.5)
        assert seen.steps == [2, 3]
        object_store.files.pipe(f"{bucket}/run/metrics.jsonl", ("".join(lines) + '{"step": 5, "ep').encode())
    assert seen.steps == [2, 3, 4]


def test_no_credential_is_written_down(remote, bucket, object_store, tmp_path, monkeypatch):
    run_in_process(monkeypatch)
    train(remote.replace(save_state_steps=4))
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert written
    assert not [file for file in written if SECRET.encode() in file.read_bytes()]
    stored = [
        name for name in object_store.names(bucket) if SECRET.encode() in object_store.files.cat(f"{bucket}/{name}")
    ]
    assert not stored


@pytest.mark.slow
def test_two_nodes_with_scratch_folders_of_their_own_go_on_from_one_store(
    config, remote, bucket, object_store, tmp_path, monkeypatch
):
    length = {"max_steps": 20, "num_epochs": 2}

    def nodes(attempt: str, save_state_steps: int | None) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        run = remote.replace(nnodes=2, rdzv_endpoint=endpoint, save_state_steps=save_state_steps, **length)
        return [
            start(run.replace(node_rank=rank), tmp_path, OSFT_SCRATCH=str(tmp_path / f"{attempt}-{rank}"))
            for rank in range(2)
        ]

    launchers = nodes("first", 1)
    while not any(name.endswith("position.json") for name in object_store.names(f"{bucket}/run")):
        assert [launcher.poll() for launcher in launchers] == [None, None], [p.stdout.read() for p in launchers]
        time.sleep(0.05)
    for launcher in launchers:
        kill_all(launcher)
    assert "training.json" not in object_store.names(f"{bucket}/run")
    launchers = nodes("second", None)
    outputs = [launcher.communicate(timeout=240)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert all("train: resumes from" in output for output in outputs)
    run_in_process(monkeypatch)
    expected = losses(train(config.replace(**length)))
    lines = object_store.files.cat(f"{bucket}/run/metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(expected, rel=1e-4)
