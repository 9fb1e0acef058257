"""What a launching process leaves to others: the GPU. And how long processes wait for each other."""

import json
import socket
import time
from datetime import timedelta

import pytest
import torch

from osft.data.packing import Batching
from osft.process.exit_codes import CONNECTION_LOST
from osft.settings.subspace import SubspaceConfig
from osft.settings.training import TrainConfig
from osft.subspace.factor_set import FactorSet
from osft.subspace.factor_store import split_share
from osft.subspace.preflight import Preflight
from osft.training import factors, launch, own_process, train, worker


@pytest.fixture
def config(model_folder, chats, tmp_path) -> TrainConfig:
    return TrainConfig(
        model_path=str(model_folder),
        data_path=str(chats),
        ckpt_output_dir=str(tmp_path / "run"),
        unfreeze_rank_ratio=0.5,
        effective_batch_size=16,
        max_tokens_per_gpu=256,
        max_seq_len=128,
        learning_rate=1e-2,
        nproc_per_node=1,
        use_liger=False,
        rank_allocation="adaptive",
    )


class Reached(Exception):
    """Training would begin."""


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have a GPU, which this process must not touch; training is not begun."""

    def touched() -> None:
        raise AssertionError("the launching process initializes CUDA")

    def run_processes(launch_config, work):
        raise Reached(work["factors"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    monkeypatch.setattr(launch, "_run_processes", run_processes)


def test_launching_process_does_not_touch_the_gpu(config, gpu, monkeypatch):
    asked: list[str] = []

    def elsewhere(module, work):
        asked.append(module)
        found = factors.compute_factors_here(work, device="cpu")
        return {"path": str(found.path), "computed": found.computed}

    monkeypatch.setattr(factors, "in_own_process", elsewhere)
    with pytest.raises(Reached):
        train(config)
    assert asked == ["osft.training.factors"]
    assert not torch.cuda.is_initialized()


@pytest.mark.slow
def test_factors_of_another_process_are_those_of_this_one(config, gpu, tmp_path, monkeypatch):
    """With the ranks that the importance gives, which the other process measures."""
    with pytest.raises(Reached) as elsewhere:
        train(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Reached) as here:
        train(config.replace(ckpt_output_dir=str(tmp_path / "other")))
    found: list[FactorSet] = [factors.load_factor_set(str(reached.value)) for reached in (elsewhere, here)]
    assert found[0].path != found[1].path
    assert found[0].weights == found[1].weights
    assert found[0].importance == found[1].importance is not None


def as_processes(module, works):
    """`in_own_processes`, one after the other in this one."""
    assert module == "osft.training.factors"
    return [json.loads(json.dumps(factors._compute(json.loads(json.dumps(work))))) for work in works]


def test_factors_are_the_same_for_any_number_of_processes(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(factors, "in_own_processes", as_processes)
    quarter = SubspaceConfig(unfreeze_rank_ratio=0.25)
    found = {}
    for processes in (1, 2, 3):
        common = {"preflight": Preflight(Batching.PACKED, "tiny"), "processes": processes}
        store = str(tmp_path / str(processes))
        found[processes] = factors.compute_factors(model_folder, "none", store, quarter, **common)
        assert found[processes].computed == 14
        assert factors.compute_factors(model_folder, "none", store, quarter, **common).computed == 0
        factors_of = [
            split_share(model_folder, store, quarter, number=n, processes=processes) for n in range(processes)
        ]
        names = [name for share in factors_of for name in share.weights]
        assert sorted(names) == sorted(found[processes].weights), "each weight is read by one process"
    assert found[1].key == found[2].key == found[3].key
    assert found[1].weights == found[2].weights == found[3].weights


@pytest.mark.slow
def test_shares_of_real_processes_make_the_set_of_one(model_folder, tmp_path):
    quarter = SubspaceConfig(unfreeze_rank_ratio=0.25)
    one, three = (
        factors.compute_factors(
            model_folder,
            "none",
            str(tmp_path / str(n)),
            quarter,
            preflight=Preflight(Batching.PACKED, "tiny"),
            processes=n,
        )
        for n in (1, 3)
    )
    assert (one.computed, three.computed) == (14, 14)
    assert one.ranks == three.ranks
    for target in one.weights:
        torch.testing.assert_close(one.spectrum(target), three.spectrum(target), rtol=1e-5, atol=1e-6)


STEP = """
import os, signal, sys, time
from osft.training.own_process import answer
def step(work):
    if work["do"] == "die": os.kill(os.getpid(), signal.SIGKILL)
    if work["do"] == "break": raise ZeroDivisionError
    if work["do"] == "wait": time.sleep(60)
    if work["do"] != "well": raise getattr(__import__("builtins"), work["do"])("the reason of it")
    return work
answer(step)
"""


@pytest.fixture
def step(tmp_path, monkeypatch) -> str:
    (tmp_path / "a_step.py").write_text(STEP)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{factors.__file__.partition('/osft/')[0]}")
    return "a_step"


def test_what_another_process_found_arrives(step):
    assert own_process.in_own_process(step, {"do": "well", "number": 3}) == {"do": "well", "number": 3}


def test_of_several_processes_the_first_that_fails_is_raised_and_the_others_are_ended(step):
    works = [{"do": "well", "number": number} for number in (1, 2)]
    assert own_process.in_own_processes(step, works) == works
    started = time.monotonic()
    with pytest.raises(ValueError, match="the reason of it"):
        own_process.in_own_processes(step, [{"do": "wait"}, {"do": "ValueError"}])
    assert time.monotonic() - started < 55, "the other one waits for a minute"


@pytest.mark.parametrize("kind", ["ValueError", "FileNotFoundError", "PermissionError", "IsADirectoryError"])
def test_what_a_user_caused_is_raised_as_what_it_is(step, kind):
    raised = {"IsADirectoryError": OSError}.get(kind) or getattr(__import__("builtins"), kind)
    with pytest.raises(raised, match="the reason of it"):
        own_process.in_own_process(step, {"do": kind})


@pytest.mark.parametrize(("what", "end"), [("die", "signal 9"), ("break", "exit code 1")])
def test_process_that_breaks_is_told(step, what, end):
    with pytest.raises(RuntimeError, match=f"a_step ended with {end}"):
        own_process.in_own_process(step, {"do": what})


@pytest.mark.covers("process_group_timeout_minutes")
@pytest.mark.parametrize("minutes", [30.0, 0.5])
def test_collective_operations_have_a_timeout(config, monkeypatch, tmp_path, minutes):
    def init_process_group(**given):
        raise Reached(given["timeout"])

    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    settings = {} if minutes == 30 else {"process_group_timeout_minutes": minutes}
    with pytest.raises(Reached) as reached:
        worker.train_process({"config": config.replace(**settings).to_dict()})
    assert reached.value.args == (timedelta(minutes=minutes),)


@pytest.mark.covers("rdzv_timeout_minutes")
@pytest.mark.parametrize("node_rank", [0, 1])
def test_node_does_not_wait_for_the_others_for_ever(config, node_rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    alone = config.replace(
        nnodes=2,
        node_rank=node_rank,
        rdzv_endpoint=endpoint,
        rdzv_timeout_minutes=0.02,
        rank_allocation="uniform",
    )
    began = time.monotonic()
    with pytest.raises(launch.TrainingFailed, match="the nodes did not meet") as failed:
        train(alone)
    assert failed.value.exit_code == CONNECTION_LOST
    assert time.monotonic() - began < 60
