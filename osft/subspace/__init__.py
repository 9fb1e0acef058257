"""The method: which weights are targets, how they are split, and the layers that learn in the free part."""

from osft.subspace.decomposition import Factors, decompose, unfrozen_rank
from osft.subspace.experts import OSFTExperts
from osft.subspace.linear import OSFTLinear
from osft.subspace.model import inject, merge, osft_layers, refresh
from osft.subspace.rank_allocation import allocate_ranks
from osft.subspace.targets import Target, select_targets, transformer_blocks

__all__ = [
    "Factors",
    "OSFTExperts",
    "OSFTLinear",
    "Target",
    "allocate_ranks",
    "decompose",
    "inject",
    "merge",
    "osft_layers",
    "refresh",
    "select_targets",
    "transformer_blocks",
    "unfrozen_rank",
]
