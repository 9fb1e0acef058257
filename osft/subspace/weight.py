"""What every trained weight shares: the update in coordinates of the free subspace.

The trained parameter is the update itself: `W = W0 + L X R^T`, with W0 frozen and X zero at the start. Whatever the
optimizer does to X, the update stays orthogonal to the frozen directions. Two things make it cheap:

- the forward pass uses one dense weight W, recomputed by `refresh_` once per optimizer step;
- where one side of X is long, the constraint on that side is one projection per optimizer step.

A split by inputs (protect="activations") needs no projection: D = X R^T is zero on the frozen directions whatever X is.
Its free directions are held back by degree instead. The curvature of the drift KL = 1/2 tr(S D C D^T) along X_ij is
s c_j (with S = s I), and one step of size lr on the penalty stiffness / 2 * s c_j X_ij^2 (online structured Laplace,
Ritter et al. 2018, arXiv:1805.07810), taken implicitly, is its proximal operator X_ij / (1 + lr stiffness s c_j), which
is stable for any size. It is applied after the optimizer's own step, as AdamW applies its decay.

A stack of experts' weights (num_experts, m, n) is split expert by expert; every tensor then has the experts as its
first dimension. Under FSDP2 every tensor is sharded by its first dimension. Of a single weight these are the rows:
`refresh_` computes each rank's rows of W and gathers only the small factor; no rank holds W0 whole. Of a stack they are
whole experts, and `refresh_` needs nothing from other ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from osft.process.vector_math import settle_vector_math
from osft.subspace.decomposition import Factors, SplitKind, factor_shapes

settle_vector_math()


def _two_of_three(left: torch.Tensor, middle: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A, B with A B = left middle right, the shorter side multiplied first: of a shard of rows, it is the left."""
    if left.shape[-2] <= right.shape[-1]:
        return left @ middle, right
    return left, middle @ right


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A weight, its split and the coefficients of its update, whole, on one device. `Factors` has the shapes."""

    base: torch.Tensor
    """W0, (m, n) or (num_experts, m, n), in the dtype in which it is kept."""
    coefficients: torch.Tensor
    left: torch.Tensor | None
    right: torch.Tensor | None
    frozen: torch.Tensor | None

    def update(self) -> torch.Tensor:
        """D = L X R^T, float32."""
        left, right = self._factors()
        return left @ right

    def weight(self) -> torch.Tensor:
        """W0 + D, float32, computed as in the forward pass of a model in float32."""
        left, right = self._factors()
        base = self.base.float()
        return torch.addmm(base, left, right) if base.ndim == 2 else torch.baddbmm(base, left, right)

    def free_part(self, change: torch.Tensor) -> torch.Tensor:
        """The part of any change of the weight that training could have made: orthogonal to the frozen directions.

        change: as the weight, float32. It is the projection that X goes through, on both sides.
        """
        if self.left is not None and self.right is not None:
            return self.left @ (self.left.mT @ change @ self.right) @ self.right.mT
        base = self.base.float()
        if self.left is None:
            assert self.right is not None
            columns = change @ self.right
            if self.frozen is not None:
                columns -= base @ (self.frozen @ (self.frozen.mT @ (base.mT @ columns)))
            return columns @ self.right.mT
        rows = self.left.mT @ change
        if self.frozen is not None:
            rows -= ((rows @ base.mT) @ self.frozen) @ self.frozen.mT @ base
        return self.left @ rows

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A, B with A B = L X R^T."""
        if self.left is None:
            assert self.right is not None
            return self.coefficients, self.right.mT
        if self.right is None:
            return self.left, self.coefficients
        return _two_of_three(self.left, self.coefficients, self.right.mT)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows, gathered from every rank; of a stack of experts, this rank's experts, which are whole."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) and tensor.ndim == 2 else local(tensor)


def _sum(part: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """The sum of all ranks' parts, whole on each."""
    if mesh is not None:
        torch.distributed.all_reduce(part, group=mesh.get_group())
    return part


def _rows_of_sum(part: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """This rank's rows of the sum of all ranks' parts."""
    if mesh is None:
        return part
    return DTensor.from_local(part, mesh, [Partial()], run_check=False).redistribute(placements=[Shard(0)]).to_local()


def _all_rows(rows: torch.Tensor, count: int, mesh: DeviceMesh | None) -> torch.Tensor:
    """(count, columns), of which each rank gives its rows."""
    if mesh is None:
        return rows
    shape = torch.Size((count, rows.shape[1]))
    stride = (rows.shape[1], 1)
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride).full_tensor()


Gather = Callable[[torch.Tensor], torch.Tensor]
"""`whole`, or what gives the same."""


class OSFTWeight(nn.Module):
    """A dense weight `W0 + L X R^T`, (m, n) or (num_experts, m, n), of which only X is trained.

    Subclasses hold the dense weight, under the name that it has in the model, and use it.

    Parameters: `coefficients`, the X of `Factors`, float32, trained, zero at the start; `left_basis` and
    `right_basis`, float32, frozen. Buffers: `base_weight` W0, `frozen_basis`, and of a split by inputs `curvature`,
    s c_j for each free direction as a multiple of the model's unit, (1, r) or (r, 1) as it is multiplied with X, with
    the experts in front. All but the coefficients are empty until `fill_`, or whoever reads them from a factor store,
    fills them.
    """

    tensor_suffix = ""
    """What follows the layer's name in the name of its dense weight in the model's state dict."""

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        rank: int,
        split_kind: SplitKind,
        base_dtype: torch.dtype | None,
        stiffness: float = 0.0,
    ) -> None:
        super().__init__()
        self.rank, self.split_kind, self.stiffness = rank, split_kind, stiffness
        device = weight.device
        shapes = factor_shapes(tuple(weight.shape), rank, split_kind)

        def basis(name: str) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shapes[name], device=device), False) if name in shapes else None

        self.coefficients = nn.Parameter(torch.zeros(shapes["coefficients"], dtype=torch.float32, device=device))
        self.left_basis = basis("left")
        self.right_basis = basis("right")
        # Buffers, so that FSDP2 does not gather them for the forward pass; loading shards them.
        base_weight = torch.empty(weight.shape, dtype=base_dtype or weight.dtype, device=device)
        frozen_basis = torch.empty(shapes["frozen"], device=device) if "frozen" in shapes else None
        self.register_buffer("base_weight", base_weight, persistent=False)
        self.register_buffer("frozen_basis", frozen_basis, persistent=False)
        curvature = torch.empty(shapes["curvature"], device=device) if "curvature" in shapes else None
        self.register_buffer("curvature", curvature, persistent=False)
        self.base_weight: torch.Tensor
        self.frozen_basis: torch.Tensor | None
        self.curvature: torch.Tensor | None

    def dense_weight(self) -> torch.Tensor:
        """The dense weight W that the forward pass uses."""
        raise NotImplementedError

    def bases(self) -> list[nn.Parameter]:
        """Those of `left_basis` and `right_basis` that the split has."""
        return [basis for basis in (self.left_basis, self.right_basis) if basis is not None]

    @torch.no_grad()
    def fill_(self, factors: Factors) -> None:
        """Take the dense weight as W0 and `factors` as its split."""
        self.base_weight.copy_(self.dense_weight())
        for own, given in (
            (self.left_basis, factors.left),
            (self.right_basis, factors.right),
            (self.frozen_basis, factors.frozen),
            (self.curvature, factors.curvature),
        ):
            if own is not None:
                assert given is not None, "factors of another shape or free subspace"
                own.copy_(given)

    @torch.no_grad()
    def refresh_(self, learning_rate: float, gather: Gather = whole) -> None:
        """Make X what it may be and recompute the dense weight. Call it after each optimizer step, with its rate.

        `gather` gathers what layers may share, the basis on the right; by default each time.
        """
        self._project_()
        if self.stiffness and self.curvature is not None:
            local(self.coefficients).div_(1 + learning_rate * self.stiffness * local(self.curvature))
        self.recompute_(gather)

    @torch.no_grad()
    def recompute_(self, gather: Gather = whole) -> None:
        """Recompute the dense weight from an X that is in the free subspace, such as one that was saved."""
        left, right = self._factors(gather)
        base, weight = local(self.base_weight), local(self.dense_weight())
        if weight.dtype == torch.float32:
            weight.copy_(base)
            weight.addmm_(left, right) if weight.ndim == 2 else weight.baddbmm_(left, right)
        else:  # one rounding, of the sum, beside which that of the update's factors is nothing
            with _tensor_cores(weight.device):
                update = left @ right
            weight.copy_(update.add_(base))

    @torch.no_grad()
    def update(self) -> torch.Tensor:
        """This rank's part of the update D = L X R^T, float32: rows or experts (all on a single process)."""
        left, right = self._factors(whole)
        return left @ right

    @torch.no_grad()
    def split(self) -> Split:
        """Everything whole, gathered from every rank: call it on all of them."""

        def full(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

        base, coefficients = full(self.base_weight), full(self.coefficients.detach())
        assert base is not None
        assert coefficients is not None
        return Split(
            base=base,
            coefficients=coefficients,
            left=full(self.left_basis),
            right=full(self.right_basis),
            frozen=full(self.frozen_basis),
        )

    def _project_(self) -> None:
        """X <- X - U U^T X on the long side, U = W0 B being the frozen directions of that side and B `frozen_basis`.

        U is never formed: it is as long as the weight, B as short as its other side. Neither W0 nor B is gathered:
        each rank multiplies with its rows, and what is sent is of the size of X or of a side of it.
        """
        if self.frozen_basis is None:
            return
        coefficients, basis = local(self.coefficients), local(self.frozen_basis)
        base, mesh = local(self.base_weight).to(coefficients.dtype), self._mesh()
        if self.left_basis is None:  # tall: the rows of X are those of the weight
            overlap = _rows_of_sum(base.mT @ coefficients, mesh)
            inside = _sum(basis.mT @ overlap, mesh)
            coefficients.sub_(base @ _all_rows(basis @ inside, base.shape[-1], mesh))
        else:  # wide: each row of X is orthogonalized by itself
            overlap = _sum(whole(self.coefficients) @ base.mT @ basis, mesh)
            coefficients.sub_(_rows_of_sum(overlap @ basis.mT @ base, mesh))

    def _mesh(self) -> DeviceMesh | None:
        """Over which rows are sharded; None on one process, and of experts, which are whole where they are."""
        coefficients = self.coefficients
        return coefficients.device_mesh if isinstance(coefficients, DTensor) and coefficients.ndim == 2 else None

    def _factors(self, gather: Gather) -> tuple[torch.Tensor, torch.Tensor]:
        """A, B with A B = this rank's part of L X R^T; A is sharded like the weight, B has what A needs."""
        if self.left_basis is None:
            assert self.right_basis is not None
            return local(self.coefficients), gather(self.right_basis).mT
        if self.right_basis is None:
            return local(self.left_basis), whole(self.coefficients)
        return _two_of_three(local(self.left_basis), whole(self.coefficients), gather(self.right_basis).mT)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        shape = tuple(self.base_weight.shape)
        return f"weight={shape}, rank={self.rank}, split_kind={self.split_kind}"


@contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """On a GPU, products of float32 numbers by its tensor cores, which read 10 bits of each mantissa (TF32)."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class DifferentiableWeight(torch.autograd.Function):
    """The dense weight, with a gradient for the subspace coefficients: L^T G R of its gradient G."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        coefficients: torch.Tensor,
        left: torch.Tensor | None,
        right: torch.Tensor | None,
    ) -> torch.Tensor:
        """The weight as it is."""
        ctx.save_for_backward(left, right)
        ctx.coefficients_dtype = coefficients.dtype
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """A gradient for the coefficients."""
        (gradient,) = grad_outputs
        left, right = ctx.saved_tensors
        if left is not None:
            gradient = left.mT.to(gradient.dtype) @ gradient
        if right is not None:
            gradient = gradient @ right.to(gradient.dtype)
        return None, gradient.to(ctx.coefficients_dtype), None, None
