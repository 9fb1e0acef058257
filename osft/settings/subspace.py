"""What a user sets of the method."""

import re
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from osft.settings.base import Settings
from osft.settings.values import Integer, Location, Number, Texts

FreeSubspace = Literal["complement", "core"]
RankAllocation = Literal["uniform", "adaptive"]
Protect = Literal["weights", "activations"]


class SubspaceConfig(Settings):
    """Which weights learn, and in which directions: what determines the factors."""

    model_config = ConfigDict(title="Subspace")

    unfreeze_rank_ratio: Annotated[Number, Field(ge=0.0, le=1.0)]
    """Share of each target weight's directions that may be trained, in (0, 1]; those with the least singular value, or
    the least energy (see protect), come first. 0.25 is a good start, 1.0 constrains nothing, 0 is refused: nothing to
    train."""

    target_patterns: Texts | None = None
    """Regular expressions searched in the full names of the modules, such as "q_proj". None: every linear layer and
    every expert weight of the transformer blocks."""

    protect: Protect = "weights"
    """What the frozen directions are taken from. "weights": the singular vectors of each weight, the published method
    (arXiv:2504.07097). "activations": the directions of a layer's inputs that carry most energy, C = E[x x^T], over
    text that stands for what the model knows (calibration_tokens, calibration_data); what training adds is zero on
    them. Measured, the model drifts far less from what it knew (benchmarks/results/frontier_cuda.md)."""

    calibration_tokens: Annotated[Integer | None, Field(ge=0)] = None
    """With protect="activations": tokens of text that the model writes itself (plain text, chats, code, lists and
    other kinds), on which its layers' inputs are measured. None: by the width of the model, 3,072 up to 2,048. 0:
    calibration_data only. distill_weight and fit_step take the same text, whatever is protected."""

    calibration_data: Location | None = None
    """With protect="activations": records that stand for what the model should keep, beside or instead of its own text;
    a path or URI as data_path."""

    calibration_temperature: Annotated[Number, Field(ge=0.0)] = 1.0
    """Temperature at which the model writes that text."""

    calibration_seed: Annotated[Integer, Field(ge=0)] = 0
    """Seed of the sampling of that text."""

    free_subspace: FreeSubspace = "complement"
    """With protect="weights". "complement": every update orthogonal to the frozen directions on both sides, the
    reachable set of the published method. "core": only updates between the unfrozen singular vectors themselves (least
    memory)."""

    rank_allocation: RankAllocation = "uniform"
    """With protect="weights". "uniform": the same ratio for every weight. "adaptive": blocks that change their input
    little, measured on a calibration sample, keep more directions frozen; the mean stays at unfreeze_rank_ratio
    (arXiv:2504.07097)."""

    min_retention_ratio: Annotated[Number, Field(ge=0.0, le=1.0)] = 0.1
    """With rank_allocation="adaptive": the smallest share of directions that stays frozen in any layer."""

    calibration_samples: Annotated[Integer, Field(ge=1)] = 16
    """Training samples on which the layers' importance is measured (rank_allocation="adaptive"), and the inputs of the
    layers (save_rounding="compensated")."""

    @model_validator(mode="after")
    def _check_subspace(self) -> Self:
        if self.unfreeze_rank_ratio == 0:
            raise ValueError(
                "unfreeze_rank_ratio is 0: every direction would be frozen and there is nothing to train. "
                "Choose a value in (0, 1], for example 0.25"
            )
        if self.protect == "activations":
            for name, only in (("free_subspace", "complement"), ("rank_allocation", "uniform")):
                if getattr(self, name) != only:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} splits singular values: it goes with protect='weights', not "
                        "with protect='activations'. Leave it out"
                    )
            if self.calibration_tokens == 0 and not self.calibration_data:
                raise ValueError(
                    "calibration_tokens=0 without calibration_data leaves nothing to measure the layers' inputs on. "
                    "Give one of them"
                )
        elif self.calibration_data:
            raise ValueError("calibration_data is of use with protect='activations' only. Give that, or leave it out")
        for pattern in self.target_patterns or []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"target_patterns: {pattern!r} is not a regular expression: {error}") from None
        return self
