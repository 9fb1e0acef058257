"""`training.json`: what a finished training run says of itself, beside its models. Its last act is to write it.

The run's result (`osft.training.result`), the step that trains, the report of a round and the lineage read it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import JsonValue

from osft.models.origin import RoundingLoss, StoredStatistics
from osft.storage.record import Migration, Record, RecordPart


class WeightSummary(RecordPart):
    """How one target weight is split, and what the update made of it. Norms are Frobenius'."""

    shape: tuple[int, ...] | None
    """(m, n), or (experts, m, n) with a split for each."""
    unfrozen: int
    """Directions."""
    frozen: int | None
    """Directions."""
    weight_norm: float | None
    """Of the weight before training."""
    update_norm: float
    effective_rank: float | None
    """How many of the unfrozen directions the update is spread over."""
    predicted_drift: float | None = None
    """With protect="activations" (`osft.training.predicted_drift`), nats per token."""
    sampled_drift: float | None = None
    """Where there was text to measure it on (`osft.training.sampled_drift`), nats per token."""
    update_lost: float | None = None
    """By rounding, as in `RoundingLoss`; None without a model or an update, as those that follow."""
    rounding_error: float | None = None
    """As in `RoundingLoss`."""
    frozen_share: float | None = None
    """As in `RoundingLoss`."""


class TriedScale(RecordPart):
    """What the update does at one scale."""

    scale: float
    """alpha, the factor of the update."""
    loss: float
    """On the held-out samples, nats per token."""
    gain: float
    """By how much it is below the start's."""
    standard_error: float
    """Of the gain, from the differences of each sample."""
    drift: float
    """KL(start || this) on self-written text, nats per token."""


class FittedStep(RecordPart):
    """What fit_step tried, and what was taken (`osft.training.fitting`)."""

    scale: float
    """That of the model as it is written."""
    start_loss: float
    """Of the model without the update, nats per token."""
    tried: tuple[TriedScale, ...]
    """In the order of step_scales."""
    num_samples: int
    """Held-out samples."""
    num_text_tokens: int
    """Predictions on self-written text that the drift is a mean of."""
    max_drift: float
    """max_step_drift, nats per token."""
    reason: str
    """Why this scale, in words."""

    @property
    def chosen(self) -> TriedScale:
        """What was found at the scale that was taken."""
        return next(one for one in self.tried if one.scale == self.scale)

    def metrics(self) -> dict[str, Any]:
        """What a step's metrics say of it."""
        return {"step_scale": self.scale, "step_gain": self.chosen.gain, "step_drift": self.chosen.drift}

    def line(self) -> str:
        """The result in a line."""
        one = self.chosen
        scales = ", ".join(f"{other.scale:g}" for other in self.tried)
        return (
            f"{self.scale:g} of the update is kept ({self.reason}; tried: {scales}): it gains {one.gain:.4f} ± "
            f"{one.standard_error:.4f} nats per token on {self.num_samples} held-out samples and moves the model by "
            f"{one.drift:.4f} on its own text"
        )


class SavedUpdate(RoundingLoss):
    """How the last model was written, and what that did to the update as a whole."""

    base_model: str | None
    """What the first training of the lineage started from."""
    starts_from_exact: bool | None
    """Whether the weights that the run started from were exact."""
    dtype: str
    """Of the trained weights as they are served."""
    rounding: str
    """How they were rounded; "none" where the dtype holds them exactly."""


class SamplingQuality(RecordPart):
    """How well the sampled drift of each weight is known."""

    draws: int
    relative_error: float
    """Standard error of each value as a share of it, root mean square over the weights."""


class PreflightResult(RecordPart):
    """How samples were batched, and why (`osft.subspace.preflight`)."""

    batching: str
    reason: str


class ReplaySource(RecordPart):
    """An earlier dataset of which samples were replayed."""

    data_uri: str
    dataset: str
    """Its key."""
    num_samples: int
    num_tokens: int


class ReplaySummary(RecordPart):
    """What was replayed in each epoch."""

    num_samples: int
    num_tokens: int
    num_loss_tokens: int
    sources: tuple[ReplaySource, ...]


def _without_format(found: dict[str, Any]) -> dict[str, Any]:
    """Before records had a format. What the first releases did not measure is None, or empty."""
    lacking = ("best_validation_loss", "preflight", "fitted_step", "sampled_drift", "saved", "statistics", "replay")
    found = dict.fromkeys(lacking) | {"checkpoint_files": {}, "metrics_sha256": "", "liger": False} | found
    optional = dict.fromkeys(("shape", "frozen", "weight_norm", "effective_rank"))
    found["rank_layout"] = {name: optional | layout for name, layout in found["rank_layout"].items()}
    if found["saved"] is not None:
        found["saved"] = {"base_model": None, "starts_from_exact": None} | found["saved"]
    return found


class TrainingSummary(Record):
    """Counts, timings, memory, losses, ranks and settings of a finished run."""

    MIGRATIONS: ClassVar[Mapping[int, Migration]] = {0: _without_format}

    config: dict[str, JsonValue]
    """The settings as they were (`TrainConfig.to_dict`), `dataset`: the key of the data, and `made_of`: hashes of all
    that the run was made of."""
    steps: int
    """Optimizer steps."""
    samples: int
    """Processed, epochs included."""
    tokens: int
    """Processed, epochs included."""
    loss_tokens: int
    """Of these, the tokens that counted in the loss."""
    first_loss: float
    """Of the first step, nats per token."""
    final_loss: float
    """Of the last step, nats per token."""
    validation_loss: float | None
    """After the last step, where there is held-out data."""
    best_validation_loss: float | None
    """The lowest of all."""
    checkpoints: tuple[str, ...]
    """The models that were written, relative to the run's folder, in their order."""
    checkpoint_files: dict[str, dict[str, int]]
    """Of each model its files, with their bytes; empty but for the first process, and in early releases."""
    best_checkpoint: str | None
    """The model with the lowest validation loss, with save_best_val_loss."""
    metrics_sha256: str
    """Of the run's lines in metrics.jsonl; empty where it is not known."""
    world_size: int
    """Processes."""
    device: str
    """"cpu", or the GPU's name."""
    liger: bool
    """Whether Liger's kernels were used."""
    preflight: PreflightResult | None
    """None in early releases."""
    trainable_parameters: int
    """The coefficients of the updates."""
    total_parameters: int
    """Of the model."""
    load_seconds: float
    """Until the first step."""
    train_seconds: float
    """Without what saving took."""
    save_seconds: float
    """Models and training states."""
    peak_memory_bytes: int
    """Of the first process: the GPU allocator's peak, or the resident memory's on a CPU."""
    rank_layout: dict[str, WeightSummary]
    """By target weight."""
    fitted_step: FittedStep | None
    """With fit_step."""
    sampled_drift: SamplingQuality | None
    """None where no text was there to sample on."""
    saved: SavedUpdate | None
    """None without a model."""
    statistics: StoredStatistics | None
    """What the next training has to keep; None without protect="activations"."""
    replay: ReplaySummary | None
    """None without replay."""

    def numbers(self) -> dict[str, float]:
        """The counts, timings and losses by name, for those who log them."""
        return {name: value for name, value in self if isinstance(value, int | float)}
