"""How many rows of logits are computed on at a time, where what is computed is several times as large as they are."""

import torch

ELEMENTS_AT_ONCE = 2**24
"""Logits in float32 at a time: 64 MiB. In float64, twice that."""
ELEMENTS_IN_CACHE = 2**19
"""At a time on a CPU, where 64 MiB are asked of the system anew each time: a divergence takes a third of the time."""


def row_slices(logits: torch.Tensor) -> list[slice]:
    """Rows that are computed at a time."""
    elements = min(ELEMENTS_AT_ONCE, ELEMENTS_IN_CACHE) if logits.device.type == "cpu" else ELEMENTS_AT_ONCE
    rows = max(1, elements // max(1, logits.shape[1]))
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]
