"""What the processes of a step send each other: that, and no more than that."""

from collections import Counter

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from docs.scaling import gathered_numbers, refreshed_bytes
from osft.data.packing import collate
from osft.subspace.model import osft_layers
from osft.subspace.weight import local
from osft.training.loop import make_optimizer, train_step
from osft.training.sharded_model import load_sharded
from tests.training.test_plan import SPLITS, config, factor_set, packed

WORLD_SIZE = 2  # of a group without peers; it divides the rows of every weight, which are else filled up


class Collectives(TorchDispatchMode):
    """Bytes of whole tensors, by the operation that gathers or adds them up."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        operation = func.name().split("::")[1].removesuffix("_")
        if operation in ("_allgather_base", "_reduce_scatter_base"):  # FSDP2's; (output, input, …)
            self.bytes[operation] += max(tensor.nbytes for tensor in args[:2])
        elif operation in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # those of DTensor
            self.bytes["refreshed"] += max(args[0].nbytes, result.nbytes)
        elif operation == "allreduce" and args[0][0].numel() > 1:
            self.bytes["refreshed"] += 2 * args[0][0].nbytes
        return result


@pytest.mark.parametrize("split", SPLITS)
def test_no_tensor_is_whole_and_a_step_gathers_each_block_twice_in_the_weights_dtype_and_reduces_coefficients_only(
    model_folder, chats, tmp_path, split
):
    settings = config(model_folder, chats, dtype="bfloat16", **SPLITS[split])
    factors = factor_set(settings, tmp_path / "factors")
    distributed.init_process_group("fake", rank=0, world_size=WORLD_SIZE, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (WORLD_SIZE,))
        model, _ = load_sharded(settings, settings.model_path, factors, device=torch.device("cpu"), mesh=mesh)
        a_row = ("rotary", "curvature")
        buffers = [buffer for name, buffer in model.named_buffers() if not any(each in name for each in a_row)]
        tensors = [*model.parameters(), *buffers]
        assert {local(tensor).numel() * WORLD_SIZE for tensor in tensors} == {tensor.numel() for tensor in tensors}
        optimizer = make_optimizer(model, settings, fused=False)
        with Collectives() as seen:
            train_step(model.train(), optimizer, [collate(packed(64))], num_loss_tokens=60, world_size=WORLD_SIZE)
        layers = [layer for _, layer in osft_layers(model)]
        inside, outside = gathered_numbers(model)
        refreshed = refreshed_bytes(layers)
        trained = sum(layer.coefficients.numel() for layer in layers)
        kept = {p.dtype for layer in layers for p in (layer.coefficients, *layer.bases())}
    finally:
        distributed.destroy_process_group()
    assert seen.bytes == {
        "_allgather_base": 2 * (2 * inside + outside),
        "_reduce_scatter_base": 4 * trained,
        "refreshed": refreshed,
    }
    assert kept == {torch.float32}
