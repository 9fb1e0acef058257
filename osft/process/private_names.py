"""The private names of other packages that osft cannot do without: no other module uses one.

A function for each says what the name is for and why no public one does; it imports its package when it is called. A
release may drop a private name, or change it, without a word: `tests/test_private_names.py` notices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What `from_pretrained` keeps in another dtype than `dtype`: patterns of names of tensors, and the dtype of each.

    transformers shows it nowhere else: a model that is built from its configuration alone has `dtype` throughout.
    """
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return plan
