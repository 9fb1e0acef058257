"""What the layers of the model in training are fed, measured when it is saved."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from osft.data.chat import Sample
from osft.data.packing import Batching, Feeding
from osft.subspace.calibration import measure_inputs
from osft.subspace.linear import OSFTLinear
from osft.subspace.model import osft_layers
from osft.subspace.targets import Target, transformer_blocks


class BlockMoments:
    """The second moments of the inputs of trained linear layers over some samples, a transformer block at a time.

    Asked for a layer, it runs the samples through the model and keeps the moments of the layer's block until another
    block is asked for: so many (n, n) matrices as the block has inputs, and a pass over the samples for each block.
    Every process runs its share of the samples, so call it on all of them alike.
    """

    def __init__(self, model: PreTrainedModel, samples: Sequence[Sample], feeding: Feeding) -> None:
        self._model, self._samples = model, samples
        longest = max(len(sample.input_ids) for sample in samples)
        # A row for each sample is right for every model.
        self._feeding = replace(feeding, max_tokens=longest, batching=Batching.PADDED)
        stack, blocks = transformer_blocks(model)
        self._blocks = [f"{stack}.{number}." for number in range(len(blocks))]
        self._targets = [
            Target(name, name + layer.tensor_suffix, tuple(layer.base_weight.shape))
            for name, layer in osft_layers(model)
            if isinstance(layer, OSFTLinear)
        ]
        self._at, self._moments = "", dict[str, torch.Tensor]()

    def __call__(self, target: str) -> torch.Tensor | None:
        """C = E[x x^T], (n, n) float32, of a layer's inputs; None for what is no linear layer, such as experts."""
        if target not in {each.name for each in self._targets}:
            return None
        block = next(block for block in self._blocks if target.startswith(block))
        if block != self._at:
            self._at, self._moments = block, {}
            self._moments = self._measured([each for each in self._targets if each.name.startswith(block)])
        return self._moments[target]

    def _measured(self, targets: Sequence[Target]) -> dict[str, torch.Tensor]:
        measured = measure_inputs(self._model, targets, self._samples, feeding=self._feeding, gradients=False)
        return {name: sums.inputs for sums in measured for name in sums.targets if sums.inputs is not None}
