"""TensorBoard and Weights & Biases as callbacks of training. They end no training: what goes wrong is told once."""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from osft import storage
from osft.process.errors import explained, one_line
from osft.settings.training import TrainConfig
from osft.training.callbacks import TrainingCallback, TrainingContext

logger = logging.getLogger(__name__)

_SETTINGS = ("project", "entity", "run_name")
_WAIT_SECONDS = 30.0


class _Logger(TrainingCallback):
    """Hands the numbers of each step on, until that fails."""

    name = ""

    def __init__(self) -> None:
        self._failed = False

    def write(self, step: int, numbers: dict[str, int | float], seconds: float) -> None:
        """Write the numbers of a step; `seconds` since the epoch."""
        raise NotImplementedError

    def on_step_end(self, context: TrainingContext) -> None:
        """Write a step's numbers."""
        if not self._failed:
            with self.told():
                numbers = {f"train/{name}": value for name, value in context.numbers.items()}
                self.write(context.step, numbers, context.metrics["timestamp"])

    @contextmanager
    def told(self) -> Iterator[None]:
        """What the block raises is told in a line, and nothing more is written."""
        try:
            yield
        except Exception as error:
            self._failed = True
            logger.warning(
                f"{self.name}: {one_line(explained(error) or error)}. Training continues; metrics.jsonl has all metrics"
            )


class TensorBoard(_Logger):
    """Writes the numbers of each step as scalars, over steps."""

    name = "tensorboard"

    def __init__(self, log_dir: str) -> None:
        super().__init__()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "tensorboard_log_dir needs the extra osft[tensorboard]. Install it: pip install 'osft[tensorboard]' "
                f"({error})"
            ) from None
        self._writer: SummaryWriter = SummaryWriter(log_dir)

    def write(self, step: int, numbers: dict[str, int | float], seconds: float) -> None:
        """Write each number as a scalar."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step, walltime=seconds)

    def on_train_end(self, context: TrainingContext) -> None:
        """Close the file."""
        with self.told():
            self._writer.close()


class WeightsAndBiases(_Logger):
    """Logs the numbers of each step to a run of Weights & Biases."""

    name = "wandb"

    def __init__(self, run: Any) -> None:
        super().__init__()
        self._run = run

    def write(self, step: int, numbers: dict[str, int | float], seconds: float) -> None:
        """Log the numbers at a step."""
        self._run.log(numbers | {"_timestamp": seconds}, step=step)

    def end(self, *, failed: bool) -> None:
        """Send what is left, for half a minute at most, and mark the run as ended."""
        with self.told():
            self._run.finish(exit_code=1 if failed else 0)


@contextmanager
def wandb_run(config: TrainConfig) -> Iterator[list[TrainingCallback]]:
    """The callback that logs to Weights & Biases, if a project is named by `wandb_project` or WANDB_PROJECT.

    None, and a line that says why, where the package is not installed or the run cannot be made: no key, no network.
    """
    given = {name: getattr(config, f"wandb_{name}") or os.environ.get(f"WANDB_{name.upper()}") for name in _SETTINGS}
    run = None
    if given["project"]:
        run = _started(config, given)
    elif config.wandb_entity or config.wandb_run_name:
        logger.warning("wandb: nothing is logged without a project. Give wandb_project, or set WANDB_PROJECT")
    try:
        yield [run] if run else []
    except BaseException:
        if run:
            run.end(failed=True)
        raise
    if run:
        run.end(failed=False)


def _started(config: TrainConfig, given: dict[str, str | None]) -> WeightsAndBiases | None:
    if importlib.util.find_spec("wandb") is None:
        logger.warning(
            "wandb: not installed, nothing is logged to it. Install it: pip install 'osft[wandb]'. Training continues"
        )
        return None
    import wandb

    # Below the run, not in the folder that the call happens to be made from.
    folder = Path(os.environ.get("WANDB_DIR") or storage.local(config.ckpt_output_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=given["project"],
            entity=given["entity"],
            name=given["run_name"],
            config=config.to_dict(),
            dir=folder,
            reinit="create_new",  # a run of the caller's own stays as it is
            settings=wandb.Settings(
                quiet=True,
                console="off",
                login_timeout=_WAIT_SECONDS,
                init_timeout=_WAIT_SECONDS,
                finish_timeout=_WAIT_SECONDS,
            ),
        )
    except Exception as error:  # each release has errors of its own
        logger.warning(f"wandb: {one_line(explained(error) or error)}. Nothing is logged to it, training continues")
        return None
    logger.info(f"wandb: {run.url or run.dir}")
    return WeightsAndBiases(run)
