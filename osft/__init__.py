"""Orthogonal Subspace Fine-Tuning: continual learning for language models.

`import osft` costs nothing; torch and transformers are imported with the first name that needs them, everything
else where it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from osft.process.logs import configure_unless_application_did

if TYPE_CHECKING:
    from osft.api import Algorithm as Algorithm
    from osft.api import AlgorithmRegistry as AlgorithmRegistry
    from osft.api import Backend as Backend
    from osft.api import OSFTAlgorithm as OSFTAlgorithm
    from osft.api import create_algorithm as create_algorithm
    from osft.api import osft as osft
    from osft.settings.subspace import SubspaceConfig as SubspaceConfig
    from osft.settings.training import TrainConfig as TrainConfig
    from osft.subspace import OSFTLinear as OSFTLinear
    from osft.subspace import inject as inject
    from osft.subspace import merge as merge
    from osft.subspace import refresh as refresh
    from osft.training import StopTraining as StopTraining
    from osft.training import TrainingCallback as TrainingCallback
    from osft.training import TrainingContext as TrainingContext
    from osft.training import TrainResult as TrainResult
    from osft.training import train as train

__version__ = "0.1.0"

configure_unless_application_did()

_HOMES = {
    **dict.fromkeys(
        ("Algorithm", "AlgorithmRegistry", "Backend", "OSFTAlgorithm", "create_algorithm", "osft"), "osft.api"
    ),
    "SubspaceConfig": "osft.settings.subspace",
    "TrainConfig": "osft.settings.training",
    **dict.fromkeys(("OSFTLinear", "inject", "merge", "refresh"), "osft.subspace"),
    **dict.fromkeys(("StopTraining", "TrainResult", "TrainingCallback", "TrainingContext", "train"), "osft.training"),
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'osft' has no attribute {name!r}")
