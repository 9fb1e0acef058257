"""Sums over a text of what one input of a model's layers is, and of the gradients of the outputs that are made of it.

C and s are over all tokens. S serves nothing but the prediction of the drift (`osft.training.predicted_drift`), by its
leading directions, and outputs may be several times as wide as inputs. So its shape is that of OUTPUT_TOKENS tokens
drawn from the text, and its trace that of all.

An expert's inputs are summed over the tokens that are sent to it, zeros for all others. One that saw few tokens would
seem to need no protection, so each counts as if it had seen FLOOR_TOKENS more, of the mean energy of all experts'
inputs, the same in every direction.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from osft.subspace.second_moment import SecondMoment, add_gram_, fill_upper_
from osft.subspace.statistics import InputStatistics
from osft.subspace.watching import Use

FLOOR_TOKENS = 16
OUTPUT_TOKENS = 1024
"""Of the text, that S is measured on, about; all of a shorter one. Of the predicted drift of 35 weights of SmolLM2-135M
this gives 0.98 +- 0.05 of what all of 3,072 tokens give."""
WHOLE_UP_TO = 2048
"""Inputs of at most this width are kept whole."""
LEADING_DIRECTIONS, EXPERT_DIRECTIONS, OUTPUT_DIRECTIONS = 1024, 128, 64
"""Directions that are kept one by one of wider inputs, of the inputs of each expert, and of outputs."""


def kept_rank(shape: tuple[int, ...]) -> int:
    """How many directions are kept of inputs with a moment of `shape`, (n, n) or (num_experts, n, n)."""
    n = shape[-1]
    if len(shape) == 3:
        return min(n, EXPERT_DIRECTIONS)
    return n if n <= WHOLE_UP_TO else LEADING_DIRECTIONS


@dataclass(slots=True, eq=False)
class MomentSums:
    """What is added up for one input."""

    targets: tuple[str, ...]
    transposed: bool
    """Whether the weights are stored (in_features, out_features)."""
    num_experts: int | None = None
    """Of a stack."""
    inputs: torch.Tensor | None = None
    """(n, n), or (num_experts, n, n), float32: the sum, and once it is finished the mean C."""
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """Target -> (m, m), float32: the sum over some tokens, and once it is finished the mean S. None of experts."""
    energies: dict[str, torch.Tensor] = field(default_factory=dict)
    """Target -> () or (num_experts,), float32: the sum of |g|^2, and once it is finished s."""
    tokens: torch.Tensor | None = None
    """(num_experts,): how many were sent to each."""

    def add_inputs(self, use: Use, *, counts: bool) -> None:
        """Add the inputs of a use. Without `counts` zeros: for a process that only keeps the others company."""
        if use.target != self.targets[0]:
            return
        if self.num_experts is None:
            self.inputs = _add_squares(self.inputs, use.inputs, counts=counts)
            return
        if self.inputs is None or self.tokens is None:
            n = use.inputs.shape[-1]
            self.inputs = use.inputs.new_zeros(self.num_experts, n, n, dtype=torch.float32)
            self.tokens = use.inputs.new_zeros(self.num_experts, dtype=torch.float32)
        experts, each = _by_expert(use, use.inputs)
        if counts:
            self.inputs[experts] += each.mT @ each
            self.tokens[experts] += each.any(-1).sum(-1)

    def gradient_hook(self, use: Use, drawn: torch.Tensor, *, counts: bool) -> Callable[[torch.Tensor], None]:
        """What adds the gradient of a use's outputs, told of it. drawn: (tokens,), bool, those of the batch for S."""
        zeros = use.outputs.new_zeros(() if self.num_experts is None else (self.num_experts,), dtype=torch.float32)
        energies = self.energies.setdefault(use.target, zeros)
        if self.num_experts is None:
            total = self.outputs[use.target] = _add_squares(self.outputs.get(use.target), use.outputs, counts=False)

            def add_squares(gradient: torch.Tensor) -> None:
                if counts:
                    rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
                    energies.add_(rows.square().sum())
                    # A layer that does not see token by token is measured whole.
                    chosen = rows[drawn.to(rows.device)] if len(rows) == len(drawn) else rows
                    _add_squares(total, chosen, counts=True)

            return add_squares
        experts, each = _by_expert(use, use.inputs)
        reached = each.any(-1)  # where all experts compute at once, the tokens of others are zeros

        def add_energies(gradient: torch.Tensor) -> None:
            if counts:
                energies[experts] += (_by_expert(use, gradient)[1].square().sum(-1) * reached).sum(-1)

        return add_energies

    def finish(self, num_tokens: int, world_size: int, outputs: dict[str, int]) -> None:
        """Turn the sums of all processes into means over the text of `num_tokens` tokens; outputs: target -> m.

        Raises ValueError, with a target's name, for a stack of which no expert got a token.
        """
        assert self.inputs is not None
        if world_size > 1:
            for total in self._all():
                torch.distributed.all_reduce(total)
        if self.tokens is None:
            for total in (self.inputs, *self.outputs.values()):
                fill_upper_(total)
            self.inputs /= num_tokens
            for target, energy in self.energies.items():
                energy /= num_tokens * outputs[target]
                trace = self.outputs[target].diagonal().sum()
                self.outputs[target] *= torch.where(trace > 0, energy * outputs[target] / trace, 0.0)
            return
        n, seen = self.inputs.shape[-1], self.tokens.sum()
        if not seen:
            raise ValueError(f"no token reached an expert of {self.targets[0]}. Give more text, or other text")
        diagonal = self.inputs.diagonal(dim1=-2, dim2=-1)
        diagonal += FLOOR_TOKENS * diagonal.sum() / (n * seen)
        self.inputs /= num_tokens
        for target, energies in self.energies.items():
            mean = energies.sum() / seen
            energies += FLOOR_TOKENS * mean
            energies /= (self.tokens + FLOOR_TOKENS) * outputs[target]

    def trace(self) -> torch.Tensor:
        """tr(C), () or (num_experts,), on the CPU."""
        assert self.inputs is not None
        return self.inputs.diagonal(dim1=-2, dim2=-1).sum(-1).cpu()

    def gradient_energies(self) -> dict[str, torch.Tensor]:
        """As `InputStatistics` has them."""
        ones = torch.ones(self.num_experts) if self.num_experts else torch.ones(())
        return {target: self.energies[target].cpu() if target in self.energies else ones for target in self.targets}

    def statistics(self, onto: InputStatistics | None = None) -> InputStatistics:
        """The statistics, on the CPU, of the finished sums, which are overwritten; added to those of another text.

        Raises ValueError, with a target's name, if the others are of weights of another shape.
        """
        assert self.inputs is not None
        energies = self.gradient_energies()
        rank = kept_rank(tuple(self.inputs.shape))
        if onto is None:
            moment = SecondMoment.of(self.inputs, rank)
            outputs = {target: SecondMoment.of(matrix, OUTPUT_DIRECTIONS) for target, matrix in self.outputs.items()}
        else:
            self._check_shape(onto)
            before, here = onto.kept.trace(), self.trace()
            share = torch.where(before + here > 0, before / (before + here), 0.5)
            energies = {
                target: share * onto.gradient_energies[target] + (1 - share) * energies[target]
                for target in self.targets
            }
            moment = onto.moment.plus(self.inputs, rank)
            outputs = {
                target: known.scaled(share).plus(self.outputs[target].mul_(1 - share), OUTPUT_DIRECTIONS)
                for target, known in onto.output_moments.items()
                if target in self.outputs
            }
        return InputStatistics(
            targets=self.targets,
            transposed=self.transposed,
            kept=moment.to("cpu"),
            gradient_energies=energies,
            output_moments={target: outputs[target].to("cpu") for target in self.targets if target in outputs},
        )

    def _check_shape(self, onto: InputStatistics) -> None:
        assert self.inputs is not None
        before, here = tuple(onto.kept.basis.shape[:-1]), tuple(self.inputs.shape[:-1])
        if before != here or onto.transposed != self.transposed:
            shapes = [
                f"{shape}, weights stored {'(in, out)' if transposed else '(out, in)'}"
                for shape, transposed in ((before, onto.transposed), (here, self.transposed))
            ]
            raise ValueError(
                f"statistics of the inputs of {self.targets[0]} are of different shapes: {' and '.join(shapes)}"
            )

    def _all(self) -> Iterator[torch.Tensor]:
        assert self.inputs is not None
        yield self.inputs
        yield from self.outputs.values()
        yield from self.energies.values()
        if self.tokens is not None:
            yield self.tokens


def _by_expert(use: Use, vectors: torch.Tensor) -> tuple[slice, torch.Tensor]:
    """The experts of a use of a stack, and its vectors (experts, tokens, n), float32."""
    detached = vectors.detach().float()
    if use.expert is None:
        return slice(None), detached.flatten(1, -2)
    return slice(use.expert, use.expert + 1), detached.reshape(1, -1, vectors.shape[-1])


def _add_squares(total: torch.Tensor | None, vectors: torch.Tensor, *, counts: bool) -> torch.Tensor:
    """Add v v^T of each of the vectors (..., n) to the lower triangle of (n, n), or of zeros (`add_gram_`)."""
    n = vectors.shape[-1]
    if total is None:
        total = torch.zeros(n, n, device=vectors.device)
    if counts:
        add_gram_(total, vectors.detach().reshape(-1, n).float())
    return total
