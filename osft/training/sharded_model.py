"""The model that a training process holds: its rows of every weight, read straight from disk.

On one process the tensors are plain; on several, FSDP2 shards each transformer block by rows. The whole model is
never in one process's memory, neither when it is loaded nor when it is saved (`osft.training.saving`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from osft.models.checkpoint import CheckpointReader
from osft.models.conversion import ModelWeights
from osft.models.gated_mlp import use_gated_product
from osft.models.loading import empty_model
from osft.models.loss_head import LossHead
from osft.models.packed_attention import AttentionShape, use_kernel
from osft.models.weight_files import check_finite
from osft.process.private_names import hand_out_unread, map_tensors
from osft.settings.training import TrainConfig
from osft.subspace.factor_set import FactorSet, check_settings, check_weights, load_factor_set
from osft.subspace.model import inject_empty, osft_layers, share_input_bases
from osft.subspace.targets import select_targets, transformer_blocks
from osft.subspace.weight import local
from osft.training.compiling import compile_blocks


def load_sharded(
    config: TrainConfig,
    model_path: str | Path,
    factors_path: str | Path,
    *,
    device: torch.device,
    mesh: DeviceMesh | None = None,
    attention: Sequence[AttentionShape] = (),
    loss_head: bool = False,
) -> tuple[PreTrainedModel, ModelWeights]:
    """The model of a folder, its targets split as a factor set says, on `device`; sharded over `mesh` if given.

    attention: as of `osft.models.loading.load_model`. loss_head: whether the model can have a `LossHead`.
    Returns the checkpoint that it came from, too. Raises FactorsMismatchError if the factors are not those of the
    model's weights, ValueError if the checkpoint lacks a tensor of the model.
    """
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(config.dtype) or getattr(
        torch, config.dtype
    )
    reader = CheckpointReader(model_path)
    model = empty_model(
        model_path,
        dtype=dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    stored = ModelWeights(reader, model)
    _untie_what_is_stored_apart(model, stored)
    targets = select_targets(model, config.subspace.target_patterns)
    factors = load_factor_set(factors_path, check=False)  # the launcher did
    check_settings(factors, config.subspace, targets)
    rank, world_size = (mesh.get_local_rank(), mesh.size()) if mesh else (0, 1)
    check_weights(factors, stored, targets[rank::world_size])  # each process reads its share, together all of them

    inject_empty(
        model,
        targets,
        factors.ranks,
        split_kinds=factors.split_kinds,
        base_dtypes={target.name: stored.dtype(target.tensor) for target in targets},
        stiffness=config.stiffness,
    )
    if config.protect == "activations":
        share_input_bases(model, {name: weight.file for name, weight in factors.weights.items()})
    if loss_head:
        LossHead.take_place_in(model)
    if device.type == "cpu":
        use_gated_product(model, checkpointed=config.gradient_checkpointing)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.torch_compile:
        compile_blocks(model)
    ties = _ties(model)
    if mesh:
        policy = MixedPrecisionPolicy(gathered_dtype(model), reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in transformer_blocks(model)[1]:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    _load_bases(model, stored, factors, device, mesh)
    map_tensors(model, lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    for first, *others in ties:  # the line above makes two of a tied weight
        for other in others:
            owner, _, leaf = other.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(first))
    if mesh:
        hand_out_unread(model, (layer.coefficients for _, layer in osft_layers(model)))
    _load_tensors(model, stored, factors, rank, world_size)
    use_kernel(model, attention, device)
    return model, stored


def gathered_dtype(model: nn.Module) -> torch.dtype | None:
    """In which FSDP2 gathers bases, kept in float32, and gets the gradients of coefficients; None: as they are.

    It is the weights' own, in which the layers compute with them: half the bytes in bfloat16, and one cast a shard.
    The gradients are added up in float32. None of a model whose weights have several: the others would be cast, too.
    """
    own = {id(each) for _, layer in osft_layers(model) for each in (layer.coefficients, *layer.bases())}
    dtypes = {parameter.dtype for parameter in model.parameters() if id(parameter) not in own}
    return dtypes.pop() if len(dtypes) == 1 else None


def local_rows(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """[start, stop) of the rows (or experts) that FSDP2 gives to `rank`: equal chunks, the last smaller or empty."""
    chunk = -(-size // world_size)
    return min(rank * chunk, size), min((rank + 1) * chunk, size)


def _ties(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tied for tied in names.values() if len(tied) > 1]


def _untie_what_is_stored_apart(model: nn.Module, stored: ModelWeights) -> None:
    """Make two of a tied parameter for which the checkpoint has two different tensors, as `from_pretrained` does."""
    for first, *others in _ties(model):
        for other in others:
            if first in stored and other in stored and stored.sha256(first) != stored.sha256(other):
                owner, _, leaf = other.rpartition(".")
                own = nn.Parameter(torch.empty_like(model.get_parameter(first)), requires_grad=False)
                setattr(model.get_submodule(owner), leaf, own)


def _load_bases(
    model: nn.Module, stored: ModelWeights, factors: FactorSet, device: torch.device, mesh: DeviceMesh | None
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
        base, frozen = layer.base_weight, layer.frozen_basis
        rows = stored.rows(name + layer.tensor_suffix, *local_rows(base.shape[0], rank, world_size))
        layer.base_weight = sharded(base, rows)
        if frozen is not None:
            rows = factors.rows(name, "frozen", *local_rows(frozen.shape[0], rank, world_size))
            layer.frozen_basis = sharded(frozen, rows)
        if layer.curvature is not None:
            curvature = factors.curvature(name)
            assert curvature is not None, "a split by inputs has one"
            is_sharded = curvature.shape[0] == layer.coefficients.shape[0]  # else one row for all of X
            rows = curvature[slice(*local_rows(curvature.shape[0], rank, world_size))] if is_sharded else curvature
            layer.curvature = sharded(layer.curvature, rows) if is_sharded else rows.to(device)


@torch.no_grad()
def _load_tensors(model: nn.Module, stored: ModelWeights, factors: FactorSet, rank: int, world_size: int) -> None:
    """Fill all parameters and the buffers that the checkpoint has."""
    loaded: set[int] = set()

    def fill_(name: str, parameter: nn.Parameter, rows: Callable[[int, int], torch.Tensor]) -> None:
        start, stop = local_rows(parameter.shape[0], rank, world_size)
        part = local(parameter)
        assert part.shape[0] == stop - start, f"{name}: FSDP2 shards rows differently than expected"
        values = rows(start, stop)
        check_finite(name, values, stored.folder)
        part.copy_(values)
        loaded.add(id(parameter))

    for name, layer in osft_layers(model):
        local(layer.dense_weight()).copy_(local(layer.base_weight))
        local(layer.coefficients).zero_()
        loaded |= {id(layer.dense_weight()), id(layer.coefficients)}
        for side, basis in (("left", layer.left_basis), ("right", layer.right_basis)):
            if basis is not None and id(basis) not in loaded:
                fill_(f"{name}: {side} basis", basis, partial(factors.rows, name, side))
    for name, parameter in model.named_parameters(remove_duplicate=False):  # of a tied one whichever name is stored
        if name in stored and id(parameter) not in loaded:
            fill_(name, parameter, partial(stored.rows, name))
    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(stored.tensor(name))
    for name, parameter in model.named_parameters():
        if id(parameter) not in loaded:
            stored.require(name)
