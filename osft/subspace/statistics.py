"""What a model's layers are fed and what depends on their outputs, as second moments over some text.

For an update D (out, in) of a layer, inputs x with `C = E[x x^T]` and gradients g, with respect to the layer's output,
of the negative log-likelihood of tokens that the model itself samples, with `S = E[g g^T]`, the model moves by about

    KL(before || after) = 1/2 sum over layers of tr(S D C D^T)      nats per token

to second order: the Fisher information in its Kronecker-factored form (Martens and Grosse 2015, arXiv:1503.05671).
C is a mean over all tokens of the text. Of an expert it is so too, the inputs of the tokens that are sent elsewhere
being zero, so that what few tokens reach weighs little; S is a mean over the tokens that reach it. Of all
others S has the trace that it has over all tokens, and the shape of some (`osft.subspace.moment_sums`).

Statistics of several texts add up, `C = C_1 + C_2` (Ritter et al. 2018, arXiv:1805.07810): what is learned must be kept
on each of them. S does not add up but is averaged, by the energy tr(C) of the inputs that it belongs to, so that
tr(S) tr(C) adds up.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from osft.models.checkpoint import tensor_sha256
from osft.storage.hashes import named_sha256
from osft.subspace.second_moment import SecondMoment


@dataclass(frozen=True, kw_only=True, eq=False)
class InputStatistics:
    """The statistics of one input and of all target weights that are multiplied with it."""

    targets: tuple[str, ...]
    """The names of the targets (`osft.subspace.targets.Target`) that read this input, in the model's order."""
    transposed: bool
    """Whether the weights are stored (in_features, out_features), as those of `Conv1D` and of some experts."""
    kept: SecondMoment
    """C = E[x x^T] as it is kept: of what was read from a store the basis is orthonormal to float16 only."""
    gradient_energies: dict[str, torch.Tensor]
    """Target -> s, the mean diagonal of S, () or (num_experts,); 1 where no gradients were measured."""
    output_moments: dict[str, SecondMoment]
    """Target -> S = E[g g^T]; without experts, and empty where no gradients were measured."""

    @cached_property
    def moment(self) -> SecondMoment:
        """C, its basis orthonormal to float32."""
        return self.kept.orthonormalized()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored of it, by name: all tensors, on the CPU, the bases in float16.

        An entry of an orthonormal basis loses at most 2^-11 of itself, so a direction turns by at most 5e-4, and of a
        direction's energy at most 2.4e-7 is counted elsewhere.
        """
        found = self.input_tensors()
        for target, moment in self.output_moments.items():
            found |= _stored(OUTPUT + target, moment)
        return found | {f"energy {target}": energy.cpu() for target, energy in self.gradient_energies.items()}

    def input_tensors(self) -> dict[str, torch.Tensor]:
        """Of these, what C is stored as."""
        return _stored("input", self.kept)

    @classmethod
    def from_tensors(
        cls, targets: Sequence[str], tensors: Mapping[str, torch.Tensor], *, transposed: bool
    ) -> "InputStatistics":
        """What `tensors` gave. Raises KeyError for one that is missing."""
        return cls(
            targets=tuple(targets),
            transposed=transposed,
            kept=_restored("input", tensors),
            gradient_energies={target: tensors[f"energy {target}"] for target in targets},
            output_moments=restored_outputs(targets, tensors),
        )

    @property
    def sha256(self) -> str:
        """Hash of what is stored of it."""
        return tensors_sha256(self.targets, self.tensors(), transposed=self.transposed)


def tensors_sha256(targets: Sequence[str], tensors: Mapping[str, torch.Tensor], *, transposed: bool) -> str:
    """`InputStatistics.sha256` of what is stored."""
    digests = {name: tensor_sha256(tensors[name]) for name in sorted(tensors)}
    return named_sha256({",".join(targets): str(transposed)} | digests)


OUTPUT = "output "
"""What stands before the target's name in the names of the tensors of S."""


def restored_outputs(targets: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> dict[str, SecondMoment]:
    """`InputStatistics.output_moments` of what is stored."""
    return {
        target: _restored(OUTPUT + target, tensors).orthonormalized()
        for target in targets
        if f"{OUTPUT}{target} basis" in tensors
    }


def _stored(name: str, moment: SecondMoment) -> dict[str, torch.Tensor]:
    found = {f"{name} {part}": getattr(moment, part).cpu().contiguous() for part in moment.tensor_names()}
    return found | {f"{name} basis": found[f"{name} basis"].half()}


def _restored(name: str, tensors: Mapping[str, torch.Tensor]) -> SecondMoment:
    moment = {part: tensors[f"{name} {part}"] for part in SecondMoment.tensor_names()}
    return SecondMoment(**moment | {"basis": moment["basis"].float()})


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

    def __init__(
        self,
        parts: Sequence[Part],
        inputs: Sequence[InputStatistics],
        layout: Sequence[tuple[str, ...]] | None = None,
        sha256: str | None = None,
    ) -> None:
        self.parts = tuple(parts)
        """What was added up."""
        self._inputs = inputs
        self.layout = tuple(layout if layout is not None else (each.targets for each in inputs))
        """The targets of each input."""
        self._sha256 = sha256

    def inputs(self) -> Iterator[InputStatistics]:
        """One at a time, in the model's order. Of stored statistics one at a time is in memory."""
        return iter(self._inputs)

    def of(self, targets: tuple[str, ...]) -> InputStatistics:
        """Those of the input that these targets share. Raises ValueError if they, and no others, do not share one."""
        if targets not in self.layout:
            raise ValueError(f"statistics do not add up: {', '.join(targets)} share an input in one of them only")
        return self._inputs[self.layout.index(targets)]

    @property
    def sha256(self) -> str:
        """Hash of the content, as it is stored."""
        if self._sha256 is None:
            self._sha256 = content_sha256(self.parts, [each.sha256 for each in self.inputs()])
        return self._sha256

    @property
    def unit(self) -> float:
        """What a stiffness is measured in: the mean curvature times the root mean square of the weights.

        The curvatures of the parts add up, as tr(S) tr(C) does. So the more parts there are, the less each of them is
        protected, and all together as much as one.
        """
        curvature = sum(part.mean_curvature for part in self.parts)
        return curvature * sum(part.weight_rms for part in self.parts) / len(self.parts)


def content_sha256(parts: Sequence[Part], inputs: Sequence[str]) -> str:
    """Hash of statistics of `parts` whose inputs have these hashes."""
    return named_sha256({repr(part): "" for part in parts} | {str(i): digest for i, digest in enumerate(inputs)})
