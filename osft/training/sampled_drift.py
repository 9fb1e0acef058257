"""How far the update of each weight moves the model by itself, without what the Kronecker form assumes.

For the update D of one weight, all others staying as they were, and the gradient G of the log-likelihood of a text
whose every next token the start draws itself, given the tokens before it,

    KL(start || start + D) = 1/2 E[<G, D>^2]      nats, over all positions of the text, to second order

(the Fisher information along D). Tokens that are drawn apart have scores that are uncorrelated, so the square of the
whole sum is right; G is a sum over the text's tokens, and their cross terms are in it, as is what inputs and gradients
of a token have to do with each other. Both are what tr(S D C D^T) leaves out (`osft.training.predicted_drift`).
In the coordinates of the free subspace <G, D> is the product of X with its own gradient: a forward and a backward pass
give it of all weights at once.

A draw is one sum <G, D>. Were they normal, n draws would have a relative standard error of sqrt(2 / n); their tails are
heavier, of queries and keys up to twice that, so it is measured. Unlike a difference of two models' predictions, which
drowns in bfloat16's rounding, it is as good as any gradient in any dtype.

Over the measured KL of each weight's update alone, on SmolLM2-135M (5 steps of 512 tokens of German manual pages, ratio
0.25, stiffness 10,000, learning rate 1e-3; the 35 weights of blocks 0, 8, 15, 22 and 29, measured on 512 tokens of web
text; statistics of 2,048 tokens, these among them):

                                                            ratio to the measured    weights within 10 %   20 %
    1/2 tr(S D C D^T), Kronecker form                       0.45 to 6.8, median 0.89          23 %          54 %
    the same, times the ratio of the first step's update    0.45 to 1.4, median 0.98          69 %          86 %
    1/2 Var_p(change of the logits), exact                  1.00                             100 %         100 %
    sampled, 60 draws                                       0.69 to 1.43, median 1.05         43 %          66 %
    sampled, 120 draws                                      0.81 to 1.33, median 1.02         57 %          89 %

The exact form takes a forward pass for each weight, 210 there, and float32. A draw of 128 tokens took 2.6 s of a core
for all weights together. The first and the second half of the text differ by 0.5 to 2.2, 29 % as a root mean square:
no better is any of these numbers known of another text, and a part of what the Kronecker form misses is that its
statistics are of more text.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from osft.data.packing import Feeding
from osft.data.samples import Samples
from osft.models.likelihood import cross_entropy, target_logits
from osft.models.training_summary import SamplingQuality
from osft.subspace.calibration import sample_tokens
from osft.subspace.model import coefficients_of, osft_layers, set_update_
from osft.subspace.weight import local

DRAWS = 200
"""A relative standard error of about 10 %."""
FEWEST_DRAWS = 50
"""About 20 %; with fewer, nothing is said."""
TRAINED_FOR_ONE = 10
"""Tokens that were trained on for one that may be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledDrift:
    """What was found."""

    by_target: dict[str, float]
    """KL(start || start + the update of this target alone), nats per token of the text."""
    draws: int
    relative_error: float
    """Standard error of each value as a share of it, root mean square over the targets."""

    @property
    def quality(self) -> SamplingQuality:
        """How well it is known, for the summary of a run."""
        return SamplingQuality(draws=self.draws, relative_error=self.relative_error)


def sampled_drift(
    model: nn.Module, text: Samples, feeding: Feeding, *, seed: int = 0, draws: int = DRAWS
) -> SampledDrift:
    """The drift by each weight of a model in training, over `text` that the start wrote. Call it on all ranks.

    Each sample is read until there are at least `draws` draws. The model's update is as before when it returns.
    """
    layers = dict(osft_layers(model))
    updates = coefficients_of(model)
    few = replace(feeding, max_tokens=max(text.lengths))  # a micro-batch is a draw
    squares = torch.zeros(len(layers), dtype=torch.float64, device=feeding.device)
    fourth_powers = torch.zeros_like(squares)
    done = repeats = 0
    set_update_(model, updates, 0.0)
    model.eval()
    while done < draws:
        for indices, batch in few.batches(text):
            logits = target_logits(model, batch)
            # Each rank draws for its own samples.
            uniforms = np.random.default_rng([seed, repeats, *indices]).random(len(batch.targets))
            drawn = sample_tokens(logits.detach(), torch.from_numpy(uniforms).to(feeding.device))
            cross_entropy(logits, drawn).sum().backward()
            products = torch.stack([_product(layer.coefficients, updates[name]) for name, layer in layers.items()])
            if feeding.world_size > 1:
                torch.distributed.all_reduce(products)
                products *= feeding.world_size  # FSDP2 averages gradients over processes
            squares += products.square()
            fourth_powers += products**4
            done += 1
        repeats += 1
    set_update_(model, updates, 1.0)
    model.train()
    drift = squares / (2 * repeats * sum(text.num_loss_tokens))
    variances = done * fourth_powers / squares.square().clamp_min(1e-300) - 1  # of a draw's square, relative
    return SampledDrift(
        by_target=dict(zip(layers, drift.tolist(), strict=True)),
        draws=done,
        relative_error=(variances.clamp_min(0).mean().item() / done) ** 0.5,
    )


def affordable_draws(text: Samples, trained_tokens: int) -> int:
    """How many draws cost a share of the training; 0 where they are too few to say anything."""
    draws = min(DRAWS, trained_tokens // TRAINED_FOR_ONE // max(text.lengths))
    return draws if draws >= FEWEST_DRAWS else 0


def sample_drift_of_run(
    model: nn.Module, text: Samples | None, feeding: Feeding, *, trained_tokens: int, seed: int
) -> SampledDrift | None:
    """`sampled_drift` with as many draws as are affordable, if all ranks have one text. Call it on all of them."""
    draws = affordable_draws(text, trained_tokens) if text else 0
    if feeding.world_size > 1:  # nodes without a shared folder may have written other texts, or have none
        mine, everyone = text.lengths if text else None, [None] * feeding.world_size
        torch.distributed.all_gather_object(everyone, mine)
        draws = draws if all(lengths == mine for lengths in everyone) else 0
    return sampled_drift(model, text, feeding, seed=seed, draws=draws) if text and draws else None


def _product(coefficients: nn.Parameter, update: torch.Tensor) -> torch.Tensor:
    """<G, D> of this rank's part of a weight, (), float64; takes the gradient away."""
    gradient, coefficients.grad = coefficients.grad, None
    if gradient is None:  # of an expert that no token reached
        return torch.zeros((), dtype=torch.float64, device=update.device)
    return (local(gradient) * update).sum(dtype=torch.float64)
