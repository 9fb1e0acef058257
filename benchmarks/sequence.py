"""One round of a sequence of tasks, by each of the methods that `benchmarks.compare` compares.

Every method is trained by `osft.training.loop.run`: the same samples in the same order, packed alike, the same number
of steps, schedule and AdamW, in float32. What differs is what is trainable, and the learning rate. OSFT goes through
the factor store and the loader of the training worker, and splits the weights anew before each task.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import allocated_memory, peak_memory, reset_peak_memory, return_freed_memory
from osft import examples
from osft.checkpoint import CheckpointReader, SavedTensor, write_checkpoint
from osft.config import TrainConfig
from osft.conversion import ModelWeights
from osft.data.chat import tokenize
from osft.data.dataset_folder import hash_files, load_split
from osft.data.files import data_name
from osft.data.prepare import prepare
from osft.data.records import DataError, Record
from osft.evaluation.evaluate import load_set
from osft.evaluation.scoring import score_records
from osft.models import model_folder
from osft.subspace import factor_store, select_targets
from osft.training.loop import StepMetrics, run
from osft.training.saving import save_merged
from osft.training.sharded_model import load_sharded

METHODS = {"osft": "OSFT, complement", "full": "full fine-tuning", "lora": "LoRA (PEFT)"}


@dataclass(kw_only=True, slots=True)
class Settings:
    """What every run of a comparison shares. Any change makes other runs."""

    model: str = "example:smollm2-135m-instruct"
    tasks: tuple[str, ...] = ("example:film-reviews", "example:sarcasm-headlines", "example:science-questions")
    """Chats with choices, learned one after the other. The one that takes the fewest samples comes first: what was not
    learned cannot be forgotten."""
    anchor: str = "example:web-text"
    """Of what the base model was trained on, as far as that is known; measured, never trained."""
    train_samples: int = 320
    """Of each task."""
    selection_samples: int = 48
    """Held-out records of each task that choose the learning rate."""
    report_samples: int = 128
    """Held-out records of each task that the results are measured on. None of them is a selection record."""
    anchor_samples: int = 32
    batch_size: int = 8
    """Samples of an optimizer step."""
    warmup_steps: int = 2
    max_tokens: int = 512
    """Of a micro-batch, and of the longest sample."""
    unfreeze_rank_ratio: float = 0.25
    lora_rank: int = 16
    lora_alpha: int = 32
    checkpoint_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the model is kept between tasks, whatever dtype the base model comes in."""
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True, slots=True)
class Task:
    """One task of the sequence."""

    name: str
    dataset: Path
    """The prepared training samples."""
    selection: tuple[Record, ...]
    report: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Materials:
    """What the runs of a comparison read."""

    base_model: Path
    tasks: tuple[Task, ...]
    anchor: tuple[Record, ...]
    identity: dict[str, Any]
    """Hashes of the model and of the data."""


def gather(settings: Settings, storage: Path, report: Callable[[str], None]) -> Materials:
    """Fetch, convert and prepare model and data below `storage`, or find them there.

    Raises ValueError for a task that has too few held-out records or whose records have no choices, and as
    `examples.resolve`, `model_folder` and `prepare` do.
    """
    source = model_folder(examples.resolve(settings.model, storage / "examples", report))
    hashes = hash_files(sorted(path for path in source.iterdir() if path.is_file()))
    identity: dict[str, Any] = {"model": {Path(file).name: digest for file, digest in hashes.items()}}
    base_model = storage / "base" / f"{data_name(settings.model)}-{settings.checkpoint_dtype}"
    if not base_model.is_dir():
        reader, dtype = CheckpointReader(source), getattr(torch, settings.checkpoint_dtype)
        write_checkpoint(
            base_model,
            (SavedTensor(name, reader.tensor(name).to(dtype)) for name in reader.names()),
            source,
            dtype=dtype,
        )

    tasks, held_out = [], settings.selection_samples + settings.report_samples
    for uri in settings.tasks:
        prepared = prepare(
            examples.resolve(uri, storage / "examples", report),
            source,
            storage / "data",
            max_seq_len=settings.max_tokens,
            max_train_samples=settings.train_samples,
            max_validation_samples=held_out,
            report=report,
        )
        records = load_set(str(prepared.folder / "validation.jsonl"), "task").records
        if len(records) < held_out:
            raise DataError(f"{uri} has {len(records)} held-out records, {held_out} are wanted. Ask for fewer of them")
        if not all(record.choices for record in records):
            raise DataError(f"{uri} has records without choices: their accuracy would not compare. Give another task")
        chosen, reported = records[: settings.selection_samples], records[settings.selection_samples :]
        tasks.append(Task(data_name(uri), prepared.folder, chosen, reported))
        identity[data_name(uri)] = prepared.key
    anchor = load_set(examples.resolve(settings.anchor, storage / "examples", report), "anchor")
    anchor_records = anchor.records[: settings.anchor_samples]
    identity[data_name(settings.anchor)] = [record.content_hash for record in anchor_records]
    return Materials(base_model, tuple(tasks), anchor_records, identity)


def train_round(
    settings: Settings,
    method: str,
    learning_rate: float,
    seed: int,
    *,
    source: Path,
    dataset: Path,
    target: Path,
    factors: Path,
    on_step: Callable[[StepMetrics], None],
    before_saving: Callable[[dict[str, Any]], None],
) -> None:
    """Train the model of folder `source` on a dataset and write it to the folder `target`, whole or not at all.

    `before_saving` gets what was counted and measured before the model is written. Memory is what training needs at
    its peak above what the process held before the model was loaded; loading and splitting do not count.
    """
    config = TrainConfig(
        model_path=str(source),
        data_path=str(dataset),
        ckpt_output_dir=str(target),
        effective_batch_size=settings.batch_size,
        max_tokens_per_gpu=settings.max_tokens,
        max_seq_len=settings.max_tokens,
        learning_rate=learning_rate,
        warmup_steps=settings.warmup_steps,
        unfreeze_rank_ratio=settings.unfreeze_rank_ratio,
        dtype="float32",
        seed=seed,
    )
    torch.manual_seed(seed)  # LoRA begins with a random matrix
    return_freed_memory()
    held_before = allocated_memory(settings.device)
    started = time.perf_counter()
    model, save = _build(method, settings, config, source, factors)
    loaded = time.perf_counter()
    return_freed_memory()
    reset_peak_memory(settings.device)
    steps: list[StepMetrics] = []

    def record_step(metrics: StepMetrics) -> None:
        steps.append(metrics)
        on_step(metrics)

    run(model, load_split(dataset, "train"), config, device=torch.device(settings.device), on_step=record_step)
    before_saving(
        {
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "losses": [metrics.loss for metrics in steps],
            "step_seconds": median(metrics.step_seconds for metrics in steps),
            "load_seconds": loaded - started,
            "train_seconds": time.perf_counter() - loaded,
            "peak_bytes": peak_memory(settings.device) - held_before,
        }
    )
    save(target)


def _build(
    method: str, settings: Settings, config: TrainConfig, source: Path, factors: Path
) -> tuple[nn.Module, Callable[[Path], object]]:
    """The model of a folder, ready to train with a method, and what writes it to another folder."""
    device = torch.device(settings.device)
    if method == "osft":
        made = factor_store.precompute(source, factors, config.subspace, device=settings.device, report=lambda _: None)
        split, stored = load_sharded(config, source, made.path, device=device)
        return split, lambda target: save_merged(split, stored, target)

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.to(device)
    stored = ModelWeights(CheckpointReader(source), model)
    if method == "full":
        return model, lambda target: _save(model.state_dict(), stored, target)

    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=[target.name for target in select_targets(model)],
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(model, lora)
    return adapted, lambda target: _save(adapted.merge_and_unload().state_dict(), stored, target)


def _save(state: dict[str, torch.Tensor], stored: ModelWeights, target: Path) -> None:
    """Write a tuned model as it came, like `save_merged`."""

    def tensors() -> Iterator[SavedTensor]:
        for group in stored.groups:
            for name, tensor in stored.stored_form(group, {name: state[name].cpu() for name in group.shapes}):
                yield SavedTensor(name, tensor.to(stored.reader.served_dtype(name)))

    write_checkpoint(target, tensors(), stored.folder)


def score_model(
    folder: Path, tasks: Sequence[Task], anchor: tuple[Record, ...], settings: Settings, *, selection: bool
) -> dict[str, Any]:
    """Scores of the model of a folder: `report` and, if asked for, `selection` by the task's name, and `anchor`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(settings.device).eval()

    def score(records: tuple[Record, ...], name: str) -> dict[str, Any]:
        scores = score_records(model, tokenizer, records, max_tokens=settings.max_tokens, description=name)
        return scores.summary().to_dict()

    scores: dict[str, Any] = {"report": {task.name: score(task.report, task.name) for task in tasks}}
    if selection:
        scores["selection"] = {task.name: score(task.selection, task.name) for task in tasks}
    return scores | {"anchor": score(anchor, "anchor")}


@dataclass(frozen=True, slots=True)
class Work:
    """How much there is to compute, in tokens of a forward pass."""

    train: dict[str, int]
    """By the task's name; a training token counts three times."""
    report: dict[str, int]
    selection: dict[str, int]
    anchor: int

    def measuring(self, tasks: Sequence[str], *, selection: bool) -> int:
        """What `score_model` computes."""
        chosen = sum(self.selection[task] for task in tasks) if selection else 0
        return sum(self.report[task] for task in tasks) + chosen + self.anchor


def count_work(materials: Materials) -> Work:
    """The work of each part of a round."""
    tokenizer = AutoTokenizer.from_pretrained(materials.base_model)

    def count(records: Sequence[Record]) -> int:
        return sum(max(1, len(r.choices)) * len(tokenize(r, tokenizer, max_text_tokens=256).input_ids) for r in records)

    return Work(
        train={task.name: 3 * sum(load_split(task.dataset, "train").lengths) for task in materials.tasks},
        report={task.name: count(task.report) for task in materials.tasks},
        selection={task.name: count(task.selection) for task in materials.tasks},
        anchor=count(materials.anchor),
    )


def describe_settings(settings: Settings, materials: Materials) -> dict[str, Any]:
    """Settings and the hashes of model and data, as plain values: equal for equal runs."""
    return {**asdict(settings), "tasks": list(settings.tasks), "content": materials.identity}
