"""The documented contract: the calls of the documentation, the registry, the result, the errors."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

import osft as package
from osft import AlgorithmRegistry, Backend, OSFTAlgorithm, create_algorithm, osft
from osft.api import MiniTrainerBackend
from tests.conftest import byte_tokenizer
from tests.training.in_process import run_in_process

REQUIRED = {
    "unfreeze_rank_ratio": 0.25,
    "effective_batch_size": 16,
    "max_tokens_per_gpu": 2048,
    "max_seq_len": 1024,
    "learning_rate": 5e-6,
}


@pytest.fixture
def paths(model_folder, chats, tmp_path) -> dict[str, str]:
    return {"model_path": str(model_folder), "data_path": str(chats), "ckpt_output_dir": str(tmp_path / "checkpoints")}


# The four examples of the documentation, with their parameters; paths and sizes are substituted.


def test_example_of_basic_continual_learning(paths, monkeypatch):
    run_in_process(monkeypatch)
    result = osft(
        **paths,
        unfreeze_rank_ratio=0.25,
        effective_batch_size=16,
        max_tokens_per_gpu=2048,
        max_seq_len=1024,
        learning_rate=5e-6,
        num_epochs=3,
    )
    assert result.num_samples == 3 * 120
    assert result.num_steps == 3 * 8
    AutoModelForCausalLM.from_pretrained(result.checkpoint)


@pytest.mark.slow
@pytest.mark.covers("nproc_per_node", "use_liger", "target_patterns", "checkpoint_at_epoch")
def test_example_of_four_processes_and_attention_only(paths):
    parameters = {
        "unfreeze_rank_ratio": 0.3,
        "effective_batch_size": 32,
        "max_tokens_per_gpu": 4096,
        "max_seq_len": 2048,
        "learning_rate": 2e-5,
        "nproc_per_node": 4,
        "target_patterns": ["q_proj", "v_proj", "k_proj", "o_proj"],
        "use_liger": True,
        "num_epochs": 5,
        "checkpoint_at_epoch": True,
    }
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="use_liger=True needs"):
            osft(**paths, **parameters)
        del parameters["use_liger"]
    result = osft(**paths, **parameters)
    assert result.summary.world_size == 4
    assert [path.name for path in result.checkpoints] == [f"samples_{120 * epoch}.0" for epoch in range(1, 6)]
    assert {name.rsplit(".", 1)[1] for name in result.rank_layout} == {"q_proj", "v_proj", "k_proj", "o_proj"}


def test_example_of_high_adaptation(paths, monkeypatch):
    run_in_process(monkeypatch)
    result = osft(
        **paths,
        unfreeze_rank_ratio=0.7,
        effective_batch_size=16,
        max_tokens_per_gpu=2048,
        max_seq_len=1024,
        learning_rate=1e-5,
        num_epochs=10,
        warmup_steps=100,
        lr_scheduler="cosine",
    )
    rates = [line["learning_rate"] for line in result.history]
    assert len(rates) == 80
    assert rates == pytest.approx([1e-5 * step / 100 for step in range(80)]), "still warming up"


NODE = """
import json, sys
from osft import osft
parameters = json.loads(sys.argv[1])
result = osft(**parameters)
print("RESULT", json.dumps([line["loss"] for line in result.history]), result.summary.world_size)
"""


@pytest.mark.slow
@pytest.mark.covers("nnodes", "node_rank", "rdzv_id", "rdzv_endpoint", "nproc_per_node")
def test_example_of_three_nodes_gives_the_losses_of_one(chats, tmp_path):
    """Three calls on one machine meet at one port, each a node with one process, and train a mixture of experts."""
    model = tmp_path / "gpt-oss"
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=256,
        pad_token_id=256,
    )
    GptOssForCausalLM(config).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    parameters = {
        "model_path": str(model),
        "data_path": str(chats),
        "ckpt_output_dir": str(tmp_path / "three-nodes"),
        "data_output_dir": str(tmp_path / "data"),
        "unfreeze_rank_ratio": 0.25,
        "effective_batch_size": 64,
        "max_tokens_per_gpu": 2048,
        "max_seq_len": 2048,
        "learning_rate": 5e-6,
        "num_epochs": 5,
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for rank in range(3):
        host = "0.0.0.0" if rank == 0 else "127.0.0.1"
        node = {
            "nnodes": 3,
            "node_rank": rank,
            "nproc_per_node": 1,
            "rdzv_id": 98765,
            "rdzv_endpoint": f"{host}:{port}",
        }
        command = [sys.executable, "-c", NODE, json.dumps(parameters | node)]
        output = (tmp_path / f"node-{rank}.txt").open("w")
        nodes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
    try:
        while any(node.poll() is None for node in nodes) and not any(node.poll() for node in nodes):
            time.sleep(0.1)
    finally:
        for node in nodes:
            node.kill()  # those that wait for one that has failed
    outputs = [(tmp_path / f"node-{rank}.txt").read_text() for rank in range(3)]
    assert [node.wait() for node in nodes] == [0, 0, 0], "\n".join(output[-3000:] for output in outputs)
    results = [next(line for line in output.splitlines() if line.startswith("RESULT")) for output in outputs]
    assert results[0] == results[1] == results[2], "each node returns the result"
    assert results[0].endswith(" 3")
    one_node = osft(**parameters | {"ckpt_output_dir": str(tmp_path / "one-node"), "nproc_per_node": 3})
    losses = json.loads(results[0].split(" ", 1)[1].rsplit(" ", 1)[0])
    assert losses == pytest.approx([line["loss"] for line in one_node.history], rel=1e-5)


@pytest.mark.covers("nnodes", "node_rank", "rdzv_endpoint", "rdzv_id", "master_addr", "master_port")
@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"nnodes": 2}, "rdzv_endpoint is required with nnodes > 1"),
        ({"nnodes": 2, "node_rank": 2, "rdzv_endpoint": "a:1"}, "node_rank must be less than nnodes=2, got 2"),
        ({"nnodes": 2, "rdzv_endpoint": "host"}, "rdzv_endpoint must be 'host:port', got 'host'"),
        ({"nnodes": 2, "rdzv_endpoint": "a:1", "master_addr": "b"}, "rdzv_endpoint and master_addr exclude"),
        ({"master_port": 1}, "master_port goes with master_addr"),
        ({"rdzv_id": 1.5}, "rdzv_id must be str | int | None"),
    ],
)
def test_nodes_that_cannot_meet_are_refused(paths, given, problem):
    with pytest.raises(ValueError, match=problem.replace("|", r"\|")):
        osft(**paths, **REQUIRED, **given)


@pytest.mark.covers("master_addr", "master_port", "nnodes", "node_rank", "rdzv_id")
def test_nodes_meet_where_they_are_told(paths, monkeypatch):
    from osft.settings.training import TrainConfig
    from osft.training.launch import _launch_config, with_environment

    def launch(**given: object):
        return _launch_config(with_environment(TrainConfig(**paths, **REQUIRED, **given)), 1)

    by_address = launch(nnodes=2, node_rank=1, master_addr="node-0", rdzv_id="job")
    assert (by_address.rdzv_endpoint, by_address.rdzv_configs["rank"], by_address.run_id) == ("node-0:29500", 1, "job")
    assert launch(nnodes=2, master_addr="node-0", master_port=1234).rdzv_endpoint == "node-0:1234"
    assert launch().run_id != launch().run_id, "random on a single node"
    pod = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    for name, value in pod.items():
        monkeypatch.setenv(f"PET_{name}", value)
    from_environment = launch()
    assert (from_environment.rdzv_endpoint, from_environment.max_nodes) == ("job-master-0:23456", 2)
    assert launch(nnodes=3, node_rank=2, rdzv_endpoint="a:1").rdzv_endpoint == "a:1", "a parameter goes first"


# The class form and the registry


def test_registry_lists_and_creates():
    assert AlgorithmRegistry.list_algorithms() == ["osft"]
    assert AlgorithmRegistry.list_backends("osft") == ["mini-trainer"]
    assert AlgorithmRegistry.list_backends("nothing") == []
    assert AlgorithmRegistry.get_algorithm("osft") is OSFTAlgorithm
    assert AlgorithmRegistry.get_backend("osft", "mini-trainer") is MiniTrainerBackend
    assert isinstance(create_algorithm("osft", "mini-trainer").backend, MiniTrainerBackend)
    assert isinstance(create_algorithm("osft").backend, MiniTrainerBackend), "the first one"


@pytest.mark.covers("backend")
def test_unknown_backend_and_algorithm_list_what_there_is(paths):
    with pytest.raises(ValueError, match="no backend 'deepspeed' for 'osft'. Registered are: mini-trainer"):
        osft(**paths, **REQUIRED, backend="deepspeed")
    with pytest.raises(ValueError, match="no algorithm 'sft'. Registered are: osft"):
        create_algorithm("sft", "mini-trainer")
    with pytest.raises(ValueError, match="no algorithm 'sft'"):
        AlgorithmRegistry.register_backend("sft", "other", MiniTrainerBackend)


@pytest.mark.covers("backend")
def test_registered_backend_gets_the_parameters(paths, monkeypatch):
    class Echo(Backend):
        def execute_training(self, algorithm_params):
            return algorithm_params

    monkeypatch.setattr(AlgorithmRegistry, "_backends", {"osft": {"mini-trainer": MiniTrainerBackend}})
    AlgorithmRegistry.register_backend("osft", "echo", Echo)
    given = osft(**paths, **REQUIRED, backend="echo", seed=3, max_steps=5)
    assert given == {**paths, **REQUIRED, "seed": 3, "max_steps": 5}


def test_class_form_trains(paths, monkeypatch):
    run_in_process(monkeypatch)
    result = OSFTAlgorithm(MiniTrainerBackend()).train(**paths, **REQUIRED, max_steps=1, save_final_checkpoint=False)
    assert result.num_steps == 1
    assert isinstance(OSFTAlgorithm("mini-trainer").backend, MiniTrainerBackend), "a name will do"
    with pytest.raises(ValueError, match="no backend 'deepspeed'"):
        OSFTAlgorithm("deepspeed")
    required = create_algorithm("osft").get_required_params()
    assert set(required) == {*paths, *REQUIRED}
    assert create_algorithm("osft").get_optional_params()["seed"] is int


# Errors


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"learning_rat": 1}, "unknown parameter 'learning_rat'. Did you mean 'learning_rate'"),
        ({"num_epoch": 1}, "unknown parameter 'num_epoch'. Did you mean 'num_epochs'"),
        ({"seed": "one"}, r"seed must be int, got 'one' \(str\)"),
        ({"num_epochs": 1.5}, r"num_epochs must be int, got 1.5 \(float\)"),
        ({"use_liger": 1}, r"use_liger must be bool \| None, got 1 \(int\)"),
        ({"target_patterns": "q_proj"}, r"target_patterns must be list\[str\] \| None, got"),
        ({"target_patterns": [1]}, r"target_patterns must be list\[str\] \| None, got \[1\]"),
        ({"lr_scheduler": "cosinus"}, "lr_scheduler 'cosinus' is unknown; known are linear, cosine"),
        ({"nproc_per_node": "cpu"}, "nproc_per_node must be int | 'auto' | 'gpu', got 'cpu'".replace("|", r"\|")),
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
        ({"validation_split": 1.0}, "validation_split must be between"),
    ],
)
def test_bad_parameter_is_refused_by_name(paths, tmp_path, given, problem):
    with pytest.raises(ValueError, match=problem):
        osft(**paths, **REQUIRED, **given)
    assert not (tmp_path / "checkpoints").exists()


def test_missing_parameters_are_a_value_error(paths):
    with pytest.raises(ValueError, match="required parameters are missing: unfreeze_rank_ratio, effective_batch_size"):
        osft(**paths)
    with pytest.raises(ValueError, match="required parameters are missing: learning_rate"):
        OSFTAlgorithm(MiniTrainerBackend()).train(**paths, **{**REQUIRED, "learning_rate": None})


def test_path_objects_are_taken(paths, monkeypatch):
    run_in_process(monkeypatch)
    as_paths = {name: Path(value) for name, value in paths.items()}
    assert osft(**as_paths, **REQUIRED, max_steps=1, save_final_checkpoint=False).num_steps == 1


# The result


def test_result_tells_what_a_user_asks(paths, monkeypatch):
    run_in_process(monkeypatch)
    result = osft(**paths, **REQUIRED, max_steps=2)
    assert result.checkpoint.is_dir()
    assert [line["step"] for line in result.history] == [1, 2]
    assert result.num_samples == 32
    assert result.num_tokens > result.num_loss_tokens > 0
    assert set(result.timings) == {"load", "train", "save"}
    assert all(seconds > 0 for seconds in result.timings.values())
    assert result.peak_memory_bytes > 2**20
    layer = result.rank_layout["model.layers.0.mlp.up_proj"]
    assert layer.shape == (64, 32)
    assert (layer.unfrozen, layer.frozen) == (8, 24)
    assert layer.update_norm > 0
    shown = repr(result)
    for part in (str(result.checkpoint), "2 (32 samples", "trainable of", "unfrozen directions", "GiB"):
        assert part in shown
    assert max(map(len, shown.splitlines())) < 200


def test_docstring_documents_every_parameter():

    for name in package.TrainConfig.model_fields:
        assert f"    {name} (" in osft.__doc__
