"""Starting the training processes of one machine from a function call."""

import json
import os
import signal
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from osft.atomic import write_json
from osft.checkpoint import CheckpointReader
from osft.config import TrainConfig
from osft.subspace.factor_store import load_factor_set

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training run leaves."""

    checkpoint: Path
    """A plain Hugging Face folder."""
    metrics: Path
    """JSON lines, one a step: `osft.training.loop.StepMetrics`."""
    summary: dict[str, Any]
    """Counts, timings, memory, final loss; the content of `training.json`."""
    reused: bool = False
    """True if the run had already finished and nothing was trained."""


def train(config: TrainConfig) -> TrainResult:
    """Train in `config.nproc_per_node` processes started by torchrun's agent and wait for them.

    A finished run with the same settings in `output_dir` is returned as it is, so a retried step does not train
    twice. If a process dies, the others are stopped.

    Raises FileNotFoundError for missing inputs and ValueError for settings that cannot work, before a process is
    started, ValueError if `output_dir` holds another run, and RuntimeError with the traceback of the first
    failing rank if training fails.
    """
    output = Path(config.output_dir)
    finished = _finished(output, config)
    if finished:
        return finished
    _check_inputs(config)
    output.mkdir(parents=True, exist_ok=True)
    config_file = output / "config.json"
    write_json(config_file, config.to_dict())

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.nproc_per_node or max(1, torch.cuda.device_count()),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        elastic_launch(launch, sys.executable)("-u", "-m", "osft.training.worker", str(config_file))
    except ChildFailedError as error:
        rank, failure = _root_failure(error)
        details = failure.error_file_data.get("message", failure.message)
        if isinstance(details, dict):
            details = details.get("extraInfo", {}).get("py_callstack") or details.get("message")
        reason = f"exit code {failure.exitcode}" if failure.exitcode >= 0 else f"signal {-failure.exitcode}"
        raise RuntimeError(f"training failed: rank {rank} ended with {reason}\n{details}") from None
    result = _finished(output, config)
    assert result is not None, "the worker ends with an error or with a summary"
    return TrainResult(result.checkpoint, result.metrics, result.summary)


def _root_failure(error: "ChildFailedError") -> tuple[int, "ProcessFailure"]:
    """The failure that the others follow from: a process that was killed, else the first that raised.

    When a process is killed, its peers' broken connections are reported with earlier timestamps than its own end.
    """
    for rank, failure in error.failures.items():
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # SIGTERM is how the agent stops the rest
            return rank, failure
    return error.get_first_failure()


def _finished(output: Path, config: TrainConfig) -> TrainResult | None:
    """The run in `output`, if it is complete: the summary is written last."""
    summary_file = output / "training.json"
    if not summary_file.is_file():
        return None
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    if summary["config"] != json.loads(json.dumps(config.to_dict())):
        raise ValueError(f"output_dir {output} holds a finished run with other settings. Give another output_dir")
    return TrainResult(output / "checkpoint", output / "metrics.jsonl", summary, reused=True)


def _check_inputs(config: TrainConfig) -> None:
    """What can be checked without loading the model."""
    CheckpointReader(config.model_path)
    load_factor_set(config.factors_path)
    data = Path(config.data_path)
    if not (data / "dataset.json").is_file():
        raise FileNotFoundError(f"data_path {data} is not a prepared dataset. Run `prepare_data` first")
    longest = json.loads((data / "dataset.json").read_text(encoding="utf-8"))["longest_sample"]
    if longest > config.max_tokens_per_gpu:
        raise ValueError(
            f"max_tokens_per_gpu={config.max_tokens_per_gpu} is less than the longest training sample ({longest} "
            "tokens). Raise it, or prepare the data with a smaller max_seq_len"
        )
