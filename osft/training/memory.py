"""How much memory a training process needs on its GPU, from the model's shapes alone.

What stays for the whole run is counted on the layers themselves, with the same division into rows that loading uses.
What the backward pass needs is counted too, not guessed: a forward pass on the meta device, which computes shapes and
no values, shows every tensor that autograd saves.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AttentionInterface, PreTrainedModel

from osft.data.packing import MicroBatch
from osft.models.likelihood import target_logits
from osft.models.loss_head import LOGITS_AT_ONCE
from osft.models.row_slices import ELEMENTS_AT_ONCE
from osft.process.private_names import set_attention
from osft.subspace.linear import OSFTLinear
from osft.subspace.model import osft_layers, share_input_bases
from osft.subspace.targets import transformer_blocks
from osft.training.sharded_model import gathered_dtype, local_rows

CONTEXT_BYTES = 2**30
"""Allowance for what CUDA and its libraries take before the first tensor: context, kernels, workspaces."""
NCCL_BYTES = 2**30
"""Allowance for the buffers of NCCL's communicators, with more than one process."""
FRAGMENTATION = 0.05
"""Allowance for what the caching allocator holds and cannot use, as a share of the tensors."""


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One part of the memory of a GPU."""

    name: str
    bytes: int
    explanation: str
    """How it is counted, in a sentence."""


class ResidentMemory:
    """What the first of some processes, which has no fewer rows than any other, holds from load to end, or gathers.

    The model, with its OSFT layers and on any device, is looked at once, for any number of processes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers = [layer for _, layer in osft_layers(model)]
        self._num_layers = len(layers)
        self._coefficients = _Tensors(layer.coefficients for layer in layers)
        self._bases = _Tensors(basis for layer in layers for basis in layer.bases())
        self._base_weights = _Tensors(layer.base_weight for layer in layers)
        self._frozen = _Tensors(layer.frozen_basis for layer in layers if layer.frozen_basis is not None)
        own = set().union(*(part.ids for part in (self._coefficients, self._bases, self._base_weights, self._frozen)))
        self._weights = _Tensors(parameter for parameter in model.parameters() if id(parameter) not in own)
        self._buffers = sum(buffer.nbytes for buffer in model.buffers() if id(buffer) not in own)
        self._gathered = _gathered_line(model)

    def lines(self, world_size: int = 1) -> list[MemoryLine]:
        """For one of `world_size` processes.

        Gradients and optimizer moments, which come with the first step, are counted with the coefficients.
        """
        shards = "all rows" if world_size == 1 else f"1/{world_size} of the rows"
        weights, base_weights, frozen = self._weights, self._base_weights, self._frozen
        return [
            MemoryLine(
                "weights", weights.shard(world_size), f"{weights.dtypes}, {shards} of every weight of the model"
            ),
            MemoryLine(
                "base weights",
                base_weights.shard(world_size),
                f"{base_weights.dtypes}, {shards} of the {self._num_layers} target weights as the checkpoint stores "
                "them; each step adds the update to them",
            ),
            MemoryLine(
                "bases",
                self._bases.shard(world_size),
                f"float32, {shards} of the unfrozen directions that the update is expressed in",
            ),
            MemoryLine(
                "frozen bases",
                frozen.shard(world_size),
                f"float32, {shards} of what keeps the long side of weights that are not square orthogonal to the "
                "frozen directions"
                if frozen.ids
                else "none: no weight has a side that needs a projection",
            ),
            MemoryLine(
                "coefficients",
                4 * self._coefficients.shard(world_size),
                f"16 bytes for each of {self._coefficients.numbers:,} trained numbers / {world_size}: float32 "
                "value, gradient and AdamW's two moments",
            ),
            MemoryLine(
                "buffers",
                self._buffers,
                "whole on every GPU: frequencies of rotary embeddings, curvatures of a split by inputs",
            ),
            self._gathered if world_size > 1 else MemoryLine("gathered by FSDP2", 0, "nothing: there is one process"),
        ]


class _Tensors:
    """Some tensors, by shape and dtype: a model of eighty blocks has a dozen kinds of them."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        found = {id(tensor): tensor for tensor in tensors}  # each once: layers share bases
        self.ids = set(found)
        self._kinds = Counter((tensor.shape, tensor.dtype) for tensor in found.values())

    @property
    def numbers(self) -> int:
        """In all of them."""
        return sum(count * shape.numel() for (shape, _), count in self._kinds.items())

    @property
    def dtypes(self) -> str:
        """Theirs, in words."""
        return " and ".join(sorted({str(dtype).removeprefix("torch.") for _, dtype in self._kinds})) or "none"

    def shard(self, world_size: int) -> int:
        """Bytes of the rows that the first process holds."""
        total = 0
        for (shape, dtype), count in self._kinds.items():
            start, stop = local_rows(shape[0], 0, world_size)
            total += count * (stop - start) * (shape.numel() // shape[0]) * dtype.itemsize
        return total


def _gathered_line(model: PreTrainedModel) -> MemoryLine:
    """What FSDP2 gathers from the other processes while it computes."""
    dtype = gathered_dtype(model)

    def gathered(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.numel() * (dtype or parameter.dtype).itemsize for parameter in parameters)

    blocks = [list(block.parameters()) for block in transformer_blocks(model)[1]]
    inside = {id(parameter) for block in blocks for parameter in block}
    root = gathered(parameter for parameter in model.parameters() if id(parameter) not in inside)
    # Of what is trained the values are not gathered.
    largest = max(gathered(parameter for parameter in block if not parameter.requires_grad) for block in blocks)
    trained = [[parameter for parameter in block if parameter.requires_grad] for block in blocks]
    gradients = max(gathered(block) for block in trained)
    reduced = max(sum(4 * parameter.numel() for parameter in block) for block in trained)
    return MemoryLine(
        "gathered by FSDP2",
        root + 2 * largest + gradients + reduced,
        f"whole: embeddings and head ({_mib(root)}), the largest block and the prefetched next one "
        f"(2 x {_mib(largest)}), a block's gradients ({_mib(gradients)}) and the float32 copy that is reduced "
        f"({_mib(reduced)})",
    )


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that the forward pass of one micro-batch saves for the backward pass, each storage counted once."""

    outside_blocks: int
    blocks: int
    """In all transformer blocks together, their inputs included."""
    block_inputs: int
    largest_block: int
    """In one block, without its input."""

    def total(self, *, gradient_checkpointing: bool) -> int:
        """With gradient checkpointing only the blocks' inputs stay, and one block is computed again at a time."""
        if gradient_checkpointing:
            return self.outside_blocks + self.block_inputs + self.largest_block
        return self.outside_blocks + self.blocks


def count_activations(model: PreTrainedModel, batch: MicroBatch) -> Activations:
    """Count what autograd saves of a forward pass up to the logits, without parameters and buffers.

    Model and batch are on the same device, meta or another. The logits and the loss are not counted.
    """
    fixed = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    size: dict[StorageWeakRef, int] = {}
    saved: dict[int | None, set[StorageWeakRef]] = {None: set()}
    inputs: set[StorageWeakRef] = set()
    block: int | None = None

    def count(tensor: torch.Tensor, into: set[StorageWeakRef]) -> None:
        storage = _storage(tensor)
        if storage not in fixed:
            size[storage] = tensor.untyped_storage().nbytes()
            into.add(storage)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        count(tensor, saved[block])
        return tensor

    def enter(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal block
            block = number
            count(args[0] if args else kwargs["hidden_states"], inputs)

        return hook

    def leave(*_: Any) -> None:
        nonlocal block
        block = None

    hooks = []
    for number, module in enumerate(transformer_blocks(model)[1]):
        saved[number] = set()
        hooks += [
            module.register_forward_pre_hook(enter(number), with_kwargs=True),
            module.register_forward_hook(leave),
        ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = target_logits(model.train(), batch)
    finally:
        for handle in hooks:
            handle.remove()
    del logits

    def total(storages: Iterable[StorageWeakRef]) -> int:
        return sum(size[storage] for storage in storages)

    outside = saved.pop(None)
    return Activations(
        outside_blocks=total(outside - inputs),
        blocks=total(inputs.union(*saved.values()) - (outside - inputs)),
        block_inputs=total(inputs),
        largest_block=max(total(own - inputs - outside) for own in saved.values()),
    )


def share_bases_of_inputs(model: PreTrainedModel, batch: MicroBatch) -> None:
    """Let layers that a forward pass gives the same input share the basis of a split by it, as loading does.

    Which they are is otherwise known from the statistics. Model and batch are on the same device, meta or another.
    """
    given: dict[str, list[torch.Tensor]] = {}

    def see(name: str) -> Callable[..., None]:
        return lambda _module, args: given.setdefault(name, []).append(args[0])

    by_inputs = {
        name: layer
        for name, layer in osft_layers(model)
        if isinstance(layer, OSFTLinear) and layer.split_kind in ("right", "left")
    }
    if not by_inputs:
        return
    hooks = [layer.register_forward_pre_hook(see(name)) for name, layer in by_inputs.items()]
    try:
        with torch.no_grad():
            target_logits(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
    share_input_bases(model, {name: tuple(id(tensor) for tensor in tensors) for name, tensors in given.items()})


def logits_line(model: PreTrainedModel, tokens: int, num_loss_tokens: int, *, loss_head: bool) -> MemoryLine:
    """The peak around the loss of so many tokens, of which some count: in its backward pass, or with a `LossHead`, in
    the head's forward pass.
    """
    head = model.get_output_embeddings().weight
    words, width = head.shape
    if loss_head:
        at_once = min(num_loss_tokens, max(1, LOGITS_AT_ONCE["cuda"] // words))
        slices = 8 * min(at_once * words, ELEMENTS_AT_ONCE)
        numbers = at_once * (words + 2 * width) + (tokens + num_loss_tokens) * width
        return MemoryLine(
            "logits",
            head.itemsize * numbers + slices + 16 * num_loss_tokens,
            f"of {at_once:,} loss tokens x {words:,} words at a time, {_Tensors([head]).dtypes}; {_mib(slices)} for "
            f"those of them in float32; the last hidden states, and the gradient of {num_loss_tokens:,} of them",
        )
    numbers = num_loss_tokens * words
    slices = 8 * min(numbers, ELEMENTS_AT_ONCE)
    return MemoryLine(
        "logits",
        2 * head.itemsize * numbers + slices,
        f"{num_loss_tokens:,} loss tokens x {words:,} words, {_Tensors([head]).dtypes}, and their gradient; "
        f"{_mib(slices)} for the rows that are in float32 at a time; tokens without loss have none",
    )


def allowance_line(tensor_bytes: int, world_size: int) -> MemoryLine:
    """What is not a tensor."""
    context = CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0)
    parts = "1 GiB for CUDA's context" + (", 1 GiB for NCCL" if world_size > 1 else "")
    return MemoryLine(
        "allowance",
        context + int(FRAGMENTATION * tensor_bytes),
        f"not counted but set aside: {parts} and {FRAGMENTATION:.0%} of the above for fragmentation",
    )


class _FusedAttention(torch.autograd.Function):
    """A fused kernel's output, in shape, and what such a kernel saves."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_zeros(batch, length, heads, value.shape[-1])
        log_sum_exp = query.new_zeros(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum_exp, bias)
        return output


def _flash(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any = None, **_: Any
) -> tuple[torch.Tensor, None]:
    return _FusedAttention.apply(query, key, value, None), None


def _sdpa(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any = None, **_: Any
) -> tuple[torch.Tensor, None]:
    """PyTorch's attention with the mask that keeps packed samples apart.

    The mask rules out grouped key and value heads, and each call turns it into a bias of its own.
    """
    length = query.shape[2]
    bias = query.new_zeros(1, 1, length, length)
    return _FusedAttention.apply(query, *_all_heads(query, key, value), bias), None


def _eager(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any = None, **_: Any
) -> tuple[torch.Tensor, None]:
    key, value = _all_heads(query, key, value)
    scores = torch.softmax(query @ key.mT, dim=-1, dtype=torch.float32).to(query.dtype)
    return (scores @ value).transpose(1, 2).contiguous(), None


def _all_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


# Registered without a mask function: transformers then makes no mask, which it cannot on the meta device.
for _name, _function in (("flash", _flash), ("sdpa", _sdpa), ("eager", _eager)):
    AttentionInterface.register(f"osft_counted_{_name}", _function)


def use_counted_attention(model: PreTrainedModel, attn_implementation: str) -> str:
    """Replace the attention of `model` by one that saves what `attn_implementation` saves, on any device.

    Returns its kind: "sdpa", "eager", or "flash" for every other, all of which keep no matrix of T x T numbers.
    """
    kind = attn_implementation if attn_implementation in ("sdpa", "eager") else "flash"
    set_attention(model.config, f"osft_counted_{kind}")
    with suppress(StrictDataclassError):  # a configuration that has to have one, whose model does not look for it
        model.config.pad_token_id = None  # else padding is looked for, in numbers that shapes do not have
    return kind


def _storage(tensor: torch.Tensor) -> StorageWeakRef:
    """What tells storages apart, on any device; while it is there, no other storage gets the address."""
    return StorageWeakRef(tensor.untyped_storage())


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
