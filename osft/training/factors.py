"""Computing a factor set on the GPU. Started by `osft.training.inputs`: `python -m osft.training.factors …`."""

from typing import Any

import torch

from osft.training.inputs import compute_factors_here
from osft.training.own_process import answer


def compute(work: dict[str, Any]) -> dict[str, Any]:
    """Where the factor set is, and how many weights had to be decomposed for it."""
    factors = compute_factors_here(work, device="cuda" if torch.cuda.is_available() else "cpu")
    return {"path": str(factors.path), "computed": factors.computed}


if __name__ == "__main__":
    answer(compute)
