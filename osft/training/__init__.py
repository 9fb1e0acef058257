"""Training: processes, sharding, the loop, the final checkpoint; and the plan of all that, which needs none of it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osft.training.callbacks import StopTraining as StopTraining
    from osft.training.callbacks import TrainingCallback as TrainingCallback
    from osft.training.callbacks import TrainingContext as TrainingContext
    from osft.training.launch import train as train
    from osft.training.result import TrainResult as TrainResult

_HOMES = {
    **dict.fromkeys(("StopTraining", "TrainingCallback", "TrainingContext"), "osft.training.callbacks"),
    "TrainResult": "osft.training.result",
    "train": "osft.training.launch",
}

__all__ = ["StopTraining", "TrainResult", "TrainingCallback", "TrainingContext", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # imported with the first use: a plan has to answer quickly
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'osft.training' has no attribute {name!r}")
