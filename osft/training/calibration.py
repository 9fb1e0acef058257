"""What the layers of the model in training are fed, measured when it is saved."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from osft.data.chat import Sample
from osft.data.packing import Batching
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

    def __init__(self, model: PreTrainedModel, samples: Sequence[Sample], device: torch.device) -> None:
        self._model, self._samples, self._device = model, samples, device
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
        distributed = torch.distributed.is_initialized()
        measured = measure_inputs(
            self._model,
            targets,
            self._samples,
            device=self._device,
            max_tokens=max(len(sample.input_ids) for sample in self._samples),
            batching=Batching.PADDED,  # right for every model
            gradients=False,
            rank=torch.distributed.get_rank() if distributed else 0,
            world_size=torch.distributed.get_world_size() if distributed else 1,
        )
        return {name: sums.inputs for sums in measured for name in sums.targets if sums.inputs is not None}
