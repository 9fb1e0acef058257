"""The model that a training process holds: its rows of every weight, read straight from disk.

On one process the tensors are plain; on several, FSDP2 shards each transformer block by rows. The whole model is
never in one process's memory, neither when it is loaded nor when it is saved.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from osft.checkpoint import CheckpointReader, write_checkpoint
from osft.config import TrainConfig
from osft.models import empty_model
from osft.subspace.factor_store import FactorSet, check_settings, check_weights, load_factor_set
from osft.subspace.linear import OSFTLinear
from osft.subspace.model import inject_empty, osft_layers
from osft.subspace.targets import select_targets, transformer_blocks


def load_sharded(
    config: TrainConfig, *, device: torch.device, mesh: DeviceMesh | None = None
) -> tuple[PreTrainedModel, CheckpointReader]:
    """The model of `config`, its targets split as the factor set says, on `device`; sharded over `mesh` if given.

    Raises FactorsMismatchError if the factors are not those of the model's weights.
    """
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(config.dtype) or getattr(
        torch, config.dtype
    )
    reader = CheckpointReader(config.model_path)
    model = empty_model(
        config.model_path,
        dtype=dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    targets = select_targets(model, config.subspace.target_patterns)
    factors = load_factor_set(config.factors_path)
    check_settings(factors, config.subspace, targets)
    rank, world_size = (mesh.get_local_rank(), mesh.size()) if mesh else (0, 1)
    check_weights(factors, reader, targets[rank::world_size])  # each process reads its share, together all of them

    inject_empty(
        model,
        targets,
        unfreeze_rank_ratio=config.subspace.unfreeze_rank_ratio,
        free_subspace=config.subspace.free_subspace,
        base_dtype=reader.dtype(f"{targets[0]}.weight"),
    )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if mesh:
        for block in transformer_blocks(model)[1]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    _load_buffers(model, reader, factors, device, mesh)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    model.tie_weights()  # the line above makes two of a tied weight
    _load_parameters(model, reader, factors, rank, world_size)
    return model, reader


def local_rows(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """[start, stop) of the rows that FSDP2 gives to `rank`: equal chunks, the last ones smaller or empty."""
    chunk = -(-size // world_size)
    return min(rank * chunk, size), min((rank + 1) * chunk, size)


def _load_buffers(
    model: nn.Module, reader: CheckpointReader, factors: FactorSet, device: torch.device, mesh: DeviceMesh | None
) -> None:
    """Fill the OSFT layers' buffers, which FSDP2 does not shard, with this rank's rows."""
    rank, world_size = (mesh.get_local_rank(), mesh.size()) if mesh else (0, 1)

    def sharded(empty: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        # A copy, not a view of the mapped file, which would stay in memory whole and could change under training.
        rows = rows.to(device, copy=True)
        if mesh is None:
            return rows
        return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=empty.shape, stride=empty.stride())

    for name, layer in osft_layers(model):
        rows = reader.rows(f"{name}.weight", *local_rows(layer.out_features, rank, world_size))
        layer.base_weight = sharded(layer.base_weight, rows)
        if layer.frozen_basis is not None:
            rows = factors.rows(name, "frozen", *local_rows(layer.frozen_basis.shape[0], rank, world_size))
            layer.frozen_basis = sharded(layer.frozen_basis, rows)


@torch.no_grad()
def _load_parameters(
    model: nn.Module, reader: CheckpointReader, factors: FactorSet, rank: int, world_size: int
) -> None:
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        start, stop = local_rows(parameter.shape[0], rank, world_size)
        assert local.shape[0] == stop - start, f"{name}: FSDP2 shards rows differently than expected"
        is_osft = isinstance(model.get_submodule(owner), OSFTLinear)
        if is_osft and leaf == "coefficients":
            local.zero_()
        elif is_osft and leaf.endswith("_basis"):
            local.copy_(factors.rows(owner, leaf.removesuffix("_basis"), start, stop))
        elif name in reader:
            local.copy_(reader.rows(name, start, stop))
        else:
            raise ValueError(
                f"{reader.folder} stores no tensor {name}, although its architecture has it. Load the model once "
                "with AutoModelForCausalLM and save it with `save_pretrained` to get matching names"
            )


def save_merged(model: PreTrainedModel, reader: CheckpointReader, folder: Path, *, rank: int = 0) -> None:
    """Write the tuned model as a plain Hugging Face folder, in the dtypes of the model that it came from.

    Call it on every rank; rank 0 writes, one tensor at a time.
    """

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name not in reader:  # a basis or coefficients of an OSFT layer, or the second name of a tied weight
                continue
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if rank == 0:
                yield name, whole.detach().to("cpu", reader.dtype(name))

    if rank == 0:
        write_checkpoint(folder, gathered(), reader.folder)
    else:
        for _ in gathered():
            pass
