"""A linear layer that learns in the free subspace.

The backward pass never forms the gradient of the dense weight: `dX = (dY L)^T (X_in R)`, so that of the input only
`X_in R` (r columns instead of n) is kept. Layers that are split by the inputs they have in common (q, k and v; gate and
up) have one R, and one `X_in R` between them.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

from osft.models.cpu_linear import fast_linear
from osft.process.private_names import version_of
from osft.subspace.decomposition import SplitKind
from osft.subspace.weight import DifferentiableWeight, OSFTWeight


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, transposed: bool) -> torch.Tensor:
    """`x W^T + b`, or `x W + b` if `transposed`."""
    if not transposed:
        return fast_linear(x, weight, bias)
    assert bias is not None  # of a Conv1D
    # The same operation as in Conv1D, for the same rounding.
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    """In which x is multiplied here: autocast's, or its own."""
    kind = x.device.type
    has_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if has_autocast else x.dtype


class _SubspaceLinear(torch.autograd.Function):
    """`_linear` with gradients for the input and the subspace coefficients only.

    reduced: x times the basis of the inputs, or None where the split has no such basis.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        coefficients: torch.Tensor,
        reduced: torch.Tensor | None,
        output_basis: torch.Tensor | None,
        transposed: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x if reduced is None else reduced, weight, output_basis)
        ctx.coefficients_dtype, ctx.transposed = coefficients.dtype, transposed
        return _linear(x, weight, bias, transposed=transposed)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = grad_outputs
        reduced, weight, output_basis = ctx.saved_tensors
        grad_reduced = grad_output
        if output_basis is not None:
            grad_reduced = fast_linear(grad_output, output_basis.to(grad_output.dtype).T)
        rows, columns = (reduced, grad_reduced) if ctx.transposed else (grad_reduced, reduced)
        grad_coefficients = rows.flatten(0, -2).T @ columns.flatten(0, -2)
        del reduced, rows, columns  # what was computed again for this is as large as the gradient that follows
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = fast_linear(grad_output, weight if ctx.transposed else weight.T)
        return grad_input, None, None, grad_coefficients.to(ctx.coefficients_dtype), None, None, None


class OSFTLinear(OSFTWeight):
    """A linear layer whose weight is `W0 + L X R^T`; only X is trained.

    It takes over the weight and the bias of the layer that it replaces, under their names and as they are stored:
    (out_features, in_features) of `nn.Linear`, (in_features, out_features) of `Conv1D`. So a checkpoint of the
    merged model is the state dict restricted to the model's own names. The constraint is the same for a weight and
    its transpose.

    Parameters beside those of `OSFTWeight`: `weight` and `bias` (out_features,), frozen.
    """

    tensor_suffix = ".weight"

    def __init__(
        self,
        linear: nn.Linear | Conv1D,
        *,
        rank: int,
        split_kind: SplitKind = "complement",
        base_dtype: torch.dtype | None = None,
        stiffness: float = 0.0,
    ) -> None:
        super().__init__(linear.weight, rank=rank, split_kind=split_kind, base_dtype=base_dtype, stiffness=stiffness)
        self.transposed = isinstance(linear, Conv1D)
        self._hooks: tuple[RemovableHandle, ...] = ()
        self._is_shown = False
        self._reduced_inputs: WeakTensorKeyDictionary | None = None  # one of all layers that share their basis
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias.requires_grad_(False) if linear.bias is not None else None

    def dense_weight(self) -> nn.Parameter:
        """The dense weight W that the forward pass uses."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def keeps_inputs(self) -> bool:
        """Whether the backward pass needs the inputs themselves: X has a column for each of them."""
        return (self.left_basis if self.transposed else self.right_basis) is None

    def share_input_basis(self, other: "OSFTLinear") -> None:
        """Take over the basis of the inputs from a layer that is split by the same inputs.

        `x R` is then computed, and kept for the backward pass, once for all layers that are given the very same x.
        """
        assert self.split_kind == other.split_kind, "one input is on one side"
        if other._reduced_inputs is None:
            other._reduced_inputs = WeakTensorKeyDictionary()
        self._reduced_inputs = other._reduced_inputs
        if self.transposed:
            self.left_basis = other.left_basis
        else:
            self.right_basis = other.right_basis

    def read_by(self, block: nn.Module) -> None:
        """Let the transformer block that holds this layer train it also by reading `weight` to compute with it itself.

        Mamba's and Gemma 3n's do. What is read is differentiable only while the block computes: to FSDP2 and everybody
        else `weight` is the frozen parameter.
        """
        self._hooks = (
            block.register_forward_pre_hook(self._show),
            # Also after an exception: recomputing activations ends a forward pass with one.
            block.register_forward_hook(self._hide, always_call=True),
        )

    def _show(self, *_: Any) -> None:
        self._is_shown = True

    def _hide(self, *_: Any) -> None:
        self._is_shown = False

    def __getattr__(self, name: str) -> Any:
        """As of any module, but for the weight that a block reads (`read_by`)."""
        value = super().__getattr__(name)
        if name == "weight" and self._is_shown and torch.is_grad_enabled():
            return DifferentiableWeight.apply(value, self.coefficients, self.left_basis, self.right_basis)
        return value

    def merged(self) -> nn.Linear | Conv1D:
        """The plain layer that this one has become; it shares the weight."""
        for hook in self._hooks:
            hook.remove()
        weight = self.dense_weight()
        with torch.device("meta"):
            if self.transposed:
                plain: nn.Linear | Conv1D = Conv1D(weight.shape[1], weight.shape[0])
            else:
                plain = nn.Linear(weight.shape[1], weight.shape[0], bias=self.bias is not None)
        plain.weight = weight
        if self.bias is not None:
            plain.bias = self.bias
        return plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight, transposed = self.dense_weight(), self.transposed
        if not (torch.is_grad_enabled() and self.coefficients.requires_grad):  # nothing is learned
            return _linear(x, weight, self.bias, transposed=transposed)
        input_basis, output_basis = self.left_basis, self.right_basis
        if not transposed:
            input_basis, output_basis = output_basis, input_basis
        reduced = None if input_basis is None else self._reduce(x, input_basis)
        return _SubspaceLinear.apply(x, weight, self.bias, self.coefficients, reduced, output_basis, transposed)

    @torch.no_grad()
    def _reduce(self, x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        """(..., r): x R, computed here or by a layer before that shares R and was given the same x.

        What is known of x is forgotten with x, so that nothing is held for longer than the layers keep it.
        """
        known = self._reduced_inputs
        if known is None or torch.compiler.is_compiling():  # the compiler finds what is computed twice
            return fast_linear(x, basis.to(x.dtype).T)
        computed_from = (version_of(x), version_of(basis), _product_dtype(x))
        found: tuple[tuple[int, int, torch.dtype], torch.Tensor] | None = known.get(x)
        if found is not None and found[0] == computed_from:
            return found[1]
        reduced = fast_linear(x, basis.to(x.dtype).T)
        known[x] = computed_from, reduced
        return reduced
