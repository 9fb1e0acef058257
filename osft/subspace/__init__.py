"""The method: which weights are targets, how they are split, and the layer that learns in the free part."""

from osft.subspace.decomposition import Factors, decompose, unfrozen_rank
from osft.subspace.linear import OSFTLinear
from osft.subspace.model import inject, merge, osft_layers, refresh
from osft.subspace.targets import select_targets, transformer_blocks

__all__ = [
    "Factors",
    "OSFTLinear",
    "decompose",
    "inject",
    "merge",
    "osft_layers",
    "refresh",
    "select_targets",
    "transformer_blocks",
    "unfrozen_rank",
]
