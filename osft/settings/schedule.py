"""Learning-rate schedules: those of transformers, by name."""

import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from osft.settings.base import refuse_unknown

if TYPE_CHECKING:
    from torch.optim import Optimizer


_NEED_NO_ARGUMENTS = frozenset(
    {"linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"}
)
"""What has been tried, so that it need not be again: importing the schedules takes seconds."""


def check(name: str, settings: Mapping[str, Any], *, learning_rate: float, warmup_steps: int) -> None:
    """Raise ValueError for a schedule, or arguments of one, that transformers would not take."""
    if name in _NEED_NO_ARGUMENTS and not settings:
        return
    import torch
    from torch import nn
    from torch.optim import AdamW
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType

    known = [scheduler.value for scheduler in SchedulerType]
    if name not in known:
        raise ValueError(f"lr_scheduler {name!r} is unknown; known are {', '.join(known)}")
    if warmup_steps and name in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(f"lr_scheduler={name!r} has no warm-up. Set warmup_steps to 0")
    build: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(_with_warmup(name, warmup_steps))]
    signature = inspect.signature(build).parameters
    try:
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values()):
            given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
            refuse_unknown(settings, [name for name in signature if name not in given])
        optimizer = AdamW([nn.Parameter(torch.zeros(1))], lr=learning_rate)
        make(name, settings, optimizer, warmup_steps=warmup_steps, num_training_steps=1000)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lr_scheduler_kwargs of {name!r}: {error}") from None


def make(
    name: str, settings: Mapping[str, Any], optimizer: "Optimizer", *, warmup_steps: int, num_training_steps: int
) -> Any:
    """The schedule of an optimizer."""
    from transformers import get_scheduler

    return get_scheduler(
        _with_warmup(name, warmup_steps),
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=dict(settings),
    )


def _with_warmup(name: str, warmup_steps: int) -> str:
    """The schedule that has a warm-up where one is wanted."""
    return "constant_with_warmup" if name == "constant" and warmup_steps else name


def warmup_warning(warmup_steps: int, num_training_steps: int) -> str | None:
    """What to say of a warm-up that the run does not get to the end of; None if it does."""
    if warmup_steps < num_training_steps or not warmup_steps:
        return None
    return (
        f"warmup_steps={warmup_steps} but the run has {num_training_steps} steps: the peak learning rate is never "
        "reached. Lower warmup_steps, or train for longer"
    )


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's arguments, where strings that are numbers, true or false become those.

    The documented type of the values is str, schedules want numbers.
    """
    return {name: _converted(value) for name, value in settings.items()}


def _converted(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.lower() if value.lower() in ("true", "false") else value)
    except json.JSONDecodeError:
        pass
    try:
        return float(value)  # 1E-6, .5 and other spellings that JSON does not know
    except ValueError:
        return value
