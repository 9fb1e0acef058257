"""What a training run leaves, as an object."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osft import storage
from osft.models.training_summary import FittedStep, SavedUpdate, TrainingSummary, WeightSummary


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished training run. Everything in it is also in the output folder, `training.json` and `metrics.jsonl`."""

    output_dir: Path
    """The run's ckpt_output_dir; where that is a URI, the scratch folder of this node."""
    summary: TrainingSummary
    """Counts, timings, memory, losses, rank layout and settings; the content of `training.json`."""
    reused: bool = False
    """True if the run had already finished and nothing was trained."""
    uri: str | None = None
    """ckpt_output_dir where that is a URI: what is in output_dir on node 0 is there, too, and stays."""

    @property
    def checkpoint(self) -> Path | None:
        """The tuned model, a plain Hugging Face folder: the last one written, None if none was asked for."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def checkpoint_uri(self) -> str | None:
        """`checkpoint` where others find it: its URI if the run has one, else its path."""
        if self.checkpoint is None:
            return None
        return storage.join(self.uri or self.output_dir, self.summary.checkpoints[-1])

    @property
    def checkpoints(self) -> list[Path]:
        """All models that the run wrote, in their order. Of a run with a URI, only node 0 has them."""
        return [self.output_dir / folder for folder in self.summary.checkpoints]

    @property
    def best_checkpoint(self) -> Path | None:
        """The model with the lowest validation loss, with `save_best_val_loss`."""
        folder = self.summary.best_checkpoint
        return self.output_dir / folder if folder else None

    @property
    def metrics(self) -> Path:
        """JSON lines, one a step: `osft.training.loop.StepMetrics`."""
        return self.output_dir / "metrics.jsonl"

    @property
    def history(self) -> list[dict[str, Any]]:
        """The content of `metrics`: loss (nats per token), learning rate, gradient norm, tokens/s … of each step."""
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.summary.steps

    @property
    def num_samples(self) -> int:
        """Samples processed, epochs included."""
        return self.summary.samples

    @property
    def num_tokens(self) -> int:
        """Tokens processed, epochs included."""
        return self.summary.tokens

    @property
    def num_loss_tokens(self) -> int:
        """Of these, the tokens that counted in the loss."""
        return self.summary.loss_tokens

    @property
    def final_loss(self) -> float:
        """Loss of the last step, in nats per token."""
        return self.summary.final_loss

    @property
    def timings(self) -> dict[str, float]:
        """Seconds: `load`, `train`, `save`."""
        return {
            "load": self.summary.load_seconds,
            "train": self.summary.train_seconds,
            "save": self.summary.save_seconds,
        }

    @property
    def peak_memory_bytes(self) -> int:
        """Of the first process: the GPU allocator's peak, or the resident memory's on a CPU."""
        return self.summary.peak_memory_bytes

    @property
    def rank_layout(self) -> dict[str, WeightSummary]:
        """By target weight: its split, the norm, the effective rank and the drift of its update."""
        return self.summary.rank_layout

    @property
    def saved(self) -> SavedUpdate | None:
        """How the last model was written, and what that did to the update. None without a model."""
        return self.summary.saved

    @property
    def fitted_step(self) -> FittedStep | None:
        """With fit_step: which part of the update was kept, and the gain and drift of each that was tried."""
        return self.summary.fitted_step

    def __repr__(self) -> str:
        summary, timings = self.summary, self.timings
        loss = f"{summary.first_loss:.4f} -> {self.final_loss:.4f}"
        if summary.validation_loss is not None:
            loss += f", validation {summary.validation_loss:.4f}"
        ranks = [layout.unfrozen for layout in self.rank_layout.values()]
        spread = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        lines = [
            f"TrainResult{' (finished before, nothing trained)' if self.reused else ''}",
            f"  checkpoint  {self.checkpoint}",
            *([f"  published   {self.checkpoint_uri}"] if self.uri else []),
            f"  loss        {loss} nats per token",
            f"  steps       {self.num_steps:,} ({self.num_samples:,} samples, {self.num_tokens:,} tokens, "
            f"{self.num_loss_tokens:,} with loss)",
            f"  parameters  {summary.trainable_parameters:,} trainable of {summary.total_parameters:,}",
            f"  rank        {spread} unfrozen directions in {len(ranks)} weights",
            *_fitted_line(self.fitted_step),
            *_saved_line(self.saved),
            f"  time        {timings['load']:.1f} s load, {timings['train']:.1f} s train, {timings['save']:.1f} s save",
            f"  memory      {self.peak_memory_bytes / 2**30:.2f} GiB at most, {summary.world_size} x {summary.device}",
        ]
        return "\n".join(lines)


def _fitted_line(fitted: FittedStep | None) -> list[str]:
    if fitted is None:
        return []
    taken = fitted.chosen
    return [
        f"  step        {fitted.scale:g} of the update ({fitted.reason}): gain {taken.gain:.4f} ± "
        f"{taken.standard_error:.4f}, drift {taken.drift:.4f} nats per token"
    ]


def _saved_line(saved: SavedUpdate | None) -> list[str]:
    if saved is None or saved.rounding == "none" or saved.update_lost is None:
        return []
    return [
        f"  saved       {saved.dtype}, rounded ({saved.rounding}): {saved.update_lost:.1%} of the update is "
        "not in the weights; exact/ keeps it"
    ]
