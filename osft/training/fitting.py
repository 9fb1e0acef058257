"""The step that fits: how much of the update that training found is kept.

The drift of W0 + alpha D grows with alpha^2, what it gains, near D, hardly at all: half of a step that went too far
often gains more than the whole. So a few alpha are tried with the exact weights before the model is written:

    gain(alpha)   loss(W0) - loss(W0 + alpha D) on held-out samples (`osft.data.selection`), nats per token
    drift(alpha)  KL(W0 || W0 + alpha D) on text that the model wrote itself (`osft.training.teacher`), nats per token

and the alpha with the largest gain is taken of those whose drift is at most `max_step_drift`; where there is none, that
with the least drift. An update that gains at no alpha is kept at the best one: to refuse it is for whoever compares the
model with the one before.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from osft.data.packing import Feeding
from osft.data.samples import Samples
from osft.models.likelihood import residuals, sample_nll, stderr_of_sum
from osft.models.training_summary import FittedStep, TriedScale
from osft.settings.training import TrainConfig
from osft.subspace.model import coefficients_of, set_update_
from osft.training.teacher import TaughtBatch, taught


def fit_step(model: nn.Module, config: TrainConfig, selection: Samples, text: Samples, feeding: Feeding) -> FittedStep:
    """Scale the update of the trained model in place, as its settings say. Call it on all ranks.

    Raises RuntimeError where a loss is not finite.
    """
    updates = coefficients_of(model)
    num_loss_tokens, num_text_tokens = sum(selection.num_loss_tokens), sum(text.num_loss_tokens)

    set_update_(model, updates, 0.0)
    start_nll = sample_nll(model, selection, feeding)
    start = taught(model, text, feeding)
    start_loss = start_nll.sum().item() / num_loss_tokens

    tried = []
    for scale in config.step_scales:
        set_update_(model, updates, scale)
        nll = sample_nll(model, selection, feeding)
        loss = nll.sum().item() / num_loss_tokens
        drift = _divergence(model, start, feeding) / num_text_tokens
        if not (math.isfinite(loss) and math.isfinite(drift)):
            raise RuntimeError(
                f"fit_step: with {scale:g} of the update the loss is {loss} and the drift {drift}. Lower learning_rate"
            )
        error = stderr_of_sum(residuals((start_nll - nll).tolist(), selection.num_loss_tokens))
        assert error is not None, "of several samples"
        tried.append(TriedScale(scale=scale, loss=loss, gain=start_loss - loss, standard_error=error, drift=drift))
    chosen = choose(tried, config.max_step_drift)
    set_update_(model, updates, chosen.scale)
    return FittedStep(
        scale=chosen.scale,
        start_loss=start_loss,
        tried=tuple(tried),
        num_samples=len(selection.lengths),
        num_text_tokens=num_text_tokens,
        max_drift=config.max_step_drift,
        reason=_reason(chosen, config.max_step_drift),
    )


def choose(tried: Sequence[TriedScale], max_drift: float) -> TriedScale:
    """The largest gain within `max_drift`, the smaller step of equal ones; the least drift where none is within it."""
    within = [one for one in tried if one.drift <= max_drift]
    if not within:
        return min(tried, key=lambda one: (one.drift, one.scale))
    return min(within, key=lambda one: (one.loss, one.scale))


def _reason(chosen: TriedScale, max_drift: float) -> str:
    if chosen.drift > max_drift:
        return f"the least drift, as none is within max_step_drift={max_drift:g}"
    return "the largest gain" if chosen.gain > 0 else "the smallest loss, as none gains"


@torch.no_grad()
def _divergence(model: nn.Module, start: Sequence[TaughtBatch], feeding: Feeding) -> float:
    """The sum of KL(start || model) over the text, in nats, on every rank."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=feeding.device)
    for batch in start:
        total += batch.divergence(model, feeding.device).double().sum()
    if feeding.world_size > 1:
        torch.distributed.all_reduce(total)
    model.train()
    return total.item()
