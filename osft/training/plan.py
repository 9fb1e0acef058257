"""What a training run would do, from its settings, its data and the model's config.json: `dry_run` of `osft()`.

No weights are read, no process is started and nothing is written.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from osft.data.chat import Sample
from osft.data.packing import Batching, collate
from osft.data.selection import selection_size
from osft.models.loading import empty_model, model_folder
from osft.models.packed_attention import has_kernel
from osft.process.private_names import attention_of
from osft.settings.schedule import warmup_warning
from osft.settings.training import TrainConfig
from osft.subspace.decomposition import SplitKind, split_of_inputs, unfrozen_rank
from osft.subspace.model import inject_empty, osft_layers
from osft.subspace.preflight import Preflight
from osft.subspace.rank_allocation import allocate_ranks
from osft.subspace.targets import Target, select_targets
from osft.training.data_counts import DataCounts, count_data
from osft.training.loop import num_steps
from osft.training.memory import (
    FRAGMENTATION,
    Activations,
    MemoryLine,
    ResidentMemory,
    allowance_line,
    count_activations,
    logits_line,
    share_bases_of_inputs,
    use_counted_attention,
)
from osft.training.prepare import check_model

GPUS_PER_NODE = 8
"""Where nproc_per_node is no number."""
MAX_GPUS = 4096
"""Beyond, what is sharded weighs nothing."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """The peak on one GPU of so many."""

    gpus: int
    lines: tuple[MemoryLine, ...]

    @property
    def bytes(self) -> int:
        """The sum of the lines."""
        return sum(line.bytes for line in self.lines)


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What a run with these settings would do."""

    model_path: str
    preflight: Preflight
    """How the model's samples are fed."""
    data: DataCounts
    steps: int
    """Optimizer steps."""
    epochs: int
    effective_batch_size: int
    trainable_parameters: int
    total_parameters: int
    num_target_weights: int
    ranks: tuple[int, int]
    """Fewest and most unfrozen directions of a target weight."""
    memory: tuple[MemoryEstimate, ...]
    """Per GPU, for the numbers of GPUs that were asked for and for the smallest that suffices."""
    gpu_memory_gib: float
    smallest_fit: int | None
    """The number of GPUs that suffices; None if no number does."""
    activations_counted: bool
    """False for an architecture that cannot be computed on shapes alone: the memory is then without activations."""
    notes: tuple[str, ...]
    """What to know about the numbers, and what to change where they are too large."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"memory": [asdict(estimate) | {"bytes": estimate.bytes} for estimate in self.memory]}

    def facts(self) -> list[tuple[str, str]]:
        """The counts, as names and texts."""
        data, about = self.data, "" if self.data.exact else "about "
        if data.tokens is None:
            samples, tokens = f"at most {data.samples:,}", "unknown: the model's folder has no tokenizer"
            steps = f"at most {self.steps:,}"
        else:
            samples = f"{about}{data.samples:,}; {about}{data.dropped_samples:,} more are too long and dropped"
            tokens = f"{about}{data.tokens:,}, {about}{data.loss_tokens:,} of them with loss"
            steps = f"{about}{self.steps:,}"
        low, high = self.ranks
        share = self.trainable_parameters / self.total_parameters
        return [
            ("samples", f"{samples} (per epoch)"),
            ("tokens", f"{tokens} (per epoch)"),
            ("batches", self.preflight.text()),
            ("steps", f"{steps} of {self.effective_batch_size:,} samples, epochs: {self.epochs}"),
            ("parameters", f"{self.trainable_parameters:,} trainable of {self.total_parameters:,} ({share:.1%})"),
            (
                "rank",
                f"{low:,}{'' if low == high else f' to {high:,}'} unfrozen directions in each of "
                f"{self.num_target_weights:,} weights",
            ),
        ]

    def verdict(self) -> str:
        """Whether, and on how many GPUs, the run fits."""
        if self.smallest_fit is None:
            return f"It fits on no number of GPUs of {self.gpu_memory_gib:g} GiB."
        without = "" if self.activations_counted else ", without the activations, which could not be counted"
        return f"It fits on {_gpus(self.smallest_fit)} of {self.gpu_memory_gib:g} GiB (estimated{without})."

    def __repr__(self) -> str:
        lines = [f"TrainingPlan of {self.model_path}"]
        lines += [f"  {name:<11} {text}" for name, text in self.facts()]
        lines += ["  GiB per GPU ".ljust(22) + "".join(f"{_gpus(e.gpus):>10}" for e in self.memory)]
        for row in zip(*(estimate.lines for estimate in self.memory), strict=True):
            lines.append(f"    {row[0].name:<18}" + "".join(f"{gib(line.bytes):>10}" for line in row))
        lines += ["    sum".ljust(22) + "".join(f"{gib(estimate.bytes):>10}" for estimate in self.memory)]
        return "\n".join([*lines, f"  {self.verdict()}", *(f"  {note}" for note in self.notes)])


def plan(config: TrainConfig, *, gpu_memory_gib: float = 80.0) -> TrainingPlan:
    """Count what training would take.

    `gpu_memory_gib` is the memory of a GPU in GiB (2^30 bytes). The model's folder may hold nothing but config.json;
    the number of tokens is then unknown.

    Raises FileNotFoundError for missing inputs, DataError for a record that cannot be used, ValueError for settings
    that cannot work and models that cannot be trained, as training itself.
    """
    folder = model_folder(config.model_path, weights=False)
    found = check_model(config, folder)
    model, total_parameters, notes = described_model(config, folder)
    data = count_data(config, folder)
    if data.tokens is None:
        bound = data.samples * config.max_seq_len
        notes.append(
            f"Tokens are unknown without a tokenizer; at most {bound:,} in an epoch, max_seq_len={config.max_seq_len} "
            "in each sample."
            if not config.is_pretraining
            else "Tokens and blocks are unknown without a tokenizer: samples and steps count documents."
        )
    elif not data.exact:
        notes.append(f"Samples and tokens are extrapolated from {data.counted:,} records.")

    held_out = selection_size(data.samples, config.selection_samples) if config.fit_step else 0
    if held_out:
        notes.append(f"fit_step holds out about {held_out:,} of the samples, which are not trained on.")
    steps = num_steps(data.samples - held_out, config)
    warning = warmup_warning(config.warmup_steps, steps)
    if warning:
        notes.insert(0, warning)

    layers = [layer for _, layer in osft_layers(model)]
    fixed, activations, problem = lines_of_tokens(model, config, found, data.largest_loss_share)
    if problem:
        notes.insert(0, f"The memory is without activations, and so too small: {problem}.")
    resident = ResidentMemory(model)
    sizes = [memory_estimate(resident, gpus, fixed) for gpus in _sizes(config)]
    smallest = next((e.gpus for e in sizes if e.bytes <= gpu_memory_gib * 2**30), None)
    columns = {*_asked_for(config), *([smallest] if smallest else [])}
    if smallest is None:
        notes.append(_remedy(sizes[-1], config, gpu_memory_gib))
    if activations and not config.gradient_checkpointing and smallest != 1:
        less = activations.total(gradient_checkpointing=False) - activations.total(gradient_checkpointing=True)
        fewer = next((e.gpus for e in sizes if e.bytes - (1 + FRAGMENTATION) * less <= gpu_memory_gib * 2**30), None)
        if fewer and fewer != smallest:
            notes.append(f"With gradient_checkpointing=True, {gib(less)} GiB less, it fits on {_gpus(fewer)}.")
    ranks = [layer.rank for layer in layers]
    return TrainingPlan(
        model_path=config.model_path,
        preflight=found,
        data=data,
        steps=steps,
        epochs=config.num_epochs,
        effective_batch_size=config.effective_batch_size,
        trainable_parameters=sum(layer.coefficients.numel() for layer in layers),
        total_parameters=total_parameters,
        num_target_weights=len(layers),
        ranks=(min(ranks), max(ranks)),
        memory=tuple(memory_estimate(resident, gpus, fixed) for gpus in sorted(columns)),
        gpu_memory_gib=gpu_memory_gib,
        smallest_fit=smallest,
        activations_counted=activations is not None,
        notes=tuple(notes),
    )


def lines_of_tokens(
    model: PreTrainedModel, config: TrainConfig, preflight: Preflight, loss_share: float
) -> tuple[list[MemoryLine], Activations | None, str]:
    """Activations and logits of a micro-batch of which `loss_share` has a loss, on any number of GPUs.

    model: on the meta device; its layers then share bases as a loaded one's do. Returns the activations, too, or None
    and why they could not be counted.
    """
    attention = config.attn_implementation or attention_of(model.config)
    by_kernel = has_kernel(preflight.attention, model.dtype)
    if attention == "sdpa" and (by_kernel or preflight.batching is Batching.PADDED):
        attention = "flash"  # a row that holds one sample needs no mask, and SDPA without one saves as little
    kind = use_counted_attention(model, attention)
    tokens = config.max_tokens_per_gpu
    batch = collate([Sample([0] * tokens, [0] * tokens)], preflight.batching).to("meta")
    activations, problem = None, ""
    try:
        share_bases_of_inputs(model, batch)
        activations = count_activations(model, batch)
    except Exception as error:  # of an architecture that computes with numbers or masks, which shapes do not have
        problem = f"{type(model).__name__} cannot be computed on shapes alone ({type(error).__name__}: {error})"
    lines = [
        _activations_line(activations, config, kind, by_kernel=by_kernel),
        logits_line(model, tokens, math.ceil(loss_share * tokens), loss_head=preflight.loss_head),
    ]
    return lines, activations, problem


def memory_estimate(resident: ResidentMemory, gpus: int, fixed: Sequence[MemoryLine]) -> MemoryEstimate:
    """The peak on one of `gpus` GPUs; `fixed`: `lines_of_tokens`."""
    lines = [*resident.lines(gpus), *fixed]
    return MemoryEstimate(gpus, (*lines, allowance_line(sum(line.bytes for line in lines), gpus)))


def described_model(config: TrainConfig, folder: Path) -> tuple[PreTrainedModel, int, list[str]]:
    """The model with its OSFT layers on the meta device, its number of parameters without them, and notes."""
    notes = []
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{config.model_path} is not a model folder: it has no config.json")
    stored_dtype = (
        AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code).get_text_config().dtype
        or torch.float32
    )
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    # The kernels of flash attention need not be installed where a run is planned.
    build_with = config.attn_implementation if config.attn_implementation in ("sdpa", "eager", None) else "eager"
    with torch.device("meta"):
        model = empty_model(
            folder, dtype=dtype, attn_implementation=build_with, trust_remote_code=config.trust_remote_code
        )
        total_parameters = sum(parameter.numel() for parameter in model.parameters())
        targets = select_targets(model, config.target_patterns)
        ranks, split_kinds = _planned_split(model, targets, config)
        inject_empty(
            model,
            targets,
            ranks,
            split_kinds=split_kinds,
            base_dtypes={target.name: stored_dtype for target in targets},
        )
    if config.rank_allocation == "adaptive":
        notes.append("Ranks are those of the uniform ratio; rank_allocation='adaptive' moves them between layers.")
    return model, total_parameters, notes


def _planned_split(
    model: PreTrainedModel, targets: Sequence[Target], config: TrainConfig
) -> tuple[dict[str, int], dict[str, SplitKind]]:
    """Ranks and kinds of split by target, as far as they are known without weights and statistics.

    Which side experts' inputs are on is seen when they are measured; here they count as stored (out, in).
    """
    if config.protect == "weights":
        ranks = allocate_ranks(targets, config.subspace.replace(rank_allocation="uniform"))
        return ranks, dict.fromkeys(ranks, config.free_subspace)
    split_kinds: dict[str, SplitKind] = {}
    for target in targets:
        is_transposed = target.name != target.tensor and isinstance(model.get_submodule(target.name), Conv1D)
        split_kinds[target.name] = split_of_inputs(transposed=is_transposed)
    return {
        target.name: unfrozen_rank(target.shape, config.unfreeze_rank_ratio, split_kinds[target.name])
        for target in targets
    }, split_kinds


def _activations_line(
    activations: Activations | None, config: TrainConfig, kind: str, *, by_kernel: bool
) -> MemoryLine:
    if activations is None:
        return MemoryLine("activations", 0, "not counted: the architecture cannot be computed on shapes alone")
    tokens = config.max_tokens_per_gpu
    if config.gradient_checkpointing:
        parts = "with gradient checkpointing: each block's input, and one block computed again"
    else:
        parts = "every tensor that the forward pass saves for the backward pass"
    mask = f"{tokens:,} x {tokens:,} numbers {'in that block' if config.gradient_checkpointing else 'in each block'}"
    if kind == "sdpa":
        parts += f"; SDPA keeps a mask of packed samples, {mask}; flash_attention_2 keeps none"
    elif by_kernel:
        parts += (
            "; packed samples are computed by flash-attn where it is installed, else by PyTorch's varlen kernel, which "
            f"keep no mask; a GPU on which neither works takes SDPA with a mask, {mask}"
        )
    return MemoryLine(
        "activations",
        activations.total(gradient_checkpointing=config.gradient_checkpointing),
        f"one micro-batch of {tokens:,} tokens, counted on the model: {parts}",
    )


def _asked_for(config: TrainConfig) -> set[int]:
    """The numbers of GPUs to show: the given one, or a single GPU and a whole node."""
    if isinstance(config.nproc_per_node, int):
        return {config.nproc_per_node * config.nnodes}
    return {1, GPUS_PER_NODE} if config.nnodes == 1 else {GPUS_PER_NODE * config.nnodes}


def _sizes(config: TrainConfig) -> list[int]:
    """1, 2, 4, … GPUs of a node, then 1, 2, 4, … whole nodes."""
    node = config.nproc_per_node if isinstance(config.nproc_per_node, int) else GPUS_PER_NODE
    within = [2**power for power in range(node.bit_length()) if 2**power < node]
    return within + [node * 2**power for power in range(13) if node * 2**power <= MAX_GPUS]


def _remedy(largest: MemoryEstimate, config: TrainConfig, gpu_memory_gib: float) -> str:
    """What to lower where no number of GPUs is enough."""
    by_tokens = sum(line.bytes for line in largest.lines if line.name in ("activations", "logits"))
    room = gpu_memory_gib * 2**30 - (largest.bytes - by_tokens)
    if room <= 0:
        return "The gathered weights alone are too much for such a GPU: take one with more memory."
    tokens = int(config.max_tokens_per_gpu * room / by_tokens)  # they grow with the tokens, or faster
    return (
        f"Activations and logits alone are too much: {gib(by_tokens)} GiB, which more GPUs do not divide. Lower "
        f"max_tokens_per_gpu from {config.max_tokens_per_gpu:,} to about {tokens:,}."
    )


def gib(size: int) -> str:
    """Bytes as GiB, two decimals."""
    return f"{size / 2**30:,.2f}"


def _gpus(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"
