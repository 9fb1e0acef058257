"""Experts that learn in the free subspace, each in its own.

Models of the mixture-of-experts kind stack one projection of all experts of a block in one parameter
(num_experts, m, n), and read it in many ways (a loop, grouped matrix products, fused kernels). Here the module of the
experts stays as it is, and while its forward pass runs it finds, in the place of its parameter, the same dense weight
as a result of the coefficients. A layer that is derived from a linear one and computes something of its own with its
weight (the router of Llama 4) is treated in the same way.
"""

from typing import Any

import torch
from torch import nn

from osft.subspace.decomposition import SplitKind
from osft.subspace.weight import DifferentiableWeight, OSFTWeight


class OSFTExperts(OSFTWeight):
    """The split of one stacked parameter of experts, a child of the module that holds the parameter.

    The parameter stays where it is, frozen, and is the dense weight. Unlike in `OSFTLinear`, the backward pass forms
    its dense gradient (num_experts, m, n), of one block at a time, because how the experts use their weights is up to
    them. No auxiliary loss balances the experts: their routers are not trained.
    """

    name_suffix = "_subspace"
    """What follows the parameter's name in the name of this child."""

    def __init__(
        self,
        experts: nn.Module,
        parameter_name: str,
        *,
        rank: int,
        split_kind: SplitKind = "complement",
        base_dtype: torch.dtype | None = None,
        stiffness: float = 0.0,
    ) -> None:
        weight = experts.get_parameter(parameter_name).requires_grad_(False)
        super().__init__(weight, rank=rank, split_kind=split_kind, base_dtype=base_dtype, stiffness=stiffness)
        self.parameter_name = parameter_name
        object.__setattr__(self, "_experts", experts)  # not as a child: it is the parent
        self._experts: nn.Module
        self._hooks = (
            experts.register_forward_pre_hook(self._show),
            # Also after an exception: recomputing activations ends a forward pass with one.
            experts.register_forward_hook(self._hide, always_call=True),
        )
        experts.add_module(parameter_name + self.name_suffix, self)

    def dense_weight(self) -> torch.Tensor:
        """The dense weight W that the forward pass uses."""
        return self._experts.get_parameter(self.parameter_name)

    def forward(self) -> torch.Tensor:
        """(num_experts, m, n): the dense weight, through which the coefficients get their gradient."""
        return DifferentiableWeight.apply(self.dense_weight(), self.coefficients, self.left_basis, self.right_basis)

    def remove(self) -> None:
        """Leave the experts with their dense weight and nothing else."""
        for hook in self._hooks:
            hook.remove()
        delattr(self._experts, self.parameter_name + self.name_suffix)

    # An instance attribute is found before a parameter of the same name, which nn.Module keeps apart.
    def _show(self, experts: nn.Module, _inputs: Any) -> None:
        experts.__dict__[self.parameter_name] = self()

    def _hide(self, experts: nn.Module, _inputs: Any, _output: Any) -> None:
        experts.__dict__.pop(self.parameter_name, None)
