"""Second moments `M = E[v v^T]` of vectors, whole or as their leading directions and the mean of the rest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import torch

_RANDOMIZED_BELOW = 4
"""Where at most one direction in so many is kept, only the leading ones are computed."""
_DOUBLE_UP_TO = 512
"""Wider ones are decomposed in float32, twice as fast. Of SmolLM2-135M's inputs the half with the least energy then has
at most 1.0006 (576 wide) and 1.0002 (1,536 wide) of the energy that it has in float64, the median below 1.000001."""
_GRAM_BLOCK = 192
"""Rows of a matrix of products that are computed together, at least."""
_OVERSAMPLING, _ITERATIONS = 16, 4
"""Of the randomized subspace iteration: on spectra of activations, energies to 1e-3 (tests/subspace)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SecondMoment:
    """M = E[v v^T] of vectors v (n,): `basis diag(energies) basis^T + rest (I - basis basis^T)`; of each expert."""

    basis: torch.Tensor
    """(n, k) or (num_experts, n, k), float32: orthonormal columns, the direction of the most energy first."""
    energies: torch.Tensor
    """(k,) or (num_experts, k), float32: the mean square of v along each, descending, >= 0."""
    rest: torch.Tensor
    """() or (num_experts,), float32: the mean energy of the n - k other directions; 0 where there are none."""
    error_bound: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """() or (num_experts,), float32: the spectral norm of what leaving directions out has changed, at most."""

    @classmethod
    def of(cls, matrix: torch.Tensor, max_rank: int | None = None) -> "SecondMoment":
        """The moment with the matrix M (n, n) or (num_experts, n, n), symmetric, whole or of its leading directions.

        The trace is kept. Where few directions are kept they are found by subspace iteration (Halko et al. 2011,
        arXiv:0909.4061), else from the eigendecomposition. Raises ValueError for NaN and infinity.
        """
        if matrix.ndim == 3:  # one by one: the double precision that it takes is that of one expert
            return cls.stack([cls.of(expert, max_rank) for expert in matrix])
        if not torch.isfinite(matrix).all():
            raise ValueError("a second moment holds NaN or infinity")
        n = matrix.shape[-1]
        rank = n if max_rank is None else min(max_rank, n)
        trace = matrix.diagonal().double().sum()
        if rank * _RANDOMIZED_BELOW <= n:
            energies, basis = _leading(matrix.float(), rank)
            rest = (trace - energies.sum()).clamp_min(0) / (n - rank)
            # The Frobenius norm of what is left.
            squares = matrix.double().square().sum() - energies.square().sum() - (n - rank) * rest.square()
            error = squares.clamp_min(0).sqrt()
        else:
            values, vectors = torch.linalg.eigh(matrix.double() if n <= _DOUBLE_UP_TO else matrix.float())
            values, basis = values.flip(-1).clamp_min(0), vectors.flip(-1)[:, :rank]
            energies, left_out = values[:rank], values[rank:]
            rest = (trace - energies.sum()).clamp_min(0) / max(1, n - rank) if rank < n else trace.new_zeros(())
            error = (left_out - rest).abs().max() if rank < n else trace.new_zeros(())
        return cls(
            basis=basis.float().contiguous(),
            energies=energies.float(),
            rest=rest.float(),
            error_bound=error.float(),
        )

    @classmethod
    def stack(cls, experts: Sequence["SecondMoment"]) -> "SecondMoment":
        """The moments of the experts of a block in one."""
        return cls(**{name: torch.stack([getattr(expert, name) for expert in experts]) for name in cls.tensor_names()})

    @classmethod
    def tensor_names(cls) -> list[str]:
        """The names of the tensors that it is made of."""
        return [each.name for each in fields(cls)]

    @property
    def size(self) -> int:
        """n, the length of the vectors."""
        return self.basis.shape[-2]

    @property
    def rank(self) -> int:
        """k, the number of directions that are known one by one."""
        return self.basis.shape[-1]

    def orthonormalized(self) -> "SecondMoment":
        """The same with a basis that is orthonormal to float32, of one that is so to float16."""
        return replace(self, basis=orthonormalized(self.basis, self.rank))

    def dense(self) -> torch.Tensor:
        """M, (n, n) or (num_experts, n, n), float32."""
        identity = torch.eye(self.size, device=self.basis.device)
        return (self.basis * self._above()[..., None, :]) @ self.basis.mT + self.rest[..., None, None] * identity

    def _above(self) -> torch.Tensor:
        """By how much each direction's energy exceeds the rest's."""
        return self.energies - self.rest[..., None]

    def trace(self) -> torch.Tensor:
        """The mean square of the vectors' length, () or (num_experts,)."""
        return self.energies.sum(-1) + self.rest * (self.size - self.rank)

    def scaled(self, factor: torch.Tensor | float) -> "SecondMoment":
        """The moment times a factor >= 0, a number or one for each expert (num_experts,)."""
        factor = torch.as_tensor(factor, dtype=torch.float32, device=self.rest.device)
        return replace(
            self,
            energies=self.energies * factor[..., None],
            rest=self.rest * factor,
            error_bound=self.error_bound * factor,
        )

    def to(self, device: torch.device | str) -> "SecondMoment":
        """The same on `device`."""
        return SecondMoment(**{name: getattr(self, name).to(device) for name in self.tensor_names()})

    def plus(self, matrix: torch.Tensor, max_rank: int) -> "SecondMoment":
        """The sum with the moment with the matrix (n, n) or (num_experts, n, n), float32, which is overwritten by it.

        On the matrix's device, of `max_rank` directions or as many as this moment has; exact where that is all. The
        leading directions of the sum are those of what was kept: `error_bound` adds up.
        """
        known = self.to(matrix.device)
        scaled = known.basis * known._above()[..., None, :]
        if matrix.ndim == 3:
            matrix.baddbmm_(scaled, known.basis.mT)
        else:
            matrix.addmm_(scaled, known.basis.mT)
        matrix.diagonal(dim1=-2, dim2=-1).add_(known.rest[..., None])
        total = SecondMoment.of(matrix, max(max_rank, self.rank))
        return replace(total, error_bound=total.error_bound + known.error_bound)


def add_gram_(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add `rows^T rows` of rows (k, n) to the lower triangle of a matrix (n, n).

    In blocks of rows, of which one goes beyond the triangle: what is above it means nothing afterwards.
    """
    for start, stop in _gram_blocks(rows.shape[1]):
        total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])


def fill_upper_(lower: torch.Tensor) -> None:
    """Make a symmetric matrix of its lower triangle."""
    for start, stop in _gram_blocks(len(lower)):
        diagonal = lower[start:stop, start:stop]
        diagonal.tril_().add_(diagonal.tril(-1).T)
        lower[start:stop, stop:] = lower[stop:, start:stop].T


def _gram_blocks(n: int) -> Iterator[tuple[int, int]]:
    """First row of each block, and the row behind it."""
    block = max(_GRAM_BLOCK, n // 8)
    return ((start, min(start + block, n)) for start in range(0, n, block))


def orthonormalized(columns: torch.Tensor, last: int) -> torch.Tensor:
    """The last so many of columns (n, k), or (num_experts, n, k), of which all are made orthonormal if nearly so.

    One step of Newton and Schulz towards the nearest orthonormal ones: what is missing is squared.
    """
    wanted = columns[..., columns.shape[-1] - last :]
    return 1.5 * wanted - 0.5 * columns @ (columns.mT @ wanted)


def _leading(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest eigenvalues, descending, and eigenvectors of a symmetric matrix with no negative one, float64."""
    n = len(matrix)
    start = torch.randn(n, min(n, rank + _OVERSAMPLING), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start.to(matrix.device))[0]
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis)[0]
    basis = basis.double()
    values, vectors = torch.linalg.eigh(basis.T @ (matrix.double() @ basis))
    return values.flip(-1).clamp_min(0)[:rank], (basis @ vectors.flip(-1))[:, :rank]
