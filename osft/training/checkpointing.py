"""What a training process writes while it runs, and when.

    <ckpt_output_dir>/hf_format/samples_<n>.0/  models, named as mini-trainer names them
    <ckpt_output_dir>/state/step-<n>/           the newest training state, until the run is finished

Where ckpt_output_dir is a URI, they are written to a scratch folder and published from there (osft.training.mirror).

A process that receives SIGTERM (a preempted pod, a stopped or killed launcher) or an interrupt finishes its step, and
the run saves its state and ends. All processes agree on that: each step's requests are reduced over the ranks.
"""

import logging
import signal
import time
from dataclasses import asdict, fields
from pathlib import Path
from types import FrameType

import torch
from transformers import PreTrainedModel

from osft.data.dataset_folder import open_dataset
from osft.data.packing import Feeding
from osft.data.samples import Samples
from osft.models.conversion import ModelWeights
from osft.models.model_card import model_card
from osft.models.origin import MODEL_CARD, ORIGIN, Origin, base_of
from osft.settings.training import TrainConfig
from osft.training.block_moments import BlockMoments
from osft.training.callbacks import Request
from osft.training.identity import MADE_OF
from osft.training.lease import LeaseWatch
from osft.training.loop import Position, StepMetrics, WrittenModel
from osft.training.mirror import METRICS, MODELS, STOP_FILE, Mirror
from osft.training.resume import metrics_sha256
from osft.training.round_statistics import RoundStatistics
from osft.training.saving import SavedModel, save_merged
from osft.training.state import save_state

logger = logging.getLogger(__name__)


class Checkpointer:
    """Writes models and training states when `osft.training.loop` asks for it. All ranks call it alike."""

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        stored: ModelWeights,
        mirror: Mirror,
        *,
        samples: Samples,
        dataset: Path,
        replay: Path | None,
        statistics: RoundStatistics | None = None,
        factors: str | None = None,
        made_of: dict[str, str],
        feeding: Feeding,
    ) -> None:
        """`statistics` measures what was learned before a model is written, which then names it and `factors`."""
        self._made_of, self._statistics, self._factors = made_of, statistics, factors
        self._config, self._samples, self._dataset, self._replay = config, samples, dataset, replay
        self._folder, self._mirror = mirror.folder, mirror
        self._model, self._stored, self._feeding, self._rank = model, stored, feeding, feeding.rank
        self._interval = config.save_state_minutes * 60
        self._last_state = time.monotonic()
        self._terminated = self._told = False
        self._lease = LeaseWatch.of_this_process(config.ckpt_output_dir) if self._rank == 0 else None
        self.seconds = 0.0
        """Time spent writing."""
        for signum in (signal.SIGTERM, signal.SIGINT):  # an interrupt at a terminal goes to every process
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._terminated = True

    def request(self) -> int:
        """This rank's request after a step."""
        asked = self._asked_by_file() if self._rank == 0 else Request.NOTHING
        if self._terminated:
            asked = max(asked, Request.INTERRUPT)
        if self._lease and self._lease.is_lost:
            asked = Request.ABANDON
        if asked != Request.NOTHING:
            return asked
        is_due = self._interval and time.monotonic() - self._last_state > self._interval
        if self._rank == 0 and is_due and self._mirror.state_upload.is_over:
            return Request.SAVE_STATE
        return Request.NOTHING

    def is_uploading(self) -> bool:
        """Whether this rank uploads a state. Raises what went wrong while it did."""
        return self._mirror.state_upload.is_busy

    def continue_upload(self) -> None:
        """No rank is uploading: do what is next."""
        self._mirror.state_upload.go_on()

    def settle(self) -> None:
        """Return when the state is published."""
        started = time.perf_counter()
        self._mirror.state_upload.settle()
        self.seconds += time.perf_counter() - started

    def _asked_by_file(self) -> int:
        """The request of whoever follows the run. A file that cannot be read is looked at again after the next step."""
        try:
            request = int((self._folder / STOP_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Request.NOTHING
        except (OSError, ValueError) as error:
            if not self._told:
                logger.warning(f"train: {self._folder / STOP_FILE} cannot be read, trying again: {error}")
            self._told = True
            return Request.NOTHING
        return request if request in (Request.INTERRUPT, Request.STOP) else Request.NOTHING

    def model(self, name: str, metrics: StepMetrics) -> WrittenModel:
        """Write the tuned model after a step under a name."""
        started = time.perf_counter()
        path = f"{MODELS}/{name}"
        self._mirror.check_owner()
        statistics = self._statistics() if self._statistics else None

        def files(saved: SavedModel) -> dict[str, str]:
            origin = Origin(
                base_model=base_of(self._config, self._stored.folder),
                trained_from=self._config.model_path,
                statistics=statistics,
                factors=self._factors,
                **{field.name: getattr(saved, field.name) for field in fields(saved)},
            )
            card = model_card(
                self._config,
                origin,
                base_folder=self._stored.folder,
                dataset=open_dataset(self._dataset).statistics,
                replay=open_dataset(self._replay).statistics if self._replay else None,
                scores={
                    "training loss of the last step": metrics.loss,
                    "validation loss": metrics.validation_loss,
                    "steps": metrics.step,
                    "epochs": metrics.epoch,
                    "samples": metrics.samples,
                    "tokens": metrics.tokens,
                },
                name=name,
            )
            return {MODEL_CARD: card, ORIGIN: origin.to_json()}

        saved = save_merged(
            self._model,
            self._stored,
            self._folder / path,
            save_dtype=self._config.save_dtype,
            rounding=self._config.save_rounding,
            moments=self._moments() if self._config.save_rounding == "compensated" else None,
            seed=self._config.seed,
            files=files,
            rank=self._rank,
        )
        self._mirror.model(path)
        self.seconds += time.perf_counter() - started
        return WrittenModel(path, saved.total if saved else None)

    def _moments(self) -> BlockMoments:
        samples = [self._samples[i] for i in range(min(self._config.calibration_samples, len(self._samples.lengths)))]
        return BlockMoments(self._model, samples, self._feeding)

    def state(self, optimizer: torch.optim.Optimizer, position: Position) -> None:
        """Write the training state."""
        started = time.perf_counter()
        # Every rank gives the same; rank 0 alone has the metrics, and writes this down.
        metrics = metrics_sha256(self._folder / METRICS, position.step) if self._rank == 0 else ""
        described = asdict(position) | {MADE_OF: self._made_of, "metrics_sha256": metrics}
        save_state(self._mirror, self._model, optimizer, described)
        self._last_state = time.monotonic()
        self.seconds += time.perf_counter() - started
