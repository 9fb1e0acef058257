"""The loop that every method goes through: the same batches, AdamW, a cosine schedule, float32."""

import math
from dataclasses import dataclass

import torch

from benchmarks.frontier.materials import REPLAYED_TOKENS, REVIEWS_PER_STEP
from benchmarks.frontier.methods import Known, Method, prepare
from benchmarks.frontier.network import Network, Seen, reference


@dataclass(frozen=True, slots=True)
class Others:
    """What is trained on beside the task, in short pieces."""

    replay: tuple[Seen, ...]
    """General text, and that of earlier tasks: taken in turns."""
    own: Seen | None
    """Text that the base model wrote."""


def samples_of_steps(seen: Seen, steps: int, seed: int) -> list[list[int]]:
    """The samples of each step: a block, or 16 short chats; other seeds take others, while there are any."""
    per_step = REVIEWS_PER_STEP if seen.text.answers is not None else 1
    samples = len(seen.text.tokens)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    first = seed * steps * per_step
    taken = order[torch.arange(first, first + steps * per_step) % samples].tolist()
    return [taken[step * per_step : (step + 1) * per_step] for step in range(steps)]


def pieces_before(step: int, ratio: float, step_tokens: int, piece_tokens: int) -> int:
    """How many pieces of text have been replayed before a step, for `ratio` tokens of them to one of the task."""
    return int(step * ratio * step_tokens / piece_tokens + 1e-9)


def train(
    network: Network,
    method: Method,
    learning_rate: float,
    task: Seen,
    *,
    steps: int,
    seed: int,
    known: Known,
    others: Others,
) -> list[float]:
    """Train the network in place. Returns the loss of each step in nats per token of the task."""
    torch.manual_seed(seed)  # LoRA begins with a random matrix
    teacher = reference(network, {"own": others.own}) if others.own else None
    trainable = prepare(method, network, known)
    optimizer = torch.optim.AdamW(
        trainable.parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=method.weight_decay
    )
    losses, replayed = [], 0
    for step, samples in enumerate(samples_of_steps(task, steps, seed)):
        rate = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        pieces = []
        due = pieces_before(step + 1, method.replay_ratio, task.text.tokens[samples].numel(), REPLAYED_TOKENS)
        for number in range(replayed, due):
            source = others.replay[number % len(others.replay)]
            pieces.append((source, [number // len(others.replay) % len(source.text.tokens)]))
        replayed = due
        counted = int(task.text.counted[samples].sum())
        total = counted + sum(int(source.text.counted[piece].sum()) for source, piece in pieces)
        loss = network.loss_sum(task, samples)
        losses.append(loss.item() / counted)
        (loss / total).backward()
        for source, piece in pieces:
            (network.loss_sum(source, piece) / total).backward()
        if teacher is not None and others.own is not None:
            row = step % len(others.own.text.tokens)
            (method.distill_weight * network.divergence(others.own, "own", row, teacher)).backward()
        trainable.before_step()
        torch.nn.utils.clip_grad_norm_(trainable.parameters, 1.0)
        optimizer.step()
        trainable.after_step(rate)
    trainable.finish()
    return losses
