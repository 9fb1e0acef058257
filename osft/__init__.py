"""Orthogonal Subspace Fine-Tuning: continual learning for language models.

Importing this package costs what torch and transformers cost; the subpackages import what else they
need where they use it.
"""

from osft.config import SubspaceConfig, TrainConfig
from osft.subspace import OSFTLinear

__version__ = "0.1.0"

__all__ = ["OSFTLinear", "SubspaceConfig", "TrainConfig", "__version__"]
