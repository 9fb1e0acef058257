"""The layer that learns in the free subspace.

The trained parameter is the update itself, in the coordinates of the free subspace: `W = W0 + L X R^T`, with
W0 frozen and X zero at the start. Whatever the optimizer does to X, the update stays orthogonal to the frozen
directions. Three things make a step cheap:

- the forward pass uses one dense weight W, recomputed by `refresh_` once per optimizer step;
- the backward pass never forms the m x n gradient: `dX = (dY L)^T (X_in R)`, so that of the input only
  `X_in R` (r columns instead of n) is kept;
- where one side of X is long, the constraint on that side is one projection per optimizer step.

Under FSDP2 every tensor is sharded by rows; `refresh_` computes each rank's rows of W and gathers only the
small factor.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from osft.config import FreeSubspace
from osft.subspace.decomposition import Factors, factor_shapes


class _SubspaceLinear(torch.autograd.Function):
    """`x W^T + b`, with a gradient for the input and for the subspace coefficients only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        coefficients: torch.Tensor,
        left: torch.Tensor | None,
        right: torch.Tensor | None,
    ) -> torch.Tensor:
        reduced = x if right is None else x @ right.to(x.dtype)
        ctx.save_for_backward(reduced, weight, left)
        ctx.coefficients_dtype = coefficients.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = grad_outputs
        reduced, weight, left = ctx.saved_tensors
        grad_input = grad_output @ weight if ctx.needs_input_grad[0] else None
        grad_reduced = grad_output if left is None else grad_output @ left.to(grad_output.dtype)
        grad_coefficients = grad_reduced.flatten(0, -2).T @ reduced.flatten(0, -2)
        return grad_input, None, None, grad_coefficients.to(ctx.coefficients_dtype), None, None


class OSFTLinear(nn.Module):
    """A linear layer whose weight is `W0 + L X R^T`; only X is trained.

    Made empty (`device="meta"` for large models) by the constructor, or filled by `from_linear`. `weight` and
    `bias` keep the names and shapes of the layer that this one replaces, so a checkpoint of the merged model is
    the state dict restricted to the model's own names.

    Parameters: `weight` (m, n) and `bias` (m,), frozen; `coefficients`, the X of `Factors`, float32, trained;
    `left_basis` and `right_basis`, float32, frozen. Buffers: `base_weight` W0, `frozen_basis`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        bias: bool = False,
        free_subspace: FreeSubspace = "complement",
        dtype: torch.dtype = torch.float32,
        base_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.free_subspace = rank, free_subspace
        shapes = factor_shapes((out_features, in_features), rank, free_subspace)

        def frozen(shape: tuple[int, ...], of: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=of, device=device), requires_grad=False)

        def basis(name: str) -> nn.Parameter | None:
            return frozen(shapes[name], torch.float32) if name in shapes else None

        self.weight = frozen((out_features, in_features), dtype)
        self.bias = frozen((out_features,), dtype) if bias else None
        self.coefficients = nn.Parameter(torch.zeros(shapes["coefficients"], dtype=torch.float32, device=device))
        self.left_basis = basis("left")
        self.right_basis = basis("right")
        # Buffers, so that FSDP2 does not gather them for the forward pass; `shard` splits them by rows.
        self.register_buffer(
            "base_weight",
            torch.empty((out_features, in_features), dtype=base_dtype or dtype, device=device),
            persistent=False,
        )
        frozen_basis = torch.empty(shapes["frozen"], device=device) if "frozen" in shapes else None
        self.register_buffer("frozen_basis", frozen_basis, persistent=False)
        self.base_weight: torch.Tensor
        self.frozen_basis: torch.Tensor | None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, factors: Factors, *, rank: int, free_subspace: FreeSubspace = "complement"
    ) -> "OSFTLinear":
        """A layer that computes what `linear` computes, ready to train."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            rank=rank,
            bias=linear.bias is not None,
            free_subspace=free_subspace,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        with torch.no_grad():
            layer.base_weight.copy_(linear.weight)
            layer.weight.copy_(linear.weight)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
            for own, given in (
                (layer.left_basis, factors.left),
                (layer.right_basis, factors.right),
                (layer.frozen_basis, factors.frozen),
            ):
                if own is not None:
                    assert given is not None, "factors of another shape or free subspace"
                    own.copy_(given)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        return _SubspaceLinear.apply(x, self.weight, self.bias, self.coefficients, self.left_basis, self.right_basis)

    @torch.no_grad()
    def refresh_(self) -> None:
        """Put X back into the free subspace and recompute the dense weight. Call it after each optimizer step."""
        self._project_()
        left, right = self._row_factors()
        base, weight = _rows(self.base_weight), _rows(self.weight)
        if weight.dtype == torch.float32:
            weight.copy_(base).addmm_(left, right)
        else:  # one rounding, of the sum
            weight.copy_(torch.addmm(base.float(), left, right))

    @torch.no_grad()
    def update(self) -> torch.Tensor:
        """This rank's rows of the update D = L X R^T, float32 (all rows on a single process)."""
        left, right = self._row_factors()
        return left @ right

    def _project_(self) -> None:
        """X <- X - B B^T X on the long side, B being the frozen directions of that side."""
        if self.frozen_basis is None:
            return
        coefficients = _rows(self.coefficients)
        if self.left_basis is None:  # tall: the rows of X are those of the weight, and each rank holds its own
            basis = _rows(self.frozen_basis)
            overlap = basis.T @ coefficients
            if isinstance(self.coefficients, DTensor):
                torch.distributed.all_reduce(overlap, group=self.coefficients.device_mesh.get_group())
            coefficients.sub_(basis @ overlap)
        else:  # wide: each row of X is orthogonalized by itself
            basis = _whole(self.frozen_basis)
            coefficients.sub_((coefficients @ basis) @ basis.T)

    def _row_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A, B with A B = this rank's rows of L X R^T; A is sharded like the weight, B is whole."""
        if self.left_basis is None:
            assert self.right_basis is not None
            return _rows(self.coefficients), _whole(self.right_basis).T
        if self.right_basis is None:
            return _rows(self.left_basis), _whole(self.coefficients)
        return _rows(self.left_basis), _whole(self.coefficients) @ _whole(self.right_basis).T

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={self.rank}, free_subspace={self.free_subspace}"
        )


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The rows that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows, gathered from every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
