"""What a user sets of a training run: one structure, whose parts are in the files beside this one.

Every check that needs no file or model happens when the settings are made, so that a bad value stops a run before
anything is read.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator
from pydantic.fields import FieldInfo

from osft.settings import compatibility
from osft.settings.base import Settings, refuse_unknown
from osft.settings.data import DataSettings, ValidationSettings
from osft.settings.optimization import DriftSettings, OptimizationSettings
from osft.settings.run import CheckpointSettings, LoggingSettings, ModelSettings, ProcessSettings
from osft.settings.subspace import SubspaceConfig

PARTS: tuple[type[Settings], ...] = (
    DataSettings,
    SubspaceConfig,
    OptimizationSettings,
    DriftSettings,
    ValidationSettings,
    CheckpointSettings,
    ProcessSettings,
    ModelSettings,
    LoggingSettings,
)
"""In the order in which they are shown."""


class TrainConfig(  # pydantic has the fields of the last one first
    LoggingSettings,
    ModelSettings,
    ProcessSettings,
    CheckpointSettings,
    ValidationSettings,
    DriftSettings,
    OptimizationSettings,
    SubspaceConfig,
    DataSettings,
):
    """Everything that a training run depends on: the parameters of `osft()`, of `osft train` and of the component."""

    @model_validator(mode="after")
    def _check_micro_batch(self) -> Self:
        if self.is_pretraining and self.block_size is not None:
            for name in ("max_seq_len", "max_tokens_per_gpu"):
                if self.block_size > getattr(self, name):
                    raise ValueError(f"block_size={self.block_size} is more than {name}={getattr(self, name)}")
        if self.distill_weight and self.distill_tokens > self.max_tokens_per_gpu:
            raise ValueError(
                f"distill_tokens={self.distill_tokens} is more than max_tokens_per_gpu={self.max_tokens_per_gpu}, the "
                "bound on every micro-batch. Lower it, or raise that"
            )
        return self

    @classmethod
    def from_parameters(cls, given: Mapping[str, Any]) -> "TrainConfig":
        """The settings from named values, where None stands for the default; training_hub's own names are understood.

        Raises ValueError for an unknown name (with the nearest known one), for required ones that are missing, and
        for values that cannot be.
        """
        refuse_unknown(given, [*cls.model_fields, *compatibility.NAMES])
        return cls(**compatibility.translated(given))

    @property
    def subspace(self) -> SubspaceConfig:
        """Only what determines the factors."""
        return SubspaceConfig(**{name: getattr(self, name) for name in SubspaceConfig.model_fields})


def grouped_fields() -> dict[str, dict[str, FieldInfo]]:
    """Title -> name -> field, for help and reference: first what is required, then the parts' other fields.

    What no part has, a setting of a newer engine, is under "Other".
    """
    known = dict(TrainConfig.model_fields)
    groups = {"Required": {name: known.pop(name) for name, field in [*known.items()] if field.is_required()}}
    for part in PARTS:
        title = str(part.model_config["title"])
        groups[title] = {name: known.pop(name) for name in part.model_fields if name in known}
    return groups | ({"Other": known} if known else {})
