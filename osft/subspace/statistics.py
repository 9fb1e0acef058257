"""What a model's layers are fed and what depends on their outputs, as second moments over some text.

For an update D (out, in) of a layer, inputs x with `C = E[x x^T]` and gradients g, with respect to the layer's output,
of the negative log-likelihood of tokens that the model itself samples, with `S = E[g g^T]`, the model moves by about

    KL(before || after) = 1/2 sum over layers of tr(S D C D^T)      nats per token

to second order: the Fisher information in its Kronecker-factored form (Martens and Grosse 2015, arXiv:1503.05671).
Means are over all tokens of the text, of each expert too, so that what few tokens reach weighs little.

Statistics of several texts add up, `C = C_1 + C_2` (Ritter et al. 2018, arXiv:1805.07810): what is learned must be kept
on each of them. S does not add up but is averaged, by the energy tr(C) of the inputs that it belongs to, so that
tr(S) tr(C) adds up.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from osft.checkpoint import tensor_sha256
from osft.content import named_sha256


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SecondMoment:
    """M = E[v v^T] of vectors v (n,): `basis diag(energies) basis^T + rest (I - basis basis^T)`; of each expert."""

    basis: torch.Tensor
    """(n, k) or (num_experts, n, k), float32: orthonormal columns, the direction of the most energy first."""
    energies: torch.Tensor
    """(k,) or (num_experts, k), float32: the mean square of v along each, descending, >= 0."""
    rest: torch.Tensor
    """() or (num_experts,), float32: the mean energy of the n - k other directions; 0 where there are none."""

    @classmethod
    def of(cls, matrix: torch.Tensor, max_rank: int | None = None) -> "SecondMoment":
        """The moment with the matrix M (n, n) or (num_experts, n, n), symmetric, whole or of its leading directions.

        The trace is kept. Raises ValueError for NaN and infinity.
        """
        if matrix.ndim == 3:  # one by one: the double precision that it takes is that of one expert
            return cls.stack([cls.of(expert, max_rank) for expert in matrix])
        if not torch.isfinite(matrix).all():
            raise ValueError("a second moment holds NaN or infinity")
        n = matrix.shape[-1]
        exact = matrix.to(torch.float64)
        energies, basis = torch.linalg.eigh((exact + exact.T) / 2)
        rank = n if max_rank is None else min(max_rank, n)
        energies, basis = energies.flip(-1).clamp_min(0)[:rank], basis.flip(-1)[:, :rank]
        rest = (exact.trace() - energies.sum()).clamp_min(0) / (n - rank) if rank < n else torch.zeros(())
        return cls(basis=basis.float().contiguous(), energies=energies.float(), rest=rest.float())

    @classmethod
    def stack(cls, experts: Sequence["SecondMoment"]) -> "SecondMoment":
        """The moments of the experts of a block in one."""
        return cls(
            basis=torch.stack([expert.basis for expert in experts]),
            energies=torch.stack([expert.energies for expert in experts]),
            rest=torch.stack([expert.rest for expert in experts]),
        )

    @property
    def size(self) -> int:
        """n, the length of the vectors."""
        return self.basis.shape[-2]

    @property
    def rank(self) -> int:
        """k, the number of directions that are known one by one."""
        return self.basis.shape[-1]

    def dense(self) -> torch.Tensor:
        """M, (n, n) or (num_experts, n, n), float32."""
        above = self.energies - self.rest[..., None]
        identity = torch.eye(self.size, device=self.basis.device)
        return (self.basis * above[..., None, :]) @ self.basis.mT + self.rest[..., None, None] * identity

    def trace(self) -> torch.Tensor:
        """The mean square of the vectors' length, () or (num_experts,)."""
        return self.energies.sum(-1) + self.rest * (self.size - self.rank)

    def scaled(self, factor: torch.Tensor | float) -> "SecondMoment":
        """The moment times a factor >= 0, a number or one for each expert (num_experts,)."""
        factor = torch.as_tensor(factor, dtype=torch.float32, device=self.rest.device)
        return replace(self, energies=self.energies * factor[..., None], rest=self.rest * factor)

    def to(self, device: torch.device | str) -> "SecondMoment":
        """The same on `device`."""
        return SecondMoment(basis=self.basis.to(device), energies=self.energies.to(device), rest=self.rest.to(device))

    def __add__(self, other: "SecondMoment") -> "SecondMoment":
        """The sum, with the larger rank of the two; exact where both are whole."""
        return SecondMoment.of(self.dense() + other.dense(), max(self.rank, other.rank))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InputStatistics:
    """The statistics of one input and of all target weights that are multiplied with it."""

    targets: tuple[str, ...]
    """The names of the targets (`osft.subspace.targets.Target`) that read this input, in the model's order."""
    transposed: bool
    """Whether the weights are stored (in_features, out_features), as those of `Conv1D` and of some experts."""
    moment: SecondMoment
    """C = E[x x^T]."""
    gradient_energies: dict[str, torch.Tensor]
    """Target -> s, the mean diagonal of S, () or (num_experts,); 1 where no gradients were measured."""
    output_moments: dict[str, SecondMoment]
    """Target -> S = E[g g^T]; without experts, and empty where no gradients were measured."""

    def __add__(self, other: "InputStatistics") -> "InputStatistics":
        """Both texts'. Raises ValueError for statistics of other targets or shapes."""
        if (self.targets, self.transposed) != (other.targets, other.transposed):
            raise ValueError(f"statistics of the inputs of {self.targets} and of {other.targets} do not add up")
        if self.moment.size != other.moment.size or self.moment.rest.shape != other.moment.rest.shape:
            shapes = " and ".join(str(tuple(each.moment.basis.shape[:-1])) for each in (self, other))
            raise ValueError(f"statistics of the inputs of {self.targets[0]} are of different shapes: {shapes}")
        mine, others = self.moment.trace(), other.moment.trace()
        share = torch.where(mine + others > 0, mine / (mine + others), 0.5)
        outputs = {}
        for target in self.output_moments.keys() & other.output_moments.keys():
            mine_there, others_there = self.output_moments[target], other.output_moments[target]
            outputs[target] = mine_there.scaled(share) + others_there.scaled(1 - share)
        return InputStatistics(
            targets=self.targets,
            transposed=self.transposed,
            moment=self.moment + other.moment,
            gradient_energies={
                target: share * self.gradient_energies[target] + (1 - share) * other.gradient_energies[target]
                for target in self.targets
            },
            output_moments={target: outputs[target] for target in self.targets if target in outputs},
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it by name."""
        found = _named("input", self.moment)
        for target, moment in self.output_moments.items():
            found |= _named(f"output {target}", moment)
        return found | {f"gradient energy {target}": self.gradient_energies[target] for target in self.targets}


def _named(name: str, moment: SecondMoment) -> dict[str, torch.Tensor]:
    return {f"{name} {field}": getattr(moment, field) for field in ("basis", "energies", "rest")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One text that statistics are of."""

    name: str
    """What it stands for: "base", or the task that was learned."""
    source: str
    """Where the text is from, in words."""
    num_tokens: int
    text_sha256: str
    """Hash of the tokens."""
    model_sha256: str
    """Hash of the weights of the model that read it; empty where it is not known."""
    weight_rms: float
    """Root mean square of all target weights."""
    mean_curvature: float
    """Mean of s * c over all entries of all target weights: `sum s tr(C) m / sum m n` over the targets (m, n)."""


class Statistics:
    """The statistics of all target weights of a model over one text, or several."""

    def __init__(self, parts: Sequence[Part], inputs: Sequence[InputStatistics]) -> None:
        self.parts = tuple(parts)
        """What was added up."""
        self._inputs = tuple(inputs)

    def inputs(self) -> Iterator[InputStatistics]:
        """One at a time, in the model's order."""
        return iter(self._inputs)

    @property
    def sha256(self) -> str:
        """Hash of the content."""
        tensors = {
            f"{','.join(each.targets)} {name}": tensor_sha256(tensor.cpu())
            for each in self.inputs()
            for name, tensor in each.tensors().items()
        }
        return named_sha256({repr(part): "" for part in self.parts} | tensors)

    @property
    def unit(self) -> float:
        """What a stiffness is measured in: the parts' mean curvature times the root mean square of their weights."""
        count = len(self.parts)
        curvature = sum(part.mean_curvature for part in self.parts) / count
        return curvature * sum(part.weight_rms for part in self.parts) / count

    def __add__(self, other: "Statistics") -> "Statistics":
        """Both texts'. Raises ValueError, with the target's name, for statistics of other targets or shapes."""
        mine, others = list(self.inputs()), list(other.inputs())
        names = [{target for each in side for target in each.targets} for side in (mine, others)]
        if names[0] != names[1]:
            name = sorted(names[0] ^ names[1])[0]
            raise ValueError(f"statistics of different targets do not add up: only one of them has {name}")
        by_targets = {each.targets: each for each in others}
        for each in mine:
            if each.targets not in by_targets:
                raise ValueError(f"statistics do not add up: {each.targets} share an input in one of them only")
        return Statistics(self.parts + other.parts, [each + by_targets[each.targets] for each in mine])
