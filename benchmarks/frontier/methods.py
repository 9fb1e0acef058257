"""The methods: what of a model each of them trains, and how."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.frontier.measured import BothSides
from benchmarks.frontier.network import Network
from benchmarks.peers import LORA_RANK, Peer, adapted
from osft.settings.subspace import SubspaceConfig
from osft.subspace import inject, merge, osft_layers, refresh, select_targets
from osft.subspace.statistics import Statistics

Kind = Literal["full", "lora", "peft_osf", "weights", "activations", "curvature"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way to train. Any field is part of a run's name."""

    kind: Kind
    ratio: float | None = None
    """Share of the directions that is trained."""
    stiffness: float = 0.0
    """As osft.settings.training.TrainConfig has it."""
    measured_energy: bool = True
    """Whether the gradients' energy s was measured; otherwise it is 1 in every layer."""
    weight_decay: float = 0.0
    distill_weight: float = 0.0
    """Of the KL from the task's starting model on text that this model wrote."""
    replay_ratio: float = 0.0
    """Tokens of replayed text to one of the task: general text and, in a sequence, that of earlier tasks."""
    opened: bool = True
    """Whether half of the text that the model writes begins as code and other kinds do; else all is prose and chats."""
    memory: bool = True
    """Whether a task's statistics are carried to the next ones, of a method that has statistics."""

    def __str__(self) -> str:
        named = {
            "full": "full fine-tuning",
            "lora": f"LoRA, rank {LORA_RANK}",
            "peft_osf": "PEFT's OSF",
            "weights": "OSFT, weights",
            "activations": "activations, stiffness" if self.stiffness else "activations, hard",
            "curvature": "curvature, both sides",
        }[self.kind]
        parts = [f"{named} {self.stiffness:g}" if self.stiffness else named]
        if self.ratio is not None:
            parts.append(f"ratio {self.ratio:g}")
        if not self.measured_energy:
            parts.append("s = 1")
        if not self.opened:
            parts.append("own text without code")
        if not self.memory:
            parts.append("no memory")
        if self.weight_decay:
            parts.append(f"decay {self.weight_decay:g}")
        if self.distill_weight:
            parts.append(f"distillation {self.distill_weight:g}")
        if self.replay_ratio:
            parts.append(f"replay {100 * self.replay_ratio:g} %")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Known:
    """What the methods that protect by it know of the model's layers."""

    statistics: Statistics | None = None
    both_sides: dict[str, BothSides] = field(default_factory=dict)


def _nothing(*_: Any) -> None:
    """Of a method that has nothing to do there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainable:
    """A network that a method has made trainable."""

    parameters: list[nn.Parameter]
    before_step: Callable[[], None] = _nothing
    """Called after the backward pass."""
    after_step: Callable[[float], None] = _nothing
    """Called with the learning rate after each optimizer step."""
    finish: Callable[[], None]
    """Turns the network back into a plain one, with the tuned weights."""


def prepare(method: Method, network: Network, known: Known) -> Trainable:
    """Make the network trainable, in place; it holds the weights that the task starts from."""
    model: Any = network.model
    if method.kind == "full":
        names = set(network.weights())
        parameters = [parameter for name, parameter in model.model.named_parameters() if name in names]
        for parameter in parameters:
            parameter.requires_grad_(True)
        return Trainable(parameters=parameters, finish=lambda: model.requires_grad_(False))
    if method.kind == "lora" or method.kind == "peft_osf":
        return _adapted(method.kind, method.ratio, model)
    if method.kind == "curvature":
        return _rotated(method, model, known.both_sides)
    assert method.ratio is not None
    if method.kind == "weights":
        inject(model, SubspaceConfig(unfreeze_rank_ratio=method.ratio))
    else:
        config = SubspaceConfig(unfreeze_rank_ratio=method.ratio, protect="activations")
        inject(model, config, statistics=known.statistics, stiffness=method.stiffness)
    return Trainable(
        parameters=[layer.coefficients for _, layer in osft_layers(model)],
        after_step=lambda rate: refresh(model, learning_rate=rate),
        finish=lambda: _plain(merge, model),
    )


def _rotated(method: Method, model: Any, sides: dict[str, BothSides]) -> Trainable:
    """D = Q_S X Q_C^T, with the stiffness of a coefficient X_ij proportional to s_i c_j.

    The gradient of the dense weight is formed and rotated, which costs more than the library's layers do: here only
    what is learned counts.
    """
    layers = []
    for target in select_targets(model):
        weight = model.get_submodule(target.name).weight.requires_grad_(True)
        layers.append((weight, weight.detach().clone(), nn.Parameter(torch.zeros_like(weight)), sides[target.name]))

    def rotate() -> None:
        for weight, _, coefficients, side in layers:
            coefficients.grad = side.left.T @ weight.grad @ side.right
            weight.grad = None

    @torch.no_grad()
    def refresh_weights(rate: float) -> None:
        for weight, base, coefficients, side in layers:
            coefficients.div_(1 + rate * method.stiffness * side.curvature)
            weight.copy_(base + side.left @ coefficients @ side.right.T)

    return Trainable(
        parameters=[coefficients for _, _, coefficients, _ in layers],
        before_step=rotate,
        after_step=refresh_weights,
        finish=lambda: model.requires_grad_(False),
    )


def _plain(restore: Callable[[Any], object], model: Any) -> None:
    restore(model)
    model.requires_grad_(False)


def _adapted(peer: Peer, ratio: float | None, model: Any) -> Trainable:
    """By PEFT, whose layers replace those of the model in place."""
    wrapped = adapted(model, peer, ratio)
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    return Trainable(parameters=parameters, finish=lambda: _plain(lambda _: wrapped.merge_and_unload(), model))
