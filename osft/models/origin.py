"""`osft.json` of a tuned model's folder: what it was made from, and what saving did to it.

A folder without it, of another program or of an older release, is a base model like any other.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from osft.storage.record import Record, RecordError, RecordPart

if TYPE_CHECKING:
    from osft.settings.training import TrainConfig

ORIGIN = "osft.json"
MODEL_CARD = "README.md"
"""Of a model's folder; `osft.models.model_card` writes it."""


class RoundingLoss(RecordPart):
    """What the rounding of the served weights did to the update (`osft.training.saving`). None without an update."""

    update_lost: float | None
    """1 - <D', D> / |D|^2."""
    rounding_error: float | None
    """|D' - D| / |D|."""
    frozen_share: float | None
    """|D' - P D'| / |D'|."""


class StoredStatistics(RecordPart):
    """What a model knows, as second moments of its layers' inputs, in a store (`osft.subspace.statistics_store`)."""

    address: str
    """Path or URI of the manifest; in a lineage below the storage root, if they lie there."""
    sha256: str
    """Of the content."""


class Origin(Record):
    """The content of `osft.json`."""

    base_model: str
    """Path, URI or Hugging Face id of the model that the first training of the lineage started from."""
    trained_from: str
    """That of the model which this training started from."""
    starts_from_exact: bool
    """Whether its weights were exact: kept in exact/, or stored in float32. Else they were rounded before."""
    dtype: str
    """Of the trained weights as they are served."""
    rounding: str
    """How they were rounded; "none" where the dtype holds them exactly."""
    total: RoundingLoss
    """Over all weights together."""
    weights: dict[str, RoundingLoss] = Field(default_factory=dict)
    """Of each target."""
    statistics: StoredStatistics | None = None
    """What the next training has to keep (`osft.training.round_statistics`); None without protect="activations"."""
    factors: str | None = None
    """With protect="weights": path or URI of the factor set that it was trained with, from which the next one follows
    (`osft.subspace.last_round`)."""


def read_origin(folder: Path) -> Origin | None:
    """The origin of a model's folder; None if it does not say. Raises ValueError if what it says cannot be read."""
    file = folder / ORIGIN
    if not file.is_file():
        return None
    try:
        return Origin.from_json(file.read_bytes(), str(file))
    except RecordError as error:
        raise ValueError(
            f"{file} is damaged ({error}). Copy the model again, or remove the file to have the folder taken as a base "
            "model"
        ) from None


def base_of(config: "TrainConfig", folder: Path) -> str:
    """What the first training of the lineage started from, of a model that is trained from `folder`."""
    origin = read_origin(folder)
    return config.model_path if origin is None else origin.base_model
