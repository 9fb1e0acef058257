"""Whether a run's outputs have room, asked before the first step: a disk that fills up hours later costs the run.

models    the served weights in the dtype in which they are saved, and 2 bytes for each entry of a trained weight
          that is rounded (`osft.models.rounding`); as many models as the settings ask for, one of the best
          with protect="activations" also the statistics of what its layers were fed, which go to the factors
state     the coefficients and two moments of each in float32; twice, since a new state is written beside the older
"""

import errno
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from osft.models.checkpoint import CheckpointReader
from osft.settings.training import TrainConfig
from osft.subspace.decomposition import factor_shapes
from osft.subspace.factor_set import FactorSet
from osft.subspace.moment_sums import OUTPUT_DIRECTIONS, kept_rank
from osft.training.mirror import MODELS


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSizes:
    """Bytes that a run writes."""

    model: int
    """The served weights."""
    exact: int
    """What lies beside them, to have the exact ones again."""
    statistics: int
    """What the next training starts from (protect="activations"), beside the factors."""
    models: int
    """Number of models at the end."""
    state: int
    """One training state."""

    @property
    def total(self) -> int:
        """The most that is there at once."""
        return self.models * (self.model + self.exact + self.statistics) + 2 * self.state


def output_sizes(config: TrainConfig, model: Path, factors: FactorSet) -> OutputSizes:
    """What a run will write."""
    reader = CheckpointReader(model)
    chosen = None if config.save_dtype == "auto" else getattr(torch, config.save_dtype)
    served = exact = coefficients = 0
    by_dtype: dict[torch.dtype, int] = {}
    for name in reader.names():
        entries, stored = reader.empty(name).numel(), reader.served_dtype(name)
        dtype = chosen if chosen and stored.is_floating_point else stored
        by_dtype[dtype] = by_dtype.get(dtype, 0) + entries
        served += entries * dtype.itemsize
    trained = max(by_dtype, key=lambda dtype: by_dtype[dtype])  # the dtype of the large weights
    split_kinds = factors.split_kinds
    for name, weight in factors.weights.items():
        shape = weight.shape
        coefficients += math.prod(factor_shapes(shape, weight.rank, split_kinds[name])["coefficients"])
        exact += 2 * math.prod(shape) if trained.itemsize < 4 else 0
    final = config.num_epochs if config.checkpoint_at_epoch else int(bool(config.save_final_checkpoint))
    models = final + int(bool(config.save_best_val_loss))
    return OutputSizes(
        model=served,
        exact=exact,
        statistics=_statistics_size(factors) if factors.protect == "activations" else 0,
        models=models,
        state=3 * 4 * coefficients,
    )


def _statistics_size(factors: FactorSet) -> int:
    """Bytes of a model's statistics, but for what describes them: the bases, in float16."""
    inputs: dict[str, int] = {}
    outputs = 0
    for name, weight in factors.weights.items():
        *experts, m, n = weight.shape
        if factors.split_kinds[name] == "left":
            m, n = n, m
        inputs[weight.file] = 2 * n * kept_rank((*experts, n, n)) * math.prod(experts)  # of several weights once
        outputs += 0 if experts else 2 * m * min(m, OUTPUT_DIRECTIONS)
    return sum(inputs.values()) + outputs


def check_disk_space(config: TrainConfig, output: Path, model: Path, factors: FactorSet) -> None:
    """Raise OSError (ENOSPC), with the numbers, if what a run will write has no room where it writes.

    What an earlier start left in `output` counts as room: it is replaced, or need not be written again.
    """
    sizes = output_sizes(config, model, factors)
    there = [file for name in (MODELS, "state") for file in (output / name).rglob("*") if file.is_file()]
    room = shutil.disk_usage(output).free + sum(file.stat().st_size for file in there)
    if sizes.total <= room:
        return
    models = f"{sizes.models} models" if sizes.models != 1 else "a model"
    known = f" and {_gb(sizes.statistics)} of statistics" if sizes.statistics else ""
    raise OSError(
        errno.ENOSPC,
        f"{output} has room for {_gb(room)}, and the run writes {_gb(sizes.total)}: {models} of {_gb(sizes.model)} "
        f"with {_gb(sizes.exact)} of exact weights{known}, and the training state of {_gb(sizes.state)} twice. Free "
        f"{_gb(sizes.total - room)}, or give a ckpt_output_dir on a larger disk",
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
