"""Measuring the statistics of a model's layers on a text (`osft.subspace.statistics` says what they are).

A pass over the text is a forward pass, with gradients also a backward pass to the outputs of the layers and to no
weight. The sums of a layer cost n^2 numbers, and with gradients m^2, so a pass measures as many layers as there is
memory for, and there are as many passes as that takes. Every process of several takes its share of the text.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from tqdm import tqdm

from osft.data.chat import Sample
from osft.data.packing import Batching, Feeding, MicroBatch, collate, plan_micro_batches
from osft.models.cpu_linear import fast_linear_layers
from osft.models.likelihood import cross_entropy, target_logits
from osft.models.row_slices import row_slices
from osft.process.private_names import version_of
from osft.subspace.moment_sums import OUTPUT_TOKENS, MomentSums
from osft.subspace.statistics import Part, Statistics
from osft.subspace.targets import Target
from osft.subspace.watching import REMEDY, Use, watched
from osft.subspace.weight import local

PROBE_TOKENS = 16
"""Tokens that show which layers have the same input."""
_GROUP = 256
"""Tokens of the vocabulary whose probabilities are added up together."""
SHARE_OF_FREE_MEMORY = 0.25
"""What the sums of a pass may take."""


def measure(
    model: nn.Module,
    targets: Sequence[Target],
    samples: Sequence[Sample],
    *,
    feeding: Feeding,
    name: str = "base",
    source: str = "",
    model_sha256: str = "",
    gradients: bool = True,
    seed: int = 0,
    memory: int | None = None,
    onto: Statistics | None = None,
) -> Statistics:
    """The statistics of `targets` of a model over samples, the same for any batches and processes (`feeding`).

    The weights may be plain or in training (`OSFTLinear`). `name` and `source` say what the samples are. Without
    `gradients` only forward passes are made, and every s is 1. `seed` is that of the tokens that the model samples;
    those of a sample depend on its position in `samples` only. `memory`: bytes that the sums of a pass may take.

    `onto`: statistics of the same targets over other texts, to which these are added before anything is decomposed; one
    input of them is read at a time. Of several processes only rank 0 decomposes, and needs `onto`: what the others get
    has no inputs.

    Raises ValueError without samples, for a sample that no micro-batch can hold, for a target that no token
    reached, and, with the target's name, for statistics of other targets or shapes to add to.
    """
    shapes = {target.name: target.shape for target in targets}
    if onto is not None:
        before = {name for names in onto.layout for name in names}
        if different := sorted(before ^ shapes.keys()):
            raise ValueError(f"statistics of different targets do not add up: only one of them has {different[0]}")
    measured = measure_inputs(
        model,
        targets,
        samples,
        feeding=feeding,
        gradients=gradients,
        seed=seed,
        memory=memory,
    )
    inputs = []
    curvature = 0.0
    for sums in measured:
        curvature += _curvature(sums, shapes)
        if feeding.rank == 0:
            inputs.append(sums.statistics(onto.of(sums.targets) if onto is not None else None))
    part = Part(
        name=name,
        source=source,
        num_tokens=sum(len(sample.input_ids) for sample in samples),
        text_sha256=text_sha256(samples),
        model_sha256=model_sha256,
        weight_rms=_weight_rms(model, targets),
        mean_curvature=curvature / sum(math.prod(shape) for shape in shapes.values()),
    )
    return Statistics([*(onto.parts if onto is not None else ()), part], inputs)


def measure_inputs(
    model: nn.Module,
    targets: Sequence[Target],
    samples: Sequence[Sample],
    *,
    feeding: Feeding,
    gradients: bool,
    seed: int = 0,
    memory: int | None = None,
    output_tokens: int | None = None,
) -> Iterator[MomentSums]:
    """C, and with `gradients` each S, of one input after the other, on the device. Arguments as of `measure`.

    `output_tokens`: about how many tokens the shape of S is measured on, by default OUTPUT_TOKENS.
    """
    if not samples:
        raise ValueError("there is no sample to measure the layers' inputs on")
    plan = _plan(samples, feeding)
    num_tokens = sum(len(sample.input_ids) for sample in samples)
    draws = _Draws(seed, (output_tokens or OUTPUT_TOKENS) / num_tokens)
    shapes = {target.name: target.shape for target in targets}
    with _measuring(model):
        layout = _layout(model, targets, samples, feeding)
        passes = _passes(layout, targets, gradients, _common_memory(memory, feeding))
        with tqdm(
            total=len(passes) * sum(len(samples[i].input_ids) for chosen in plan for i in chosen),
            desc="measure",
            unit="token",
            mininterval=2.0,
            delay=5.0,  # seconds; a few samples need no line
            disable=feeding.rank > 0,
        ) as progress:
            for sums in passes:
                for chosen in plan:
                    _add(model, targets, sums, [samples[i] for i in chosen], chosen, feeding, gradients, draws)
                    progress.update(sum(len(samples[i].input_ids) for i in chosen))
                while sums:
                    one = sums.pop(0)
                    widths = {name: _widths(shapes[name], transposed=one.transposed)[1] for name in one.targets}
                    one.finish(num_tokens, feeding.world_size, widths)
                    yield one


def _plan(samples: Sequence[Sample], feeding: Feeding) -> list[list[int]]:
    """The samples of each of this process's micro-batches, of which all processes have as many.

    As `plan_micro_batches`, but only samples of one length share rows: no row is filled up, and all tokens count.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    max_tokens, rank, world_size = feeding.max_tokens, feeding.rank, feeding.world_size
    if feeding.batching is Batching.PACKED:
        return plan_micro_batches(lengths, max_tokens, world_size)[rank]
    bins = []
    for _, alike in groupby(sorted(range(len(samples)), key=lengths.__getitem__), key=lengths.__getitem__):
        positions = list(alike)
        (plan,) = plan_micro_batches([lengths[i] for i in positions], max_tokens, batching=feeding.batching)
        bins += [[positions[i] for i in chosen] for chosen in plan]
    bins += [[] for _ in range(-len(bins) % world_size)]
    return bins[rank::world_size]


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without a gradient for any weight."""
    training = model.training
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        with fast_linear_layers(model):
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        model.train(training)


def _layout(
    model: nn.Module,
    targets: Sequence[Target],
    samples: Sequence[Sample],
    feeding: Feeding,
) -> list[MomentSums]:
    """Which targets have the same input, in the model's order, seen in a forward pass over a few tokens."""
    seen: dict[str, list[tuple[Any, ...]]] = {target.name: [] for target in targets}
    held = []  # so that no other tensor gets the memory of one that is compared

    def observe(use: Use) -> torch.Tensor:
        inputs = use.inputs
        held.append(inputs)
        key = (inputs.data_ptr(), version_of(inputs), inputs.shape, inputs.stride(), use.transposed, use.expert)
        seen[use.target].append(key)
        return use.outputs

    first = samples[0].input_ids[:PROBE_TOKENS]
    with torch.no_grad(), watched(model, targets, observe):
        target_logits(model, _batch([Sample(first, first)], feeding))
    layout: dict[tuple[Any, ...], list[str]] = {}
    for name, uses in seen.items():
        if not uses:
            raise ValueError(f"no input reached {name}, so that nothing is known of it. {REMEDY}")
        layout.setdefault(tuple(uses), []).append(name)
    experts = {target.name: target.shape[0] if len(target.shape) == 3 else None for target in targets}
    return [MomentSums(tuple(names), uses[0][-2], experts[names[0]]) for uses, names in layout.items()]


def _passes(
    layout: Sequence[MomentSums], targets: Sequence[Target], gradients: bool, memory: int
) -> list[list[MomentSums]]:
    """The inputs that are measured in each pass; at least one."""
    shapes = {target.name: target.shape for target in targets}
    passes: list[list[MomentSums]] = []
    free = 0
    for sums in layout:
        inputs, _ = _widths(shapes[sums.targets[0]], transposed=sums.transposed)
        needed = 4 * (sums.num_experts or 1) * inputs**2
        if gradients and sums.num_experts is None:
            needed += 4 * sum(_widths(shapes[target], transposed=sums.transposed)[1] ** 2 for target in sums.targets)
        if not passes or needed > free:
            passes.append([])
            free = memory
        passes[-1].append(sums)
        free -= needed
    return passes


def _widths(shape: tuple[int, ...], *, transposed: bool) -> tuple[int, int]:
    """in_features and out_features of a weight, or of each in a stack."""
    first, second = shape[-2:]
    return (first, second) if transposed else (second, first)


def _add(
    model: nn.Module,
    targets: Sequence[Target],
    sums: Sequence[MomentSums],
    samples: Sequence[Sample],
    positions: Sequence[int],
    feeding: Feeding,
    gradients: bool,
    draws: "_Draws",
) -> None:
    """Add what some samples contribute; none of them for a process that has nothing to do but go along."""
    owner = {name: one for one in sums for name in one.targets}
    chosen = [target for target in targets if target.name in owner]
    leaves: list[torch.Tensor] = []
    batch = _batch(samples, feeding)
    uniforms, drawn = draws.of(samples, positions, batch)

    def observe(use: Use) -> torch.Tensor:
        one, outputs = owner[use.target], use.outputs
        one.add_inputs(use, counts=bool(samples))
        if not gradients:
            return outputs
        # A block that turns gradients off, to choose tokens to attend to, has none: its energy stays 0.
        if not outputs.requires_grad and torch.is_grad_enabled():  # what comes before needs no gradient
            leaves.append(outputs.detach().requires_grad_())
            outputs = leaves[-1].clone()  # a leaf could not be changed in place
        add_gradient = one.gradient_hook(use, drawn, counts=bool(samples))
        if outputs.requires_grad:
            outputs.register_hook(add_gradient)
        return outputs

    with torch.set_grad_enabled(gradients), watched(model, chosen, observe):
        logits = target_logits(model, batch)
        if leaves:
            tokens = sample_tokens(logits.detach(), uniforms)
            torch.autograd.backward(cross_entropy(logits, tokens).sum(), inputs=leaves)


def _batch(samples: Sequence[Sample], feeding: Feeding) -> MicroBatch:
    """A micro-batch in which the output at every token counts, that at the last one of a sample, too."""
    batch = collate(samples, feeding.batching)
    (everywhere,) = batch.is_token.flatten().nonzero(as_tuple=True)
    return replace(batch, loss_positions=everywhere).to(feeding.device)


@dataclass(frozen=True, slots=True)
class _Draws:
    """What is drawn for each token of a text. For those of a sample it depends on its position in the text only."""

    seed: int
    share: float
    """Of the tokens that S is measured on."""

    def of(
        self, samples: Sequence[Sample], positions: Sequence[int], batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A random number in [0, 1) for each token, float64, and which of the batch's places, (places,), S is of."""
        # A process without samples has a place, too.
        numbers = torch.zeros(2, len(batch.loss_positions), dtype=torch.float64)
        if samples:
            each = [
                np.random.default_rng([self.seed, position]).random((2, len(sample.input_ids)))
                for sample, position in zip(samples, positions, strict=True)
            ]
            numbers = torch.from_numpy(np.concatenate(each, axis=1))
        uniforms, others = numbers.to(batch.is_token.device)
        drawn = batch.is_token.flatten().clone()
        drawn[batch.loss_positions] = others < self.share
        return uniforms, drawn


def sample_tokens(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """A token of each row's softmax, (L,) int64, at the given quantile of its distribution.

    logits: (L, vocabulary), any float dtype; uniforms: (L,), float64, in [0, 1).
    """
    drawn = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    # In two steps, for a sum up to each token takes long: first to a group of tokens, and then to the token in it.
    for rows in row_slices(logits):
        probabilities = logits[rows].float().softmax(-1)
        if missing := -logits.shape[1] % _GROUP:
            probabilities = F.pad(probabilities, (0, missing))
        probabilities = probabilities.unflatten(-1, (-1, _GROUP))
        ends = probabilities.sum(-1).cumsum(-1, dtype=torch.float64)
        quantile = uniforms[rows, None] * ends[:, -1:]
        group = torch.searchsorted(ends, quantile, right=True).clamp_max(ends.shape[1] - 1)
        begins = F.pad(ends, (1, 0)).gather(1, group)
        within = probabilities.take_along_dim(group[..., None], 1)[:, 0].cumsum(-1, dtype=torch.float64)
        position = torch.searchsorted(within, quantile - begins, right=True).clamp_max(_GROUP - 1)
        drawn[rows] = (group * _GROUP + position)[:, 0].clamp_max(logits.shape[1] - 1)
    return drawn


def text_sha256(samples: Sequence[Sample]) -> str:
    """Hash of the samples' tokens."""
    return hashlib.sha256(json.dumps([sample.input_ids for sample in samples]).encode()).hexdigest()


def _common_memory(memory: int | None, feeding: Feeding) -> int:
    """Bytes that every process can spare."""
    if memory is None:
        if feeding.device.type == "cuda":
            free = torch.cuda.mem_get_info(feeding.device)[0]
        else:
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes
        memory = int(SHARE_OF_FREE_MEMORY * free)
    if feeding.world_size == 1:
        return memory
    least = torch.tensor(memory, device=feeding.device)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return int(least)


@torch.no_grad()
def _weight_rms(model: nn.Module, targets: Sequence[Target]) -> float:
    """Root mean square of all target weights, over all processes' parts of them."""
    from accelerate.utils import align_module_device

    total = torch.zeros((), dtype=torch.float64)
    is_sharded = False
    for target in targets:
        owner, _, leaf = target.tensor.rpartition(".")
        module = model.get_submodule(owner)
        with align_module_device(module):  # what is elsewhere until it computes
            weight = module.get_parameter(leaf)
            total = total.to(weight.device) + local(weight).double().square().sum()
            is_sharded = isinstance(weight, DTensor)
    if is_sharded:
        torch.distributed.all_reduce(total)
    return float(total / sum(math.prod(target.shape) for target in targets)) ** 0.5


def _curvature(sums: MomentSums, shapes: dict[str, tuple[int, ...]]) -> float:
    """Sum of s * c over all entries of the weights that read an input."""
    trace = sums.trace()
    return sum(
        float((energy * trace).sum()) * _widths(shapes[target], transposed=sums.transposed)[1]
        for target, energy in sums.gradient_energies().items()
    )
