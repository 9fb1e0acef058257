"""The training loop.

The loss of a step is the sum over the loss tokens of the effective batch divided by their number. Neither the
packing nor the number of processes or micro-batches changes it or its gradient.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from osft.data.packing import Feeding, MicroBatch
from osft.data.samples import Samples
from osft.models.likelihood import mean_nll, token_nll
from osft.models.origin import RoundingLoss
from osft.process.exit_codes import ABANDONED, INTERRUPTED
from osft.settings.training import TrainConfig
from osft.subspace.model import refresh
from osft.training.callbacks import Request
from osft.training.distillation import NOTHING_DISTILLED, Distillation, DistilledText
from osft.training.fitting import FittedStep, fit_step
from osft.training.predicted_drift import DriftPrediction

if TYPE_CHECKING:
    from osft.training.checkpointing import Checkpointer


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What is known after one optimizer step; a line of `metrics.jsonl`."""

    step: int
    epoch: float
    loss: float
    """Nats per loss token, before the step."""
    learning_rate: float
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    samples: int
    """All samples processed since the start, over all processes."""
    tokens: int
    loss_tokens: int
    tokens_per_second: float
    step_seconds: float
    timestamp: float
    """Seconds since the epoch."""
    validation_loss: float | None = None
    """Nats per loss token of the validation set after the step, where it was measured."""
    checkpoints: tuple[str, ...] = ()
    """The models that were written after the step, relative to the output folder."""
    predicted_drift: float | None = None
    """With protect="activations": how far the update moves the model from its start, nats per token, as predicted from
    the statistics (`osft.training.predicted_drift`), after the step."""
    distillation_loss: float | None = None
    """With distill_weight: KL(start || current) in nats per token of the step's self-written text, before the step."""
    step_scale: float | None = None
    """With fit_step, at the last step: the part of the update that was kept (`osft.training.fitting`)."""
    step_gain: float | None = None
    """What it gains on the held-out samples, nats per token."""
    step_drift: float | None = None
    """How far it moves the model on its own text, nats per token."""
    update_lost: float | None = None
    """Of the last of these models, what rounding its weights did to the update (`osft.models.origin.RoundingLoss`).
    Rank 0 measures it."""
    rounding_error: float | None = None
    frozen_share: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step works on."""

    number: int
    """From 1."""
    epoch: float
    """Epochs done after the step."""
    indices: list[int]
    """Samples of the effective batch."""
    ends_epoch: bool
    is_last: bool


@dataclass(slots=True)
class Position:
    """How far a run has come; with the model and the optimizer, all that it needs to be resumed."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    best_validation_loss: float | None = None
    best_checkpoint: str | None = None
    scheduler: dict[str, Any] | None = None
    learning_rate: float | None = None

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Position":
        """That of a training state, which says more."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


@dataclass(frozen=True, slots=True)
class WrittenModel:
    """A model on disk."""

    path: str
    """Relative to the output folder."""
    rounding: RoundingLoss | None
    """On rank 0."""


class InterruptedTraining(SystemExit):
    """The process was asked to end, and the training state is saved."""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    *,
    num_loss_tokens: int,
    max_grad_norm: float = 0.0,
    distilled: DistilledText = NOTHING_DISTILLED,
    world_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One optimizer step on one effective batch.

    `num_loss_tokens` counts the whole effective batch, over all processes. Returns this process's sum of losses, its
    sum of divergences on the text that is `distilled`, and the gradient's global norm, all scalars on the device, which
    is not waited for.
    """
    device = micro_batches[0].input_ids.device
    loss_sum, divergence_sum = torch.zeros((), device=device), torch.zeros((), device=device)
    for batch in micro_batches:
        loss = token_nll(model, batch).sum()
        (loss * (world_size / num_loss_tokens)).backward()  # FSDP2 averages gradients over processes
        loss_sum += loss.detach()
    for text in distilled.batches:
        divergence = text.divergence(model, device).sum()
        (divergence * (distilled.weight * world_size / distilled.num_tokens)).backward()
        divergence_sum += divergence.detach()
    parameters = [p for p in model.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    refresh(model, learning_rate=optimizer.param_groups[0]["lr"])
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    return loss_sum, divergence_sum, grad_norm


def plan_steps(num_samples: int, config: TrainConfig, *, after: int = 0) -> Iterator[Step]:
    """The run's steps after step `after`: a new order each epoch, an epoch's last batch may be smaller.

    Each process computes the same sequence from the seed.
    """
    total, number = num_steps(num_samples, config), 0
    for epoch in range(config.num_epochs):
        generator = torch.Generator().manual_seed(config.seed + epoch)
        order = torch.randperm(num_samples, generator=generator).tolist()
        for start in range(0, num_samples, config.effective_batch_size):
            if number == total:
                return
            number += 1
            indices = order[start : start + config.effective_batch_size]
            done = start + len(indices)
            if number > after:
                yield Step(number, epoch + done / num_samples, indices, done == num_samples, number == total)


def num_steps(num_samples: int, config: TrainConfig) -> int:
    """Optimizer steps of the whole run."""
    steps = config.num_epochs * -(-num_samples // config.effective_batch_size)
    return min(steps, config.max_steps) if config.max_steps else steps


def make_optimizer(model: nn.Module, config: TrainConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over what is trainable."""
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def run(
    model: nn.Module,
    samples: Samples,
    config: TrainConfig,
    *,
    feeding: Feeding,
    on_step: Callable[[StepMetrics], None],
    validation: Samples | None = None,
    text: Samples | None = None,
    selection: Samples | None = None,
    prediction: DriftPrediction | None = None,
    checkpointer: "Checkpointer | None" = None,
    position: Position | None = None,
    restore: Callable[[torch.optim.Optimizer], None] | None = None,
) -> FittedStep | None:
    """Train `model` in place, from `position` on if it is given (`restore` then fills model and optimizer).

    `feeding` says how samples come to this process's model. `text` is what the model wrote itself, for distill_weight
    and fit_step, and `selection` are the held-out samples by which fit_step chooses; what it found is returned.
    `prediction`, if given, is asked after each step. `on_step` is called after each step, on every rank with the same
    values. Raises RuntimeError if the loss is no longer finite, and InterruptedTraining if `checkpointer` requested to
    end and to be resumed.
    """
    model.train()
    device, world_size = feeding.device, feeding.world_size
    optimizer = make_optimizer(model, config, fused=device.type == "cuda" or world_size == 1)
    scheduler = config.make_scheduler(optimizer, num_training_steps=num_steps(len(samples.lengths), config))
    follows_loss = "metrics" in inspect.signature(scheduler.step).parameters
    position = position or Position()
    distillation = fitted = None
    if config.distill_weight:
        assert text is not None, "a run that distils has text"
        distillation = Distillation(config, model, text, feeding)  # of the start: before a state is restored
    if restore is not None:
        restore(optimizer)
        scheduler.load_state_dict(scheduler.state_dict() | (position.scheduler or {}))
        for group in optimizer.param_groups:
            group["lr"] = position.learning_rate

    for step in plan_steps(len(samples.lengths), config, after=position.step):
        started = time.perf_counter()
        # What a model draws at random (a router's noise) depends on the step only: a resumed run draws the same.
        torch.manual_seed((config.seed * 1_000_003 + step.number) * world_size + feeding.rank)
        num_tokens = sum(samples.lengths[i] for i in step.indices)
        num_loss_tokens = sum(samples.num_loss_tokens[i] for i in step.indices)
        learning_rate = optimizer.param_groups[0]["lr"]
        distilled = distillation.of_step(step.number) if distillation else NOTHING_DISTILLED
        *sums, grad_norm = train_step(
            model,
            optimizer,
            [batch for _, batch in feeding.batches(samples, step.indices)],
            num_loss_tokens=num_loss_tokens,
            max_grad_norm=config.max_grad_norm,
            distilled=distilled,
            world_size=world_size,
        )
        mine = [checkpointer.request(), checkpointer.is_uploading()] if checkpointer else [Request.NOTHING, False]
        told = torch.stack([torch.full((), float(value), device=device) for value in mine])
        totals = torch.stack(sums)
        if world_size > 1:
            torch.distributed.all_reduce(totals)
            torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        drifts = prediction.drifts() if prediction else totals.new_empty(0)
        # The one time that a step waits for the device.
        known = torch.cat([totals, grad_norm[None], told, drifts]).tolist()
        loss_sum, divergence_sum, norm, request, is_uploading, *predicted = known
        loss = loss_sum / num_loss_tokens
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RuntimeError(
                f"step {step.number}: the loss is {loss} and the gradient norm {norm}. Lower learning_rate "
                f"({config.learning_rate}) or raise warmup_steps ({config.warmup_steps})"
            )
        if checkpointer and not is_uploading:
            checkpointer.continue_upload()
        seconds = time.perf_counter() - started
        position.step = step.number
        position.samples += len(step.indices)
        position.tokens += num_tokens
        position.loss_tokens += num_loss_tokens
        is_last = step.is_last or request == Request.STOP
        if is_last and config.fit_step:
            assert selection is not None, "a run that fits its step has held-out samples"
            assert text is not None, "and text"
            fitted = fit_step(model, config, selection, text, feeding)
            predicted = list(prediction.by_target().values()) if prediction else []

        validation_loss = None
        if validation and (is_last or _validation_due(step, config)):
            validation_loss = mean_nll(model, validation, feeding)
        scheduler.step(*([loss if validation_loss is None else validation_loss] if follows_loss else []))
        metrics = StepMetrics(
            step=step.number,
            epoch=step.epoch,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=norm,
            samples=position.samples,
            tokens=position.tokens,
            loss_tokens=position.loss_tokens,
            tokens_per_second=num_tokens / seconds,
            step_seconds=seconds,
            timestamp=time.time(),
            predicted_drift=sum(predicted) if prediction else None,
            distillation_loss=divergence_sum / distilled.num_tokens if distillation else None,
            validation_loss=validation_loss,
            **(fitted.metrics() if fitted else {}),
        )
        if checkpointer:
            written = _write_models(checkpointer, config, step, position, metrics, is_last=is_last)
            rounding = written[-1].rounding.to_dict() if written and written[-1].rounding else {}
            metrics = replace(metrics, checkpoints=tuple(model.path for model in written), **rounding)
        on_step(metrics)
        if is_last:
            if checkpointer:
                checkpointer.settle()
            break
        ends = request in (Request.INTERRUPT, Request.ABANDON)
        if checkpointer and (ends or request == Request.SAVE_STATE or _state_due(step, config)):
            position.scheduler = {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"}
            position.learning_rate = optimizer.param_groups[0]["lr"]
            checkpointer.state(optimizer, position)
            if ends:
                checkpointer.settle()
                raise InterruptedTraining(ABANDONED if request == Request.ABANDON else INTERRUPTED)
    return fitted


def _write_models(
    checkpointer: "Checkpointer",
    config: TrainConfig,
    step: Step,
    position: Position,
    metrics: StepMetrics,
    *,
    is_last: bool,
) -> list[WrittenModel]:
    """Write the models that are due after a step, the best one by validation loss first."""
    written = []
    validation_loss = metrics.validation_loss
    name = f"samples_{float(position.samples)}"  # as mini-trainer counts: the notebooks look for samples_*.0
    best = position.best_validation_loss
    if validation_loss is not None and (best is None or validation_loss < best):
        position.best_validation_loss = validation_loss
        if config.save_best_val_loss:
            written.append(checkpointer.model(f"{name}_best_val_loss", metrics))
            position.best_checkpoint = written[-1].path
    if (is_last and config.save_final_checkpoint) or (step.ends_epoch and config.checkpoint_at_epoch):
        written.append(checkpointer.model(name, metrics))
    return written


def _validation_due(step: Step, config: TrainConfig) -> bool:
    if config.validation_frequency:
        return step.number % config.validation_frequency == 0
    return step.ends_epoch


def _state_due(step: Step, config: TrainConfig) -> bool:
    return config.save_state_steps is not None and step.number % config.save_state_steps == 0
