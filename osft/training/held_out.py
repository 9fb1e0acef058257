"""The loss of the model in training on samples that it does not train on."""

import torch
from torch import nn

from osft.data.packing import Feeding
from osft.data.samples import Samples
from osft.models.likelihood import token_nll


@torch.no_grad()
def sample_nll(model: nn.Module, samples: Samples, feeding: Feeding) -> torch.Tensor:
    """Negative log-likelihood of the loss tokens of each sample, (num_samples,) float64, in nats.

    Call it on every rank; each gets all of them.
    """
    model.eval()
    nll = torch.zeros(len(samples.lengths), dtype=torch.float64, device=feeding.device)
    for indices, batch in feeding.batches(samples):
        found = token_nll(model, batch).double()
        if indices:  # else this rank only keeps the others company
            nll.index_add_(0, torch.tensor(indices, device=feeding.device)[batch.sample_of_target], found)
    if feeding.world_size > 1:
        torch.distributed.all_reduce(nll)
    model.train()
    return nll


def mean_nll(model: nn.Module, samples: Samples, feeding: Feeding) -> float:
    """Mean negative log-likelihood of all loss tokens, in nats. Call it on every rank."""
    return sample_nll(model, samples, feeding).sum().item() / sum(samples.num_loss_tokens)
