"""Steps of several processes: those of one process, with a part of every weight on each."""

import random
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from docs.scaling import gathered_numbers, refreshed_bytes
from osft.data.chat import Sample
from osft.data.packing import MicroBatch, collate
from osft.settings.training import TrainConfig
from osft.subspace.model import osft_layers
from osft.subspace.weight import local
from osft.training.loop import make_optimizer, train_step
from osft.training.sharded_model import load_sharded
from tests.training.in_processes import in_processes
from tests.training.test_collectives import Collectives
from tests.training.test_plan import SPLITS, config, factor_set

STEPS, MICRO_BATCHES, TOKENS = 3, 12, 20


def micro_batches() -> list[MicroBatch]:
    numbers = random.Random(0)
    rows = [[numbers.randrange(256) for _ in range(TOKENS)] for _ in range(MICRO_BATCHES)]
    return [collate([Sample(row, row)]) for row in rows]


def steps(settings: TrainConfig, factors: Path, rank: int = 0, world_size: int = 1) -> dict[str, object]:
    """What comes of some steps on this rank's share of the micro-batches: losses, norms and a step's collectives."""
    mesh = init_device_mesh("cpu", (world_size,)) if world_size > 1 else None
    model, _ = load_sharded(settings, settings.model_path, factors, device=torch.device("cpu"), mesh=mesh)
    whole, here = (max(map(torch.Tensor.numel, each)) for each in (model.parameters(), map(local, model.parameters())))
    optimizer = make_optimizer(model, settings, fused=False)
    losses, norms = [], []
    for _ in range(STEPS):
        with Collectives() as seen:
            loss, _, norm = train_step(
                model.train(),
                optimizer,
                micro_batches()[rank::world_size],
                num_loss_tokens=MICRO_BATCHES * (TOKENS - 1),
                max_grad_norm=1.0,
                world_size=world_size,
            )
        if mesh:
            torch.distributed.all_reduce(loss)
        losses.append(loss.item())
        norms.append(norm.item())
    layers = [layer for _, layer in osft_layers(model)]
    inside, outside = gathered_numbers(model)
    passes = MICRO_BATCHES // world_size
    trained = sum(layer.coefficients.numel() for layer in layers)
    return {
        "losses": losses,
        "norms": norms,
        "share": here / whole,
        "collectives": dict(seen.bytes),
        "computed": {
            "_allgather_base": 4 * passes * (2 * inside + outside),
            "_reduce_scatter_base": 4 * passes * trained,
            "refreshed": refreshed_bytes(layers),
        },
    }


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("split", "gradient_checkpointing"),
    [
        ("complement", False),
        ("activations", True),
        *(pytest.param(split, split != "activations", marks=pytest.mark.slow) for split in SPLITS),
    ],
)
def test_processes_step_as_one_does(model_folder, chats, tmp_path, split, gradient_checkpointing, world_size):
    settings = config(
        model_folder,
        chats,
        dtype="float32",
        learning_rate=1e-2,
        gradient_checkpointing=gradient_checkpointing,
        **SPLITS[split],
    )
    factors = factor_set(settings, tmp_path / "factors")
    one = steps(settings, factors)
    found = in_processes(lambda rank: steps(settings, factors, rank, world_size), tmp_path, world_size=world_size)
    assert one["losses"][-1] < 0.99 * one["losses"][0], "nothing was learned, so the test shows nothing"
    for each in found:
        assert isinstance(each, dict), each
        assert each["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert each["norms"] == pytest.approx(one["norms"], rel=1e-4)
        assert each["share"] < 1.05 / world_size, "a process holds more than its rows of the largest tensor"
        if world_size == 2:  # which divides the rows of every weight, so that none is filled up
            assert each["collectives"] == each["computed"]
