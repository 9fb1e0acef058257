"""Orthogonal Subspace Fine-Tuning: continual learning for language models.

`import osft` costs nothing; torch and transformers are imported with the first name that needs them, everything
else where it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osft.config import SubspaceConfig as SubspaceConfig
    from osft.config import TrainConfig as TrainConfig
    from osft.subspace import OSFTLinear as OSFTLinear
    from osft.subspace import inject as inject
    from osft.subspace import merge as merge
    from osft.subspace import refresh as refresh
    from osft.training import train as train

__version__ = "0.1.0"

_HOMES = {
    "SubspaceConfig": "osft.config",
    "TrainConfig": "osft.config",
    "OSFTLinear": "osft.subspace",
    "inject": "osft.subspace",
    "merge": "osft.subspace",
    "refresh": "osft.subspace",
    "train": "osft.training",
}

__all__ = ["OSFTLinear", "SubspaceConfig", "TrainConfig", "__version__", "inject", "merge", "refresh", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'osft' has no attribute {name!r}")
