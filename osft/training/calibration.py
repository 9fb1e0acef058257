"""What the layers of the model in training are fed, measured when it is saved."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from osft.data.chat import Sample
from osft.data.packing import collate
from osft.likelihood import target_logits
from osft.subspace.linear import OSFTLinear
from osft.subspace.model import osft_layers
from osft.subspace.moments import input_moments
from osft.subspace.targets import transformer_blocks


class BlockMoments:
    """The second moments of the inputs of trained linear layers over some samples, a transformer block at a time.

    Asked for a layer, it runs the samples through the model and keeps the moments of the layer's block until another
    block is asked for: so many (n, n) matrices as the block has layers, and a forward pass for each block. Every
    process runs all samples, so call it on all of them alike.
    """

    def __init__(self, model: PreTrainedModel, samples: Sequence[Sample], device: torch.device) -> None:
        self._model, self._samples, self._device = model, samples, device
        stack, blocks = transformer_blocks(model)
        self._blocks = [f"{stack}.{number}." for number in range(len(blocks))]
        self._layers = {name: layer for name, layer in osft_layers(model) if isinstance(layer, OSFTLinear)}
        self._at, self._moments = "", dict[str, torch.Tensor]()

    def __call__(self, target: str) -> torch.Tensor | None:
        """C = E[x x^T], (n, n) float32, of a layer's inputs; None for what is no linear layer, such as experts."""
        if target not in self._layers:
            return None
        block = next(block for block in self._blocks if target.startswith(block))
        if block != self._at:
            self._at, self._moments = block, {}
            layers = {name: layer for name, layer in self._layers.items() if name.startswith(block)}
            self._moments = input_moments(layers, self._forward)
        return self._moments[target]

    def _forward(self) -> None:
        training = self._model.training
        self._model.eval()
        for sample in self._samples:
            target_logits(self._model, collate([sample]).to(self._device))
        self._model.train(training)
