"""One training process. Started by torchrun's agent: `python -m osft.training.worker WORK.json`."""

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor

from osft.data.dataset_folder import load_split, open_dataset
from osft.data.packing import Feeding
from osft.data.samples import JoinedSamples, SampleList, Samples, SubsetOfSamples
from osft.models.checkpoint import tensor_sha256
from osft.models.conversion import ModelWeights
from osft.models.low_rank import effective_rank
from osft.models.origin import Origin, read_origin
from osft.models.training_summary import (
    PreflightResult,
    ReplaySource,
    ReplaySummary,
    SavedUpdate,
    TrainingSummary,
    WeightSummary,
)
from osft.process import logs
from osft.process.errors import noted
from osft.process.termination import end_with_parent
from osft.settings.schedule import warmup_warning
from osft.settings.training import TrainConfig
from osft.storage.atomic import write_json
from osft.storage.sealed import write_sealed
from osft.subspace.decomposition import SplitKind, num_directions
from osft.subspace.factor_set import SplitWeight, load_factor_set
from osft.subspace.model import osft_layers
from osft.subspace.preflight import Preflight
from osft.subspace.statistics_store import stored_output_moments
from osft.training.checkpointing import Checkpointer
from osft.training.identity import MADE_OF
from osft.training.liger import apply_liger
from osft.training.loop import Position, StepMetrics, num_steps, run
from osft.training.mirror import METRICS, SUMMARY, Mirror
from osft.training.own_text import read_own_text
from osft.training.predicted_drift import DriftPrediction
from osft.training.prepare import wants_validation
from osft.training.progress import Progress
from osft.training.resume import metrics_sha256, model_files
from osft.training.round_statistics import RoundStatistics
from osft.training.sampled_drift import sample_drift_of_run
from osft.training.sharded_model import load_sharded
from osft.training.state import load_state, read_position

logger = logging.getLogger("osft.training.worker")  # whose __name__ is "__main__"


@record
def main() -> None:
    """Do what the file says that the launcher wrote."""
    logs.configure(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    with noted():
        work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        end_with_parent(work["launcher"])
        train_process(work)


def train_process(work: dict[str, Any]) -> None:
    """Load, train, save; rank 0 writes metrics, models and, last, the summary."""
    config = TrainConfig(**work["config"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _device()
    mesh = None
    if world_size > 1:
        timeout = timedelta(minutes=config.process_group_timeout_minutes)
        torch.distributed.init_process_group(timeout=timeout)  # gloo on CPUs, NCCL on CUDA
        mesh = init_device_mesh(device.type, (world_size,))
        _check_same_inputs(work)
    if config.deterministic or device.type == "cpu":  # which loses nothing by it
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    output, dataset = Path(work["output"]), Path(work["dataset"])
    started = time.perf_counter()

    preflight = Preflight.from_dict(work["preflight"])
    feeding = Feeding(
        max_tokens=config.max_tokens_per_gpu,
        device=device,
        batching=preflight.batching,
        rank=rank,
        world_size=world_size,
    )
    # A GPU's kernels for packed samples take no mask.
    steps_feeding = replace(feeding, batching=preflight.shared_batching) if device.type == "cpu" else feeding
    new, selection = new_samples(dataset, work["selection"])
    replay = Path(work["replay"]) if work["replay"] else None
    samples = JoinedSamples([new, load_split(replay, "train")]) if replay else new
    validation = load_split(dataset, "validation") if wants_validation(config) else None
    model, stored = load_sharded(
        config,
        work["model"],
        work["factors"],
        device=device,
        mesh=mesh,
        attention=preflight.attention,
        loss_head=preflight.loss_head,
    )
    if work["liger"]:
        apply_liger(model)
    lock = Path(work["lock"]) if work["lock"] else None
    mirror = Mirror(config.ckpt_output_dir, output, rank=rank, lock=lock)
    factors = load_factor_set(work["factors"], check=False)
    statistics = prediction = None
    if work["statistics"]:
        assert factors.unit is not None, "of a set that was computed from statistics"
        statistics = RoundStatistics(
            config,
            model,
            new,
            folder=Path(work["model"]),
            data_uri=open_dataset(dataset).statistics["data_uri"],
            start=work["statistics"],
            feeding=feeding,
        )
        prediction = DriftPrediction(model, unit=factors.unit, output_moments=stored_output_moments(work["statistics"]))
    checkpointer = Checkpointer(
        config,
        model,
        stored,
        mirror,
        samples=new,
        dataset=dataset,
        replay=replay,
        statistics=statistics,
        factors=work["factor_set"],
        made_of=work["made_of"],
        feeding=feeding,
    )
    state = Path(work["state"]) if work["state"] else None
    position = Position.of(read_position(state)) if state else Position()
    text = read_own_text(Path(work["text"])) if work["text"] else None
    loaded = time.perf_counter()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for name, p in model.named_parameters() if name in stored)
    total_steps = num_steps(len(samples.lengths), config)
    steps: list[StepMetrics] = []
    if rank == 0:
        targets = [name + layer.tensor_suffix for name, layer in osft_layers(model)]
        logger.info(f"train: {_start(stored, targets)}")
        warning = warmup_warning(config.warmup_steps, total_steps)
        if warning:
            logger.warning(f"train: {warning}")
        logger.info(f"train: {trainable:,} trainable of {total:,} parameters, {world_size} x {device}")
    with (
        mirror,
        Progress(total_steps, output / METRICS, done=position.step, enabled=rank == 0) as progress,
    ):

        def on_step(metrics: StepMetrics) -> None:
            steps.append(metrics)
            progress.advance(metrics)

        fitted = run(
            model,
            samples,
            config,
            feeding=steps_feeding,
            on_step=on_step,
            validation=validation,
            text=text,
            selection=selection,
            prediction=prediction,
            checkpointer=checkpointer,
            position=position,
            restore=(lambda optimizer: load_state(state, model, optimizer)) if state else None,
        )
    seconds = time.perf_counter() - loaded
    if rank == 0 and fitted:
        logger.info(f"train: {fitted.line()}")

    # Of an update, the norm is that of its coefficients, because the bases are orthonormal.
    norms = {name: (_norm(layer.base_weight), _norm(layer.coefficients)) for name, layer in osft_layers(model)}
    effective_ranks = _effective_ranks(model, rank, world_size)
    predicted = prediction.by_target() if prediction else {}
    sampled = sample_drift_of_run(model, text, feeding, trained_tokens=position.tokens, seed=config.seed)
    history = [asdict(metrics) for metrics in steps]
    if rank == 0:  # the steps before this call, too
        history = [json.loads(line) for line in (output / METRICS).read_text(encoding="utf-8").splitlines()]
    checkpoints = [path for line in history for path in line["checkpoints"]]
    origin = read_origin(output / checkpoints[-1]) if checkpoints else None  # of the model that the run is for
    settings = config.to_dict() | {"dataset": dataset.name, MADE_OF: work["made_of"]}
    summary = TrainingSummary(
        config=json.loads(json.dumps(settings)),
        steps=position.step,
        samples=position.samples,
        tokens=position.tokens,
        loss_tokens=position.loss_tokens,
        first_loss=history[0]["loss"],
        final_loss=history[-1]["loss"],
        validation_loss=history[-1]["validation_loss"],
        best_validation_loss=position.best_validation_loss,
        checkpoints=tuple(checkpoints),
        checkpoint_files={path: model_files(output / path) for path in checkpoints} if rank == 0 else {},
        best_checkpoint=position.best_checkpoint,
        metrics_sha256=metrics_sha256(output / METRICS, position.step) if rank == 0 else "",
        world_size=world_size,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        liger=work["liger"],
        preflight=PreflightResult(batching=preflight.batching, reason=preflight.reason),
        trainable_parameters=trainable,
        total_parameters=total,
        load_seconds=loaded - started,
        train_seconds=seconds - checkpointer.seconds,
        save_seconds=checkpointer.seconds,
        peak_memory_bytes=_peak_memory(device),
        rank_layout={
            name: WeightSummary(
                **_layout(described, factors.split_kinds[name], *norms[name], effective_ranks[name]),
                predicted_drift=predicted.get(name),
                sampled_drift=sampled.by_target[name] if sampled else None,
                **(dict(origin.weights[name]) if origin else {}),
            )
            for name, described in factors.weights.items()
        },
        fitted_step=fitted,
        sampled_drift=sampled.quality if sampled else None,
        saved=_saved(origin) if origin else None,
        statistics=origin.statistics if origin else None,
        replay=_replayed(replay),
    )
    mirror.check_owner()
    if rank == 0:
        write_sealed(output / SUMMARY, summary.to_dict())
    if os.environ["LOCAL_RANK"] == "0":
        write_json(Path(work["summary_file"]), summary.to_dict())
    if world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    mirror.finish()


def new_samples(dataset: Path, held_out: Sequence[int]) -> tuple[Samples, Samples]:
    """What is trained on of the new data, and the samples of its training side that are held out for `fit_step`."""
    train = load_split(dataset, "train")
    if not held_out:
        return train, SampleList([])
    others = sorted(set(range(len(train))) - set(held_out))
    return SubsetOfSamples(train, others), SubsetOfSamples(train, held_out)


def _start(stored: ModelWeights, targets: list[str]) -> str:
    """What the training starts from."""
    if stored.reader.is_exact:
        return f"starts from the exact weights of {stored.folder}"
    if stored.are_exact(targets):
        return f"starts from the float32 weights of {stored.folder}"
    dtype = str(stored.served_dtype(targets[0])).removeprefix("torch.")
    return f"starts from weights that are rounded to {dtype}: {stored.folder} keeps no exact ones"


def _replayed(replay: Path | None) -> ReplaySummary | None:
    """What was replayed in each epoch."""
    if replay is None:
        return None
    statistics = open_dataset(replay).statistics
    return ReplaySummary(
        num_samples=statistics["num_train_samples"],
        num_tokens=statistics["num_tokens"],
        num_loss_tokens=statistics["num_loss_tokens"],
        sources=tuple(ReplaySource(**source) for source in statistics["sources"]),
    )


def _saved(origin: Origin) -> SavedUpdate:
    """How the last model was written, and what that did to the update as a whole."""
    return SavedUpdate(
        base_model=origin.base_model,
        starts_from_exact=origin.starts_from_exact,
        dtype=origin.dtype,
        rounding=origin.rounding,
        **dict(origin.total),
    )


def _layout(
    weight: SplitWeight, split_kind: SplitKind, weight_norm: float, update_norm: float, effective_rank: float
) -> dict[str, Any]:
    """How one weight is split, and what the update made of it; `effective_rank` is at most `unfrozen`.

    `shape` is (m, n), or (experts, m, n) with a split for each. Norms are Frobenius'.
    """
    return {
        "shape": weight.shape,
        "unfrozen": weight.rank,
        "frozen": num_directions(weight.shape, split_kind) - weight.rank,
        "weight_norm": weight_norm,
        "update_norm": update_norm,
        "effective_rank": effective_rank,
    }


def _effective_ranks(model: torch.nn.Module, rank: int, world_size: int) -> dict[str, float]:
    """Target -> the effective rank of its update, that of its coefficients, because the bases are orthonormal.

    Each process takes its share of the layers; the coefficients of one layer at a time are gathered.
    """
    found = {}
    for number, (name, layer) in enumerate(osft_layers(model)):
        whole = _whole(layer.coefficients)
        if number % world_size == rank:
            found[name] = effective_rank(whole)
    if world_size == 1:
        return found
    everyone: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everyone, found)
    return {name: value for part in everyone for name, value in part.items()}


def _check_same_inputs(work: dict[str, Any]) -> None:
    """Raise RuntimeError unless all processes have equal data and factors, which nodes without a shared folder made."""
    factors = load_factor_set(work["factors"], check=False)
    digests = [tensor_sha256(basis) for name in factors.weights for basis in factors.first_rows(name)]
    made_of = work["made_of"]
    weights = [made_of[what] for what in ("weights", "model_config", "tokenizer")]
    data = [made_of["dataset"], made_of.get("replay"), made_of.get("own_text"), work["selection"]]
    mine = [data, weights, Path(work["factors"]).name, digests, Path(work["state"] or "").name]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    compared = ("data", "model files", "factor set", "singular vectors", "training state to resume from")
    for what, values in zip(compared, zip(*everyone, strict=True), strict=True):
        if any(value != values[0] for value in values):
            raise RuntimeError(
                f"the processes have different {what}. Put data_output_dir and ckpt_output_dir on a folder that all "
                "nodes share or give s3:// URIs, or prepare once and pass the result as data_path and factors"
            )


def _device() -> torch.device:
    """This process's GPU, or the CPU with its share of the cores."""
    local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    return torch.device("cpu")


def _norm(tensor: torch.Tensor) -> float:
    return _whole(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32)).item()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its shards, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
