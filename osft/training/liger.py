"""Liger kernels: when they are used, and on what.

They replace the forward passes of norms, gated MLPs and rotary embeddings by fused Triton kernels
(github.com/linkedin/Liger-Kernel). The linear layers stay ours. They need CUDA: on a CPU they import and patch, and
then fail in the first forward pass, so the decision is made before a process starts.
"""

import importlib.util
import logging

import torch
from transformers import PreTrainedModel

from osft.settings.training import TrainConfig

logger = logging.getLogger(__name__)


def liger_wanted(config: TrainConfig) -> bool:
    """Whether the run uses Liger kernels. Raises ValueError if they are asked for and cannot work here."""
    installed = importlib.util.find_spec("liger_kernel") is not None
    if config.use_liger:
        if not installed:
            raise ValueError("use_liger=True needs the package liger-kernel. Install it: pip install 'osft[liger]'")
        if not torch.cuda.is_available():
            raise ValueError("use_liger=True needs a CUDA GPU, and there is none here. Leave it out or set it to False")
    return config.use_liger is not False and installed and torch.cuda.is_available()


def apply_liger(model: PreTrainedModel) -> None:
    """Replace what Liger has kernels for in `model`, in place. A model type that Liger does not know is left alone."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        logger.warning(f"train: Liger has no kernels for {model.config.model_type}, training continues without")
        return
    # The loss is ours: only the tokens that count get logits (osft.models.likelihood).
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
