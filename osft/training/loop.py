"""The training loop.

The loss of a step is the sum over the loss tokens of the effective batch divided by their number. Neither the
packing nor the number of processes or micro-batches changes it or its gradient.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from osft.config import TrainConfig
from osft.data.chat import Sample
from osft.data.packing import MicroBatch, collate, plan_micro_batches
from osft.likelihood import token_nll
from osft.subspace.model import refresh


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
    tokens: int
    """All tokens processed since the start, over all processes."""
    loss_tokens: int
    tokens_per_second: float
    step_seconds: float
    timestamp: float
    """Seconds since the epoch."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    *,
    num_loss_tokens: int,
    max_grad_norm: float = 0.0,
    world_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on one effective batch.

    `num_loss_tokens` counts the whole effective batch, over all processes. Returns this process's sum of losses
    and the gradient's global norm, both scalars.
    """
    loss_sum = torch.zeros((), device=micro_batches[0].input_ids.device)
    for batch in micro_batches:
        loss = token_nll(model, batch).sum()
        (loss * (world_size / num_loss_tokens)).backward()  # FSDP2 averages gradients over processes
        loss_sum += loss.detach()
    parameters = [p for p in model.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    refresh(model)
    return loss_sum, grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm


def effective_batches(num_samples: int, config: TrainConfig) -> Iterator[tuple[float, list[int]]]:
    """(epoch, sample indices) of each optimizer step: a new order each epoch, the last batch may be smaller.

    Each process computes the same sequence from the seed.
    """
    step = 0
    for epoch in range(config.num_epochs):
        generator = torch.Generator().manual_seed(config.seed + epoch)
        order = torch.randperm(num_samples, generator=generator).tolist()
        for start in range(0, num_samples, config.effective_batch_size):
            if step == config.max_steps:
                return
            step += 1
            indices = order[start : start + config.effective_batch_size]
            yield epoch + (start + len(indices)) / num_samples, indices


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
    samples: Callable[[int], Sample],
    lengths: Sequence[int],
    config: TrainConfig,
    *,
    device: torch.device,
    on_step: Callable[[StepMetrics], None],
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Train `model` in place. `samples(i)` gives sample i, `lengths[i]` its number of tokens.

    `on_step` is called after each step, on every rank with the same values. Raises RuntimeError if the loss is
    no longer finite.
    """
    model.train()
    optimizer = make_optimizer(model, config, fused=device.type == "cuda" or world_size == 1)
    scheduler = get_scheduler(
        config.lr_scheduler, optimizer, config.warmup_steps, num_training_steps=num_steps(len(lengths), config)
    )
    tokens = loss_tokens = 0
    for step, (epoch, indices) in enumerate(effective_batches(len(lengths), config), start=1):
        started = time.perf_counter()
        plan = plan_micro_batches([lengths[i] for i in indices], config.max_tokens_per_gpu, world_size)
        step_loss_tokens = sum(samples(i).num_loss_tokens for i in indices)
        micro_batches = [collate([samples(indices[i]) for i in packed]).to(device) for packed in plan[rank]]
        learning_rate = scheduler.get_last_lr()[0]
        loss_sum, grad_norm = train_step(
            model,
            optimizer,
            micro_batches,
            num_loss_tokens=step_loss_tokens,
            max_grad_norm=config.max_grad_norm,
            world_size=world_size,
        )
        scheduler.step()
        if world_size > 1:
            torch.distributed.all_reduce(loss_sum)
        loss = loss_sum.item() / step_loss_tokens
        if not torch.isfinite(grad_norm) or loss != loss:
            raise RuntimeError(
                f"step {step}: the loss is {loss} and the gradient norm {grad_norm.item()}. Lower learning_rate "
                f"({config.learning_rate}) or raise warmup_steps ({config.warmup_steps})"
            )
        seconds = time.perf_counter() - started
        step_tokens = sum(lengths[i] for i in indices)
        tokens += step_tokens
        loss_tokens += step_loss_tokens
        on_step(
            StepMetrics(
                step=step,
                epoch=epoch,
                loss=loss,
                learning_rate=learning_rate,
                grad_norm=grad_norm.item(),
                tokens=tokens,
                loss_tokens=loss_tokens,
                tokens_per_second=step_tokens / seconds,
                step_seconds=seconds,
                timestamp=time.time(),
            )
        )
