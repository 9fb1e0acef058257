"""The model's probability of the tokens that count."""

import torch
from torch import nn
from torch.nn import functional as F

from osft.data.packing import MicroBatch


def target_logits(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Logits that predict each target, (L, vocabulary), float32. Positions without a target cost no logits."""
    outputs = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        logits_to_keep=batch.loss_positions,
        use_cache=False,
    )
    return outputs.logits[0].float()


def token_nll(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Negative log-likelihood of each target in nats, (L,), float32."""
    return F.cross_entropy(target_logits(model, batch), batch.targets, reduction="none")
