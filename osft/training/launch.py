"""Starting the training processes of one node from a function call, and waiting for them.

What happens to a run that does not end well: if a process dies, torchrun's agent stops the others and the call raises
with the first one's own traceback. If the caller is told to end (SIGTERM, an interrupt: `osft.process.termination`) or
is killed, the processes save their training state and end. If the machine goes, what was saved last is there. The next
call with the same settings and `resume="auto"` resumes from it. Two calls at once for one folder: the second is
refused.
"""

import logging
import os
import re
import signal
import sys
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from osft import storage
from osft.models.checkpoint import CheckpointReader
from osft.models.loading import model_folder
from osft.models.training_summary import TrainingSummary
from osft.process.errors import note_in
from osft.process.exit_codes import ABANDONED, CONNECTION_LOST, FAILED, INTERRUPTED
from osft.process.termination import CAN_PASS_ON, children, passing_on
from osft.settings.training import TrainConfig
from osft.storage.atomic import write_json
from osft.storage.hashes import file_sha256
from osft.storage.lock import exclusive
from osft.storage.sealed import write_sealed
from osft.training.callbacks import Follower, TrainingCallback
from osft.training.compiling import check_compiler
from osft.training.disk_space import check_disk_space
from osft.training.factors import factor_set, factor_store, named_factors
from osft.training.identity import MADE_OF, model_contents
from osft.training.liger import liger_wanted
from osft.training.mirror import SETTINGS, SUMMARY, fetch_models, fill, output_folder
from osft.training.own_text import needs_own_text, own_text
from osft.training.prepare import check_model, held_out_selection, prepare_replay, prepare_training_data
from osft.training.result import TrainResult
from osft.training.resume import check_state_is_of, clear, finished_run, remove_states, run_uri, state_to_resume
from osft.training.state import read_position

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

logger = logging.getLogger(__name__)


_WORKER = "osft.training.worker"
_SAVE_SECONDS = 120  # to save the training state in, when the run is asked to end


class TrainingFailed(RuntimeError):
    """Training failed or was interrupted, and what a process should end with that tells of it (`exit_codes`)."""

    def __init__(self, message: str, exit_code: int, *, reason: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.reason = reason
        """One line, where it is something that the user can cure and no traceback is wanted."""


def train(config: TrainConfig, callbacks: Sequence[TrainingCallback] = ()) -> TrainResult:
    """Prepare what is missing, train in `config.nproc_per_node` processes and wait for them.

    A finished run in `ckpt_output_dir` that is the same is returned as it is, an unfinished one is resumed
    (`osft.training.resume`). With several nodes, each of them calls this.

    Raises FileNotFoundError for missing inputs and ValueError for settings that cannot work, before a process is
    started, ValueError if `ckpt_output_dir` holds another run, RuntimeError if another process is training there (it is
    waited for OSFT_LOCK_SECONDS, if that is set) and TrainingFailed, with the traceback of the first failing rank.
    """
    config = with_environment(config)
    output = output_folder(config)
    processes = num_processes(config)
    liger = liger_wanted(config)
    check_compiler(config)
    model = CheckpointReader(model_folder(config.model_path)).folder
    found = check_model(config, model)
    logger.info(found.line())
    data = prepare_training_data(config, model)
    replay = prepare_replay(config, model, data)
    made_of = model_contents(model) | {"dataset": data.key} | named_factors(config)
    if replay:
        made_of["replay"] = replay.key
    patience = float(os.environ.get("OSFT_LOCK_SECONDS", "0"))
    owns_folder = config.node_rank == 0 or storage.is_remote(config.ckpt_output_dir)
    with exclusive(output, patience_seconds=patience) if owns_folder else nullcontext() as lock:
        fill(config, output)
        finished = finished_run(config, output, made_of)
        if finished:
            if owns_folder:
                remove_states(config, output, finished.summary.checkpoints)
            fetch_models(config, output, finished.summary.checkpoints)
            return finished
        state = state_to_resume(config, output, made_of)
        selection = held_out_selection(config, data, replay)
        factors = factor_set(config, model, data, found)
        made_of["factors"] = factors.bases_sha256
        text = own_text(config, model, factor_store(config))
        if text and needs_own_text(config):
            made_of["own_text"] = file_sha256(text)
        if state:
            check_state_is_of(state, config, made_of, output)
        if config.node_rank == 0:
            check_disk_space(config, output, model, factors)
            clear(config, output, state)
            write_sealed(output / SETTINGS, config.to_dict() | {"dataset": data.key, MADE_OF: made_of})
            storage.publish(storage.join(config.ckpt_output_dir, SETTINGS), source=output / SETTINGS)
        after = read_position(state)["step"] if state else 0
        work = {
            "config": config.to_dict(),
            "output": str(output),
            "model": str(model),
            "dataset": str(data.folder),
            "replay": str(replay.folder) if replay else None,
            "factors": str(factors.path),
            "factor_set": storage.join(factor_store(config), "sets", factors.path.name)
            if factors.protect == "weights"
            else None,
            "statistics": storage.join(factor_store(config), factors.statistics) if factors.statistics else None,
            "selection": selection,
            "text": str(text) if text else None,
            "made_of": made_of,
            "state": str(state) if state else None,
            "lock": str(lock.file) if lock else None,
            "liger": liger,
            "preflight": found.to_dict(),
            "summary_file": str(output / f"summary-{config.node_rank}.json"),
        }
        with Follower(output, callbacks, after=after) if config.node_rank == 0 else nullcontext():
            summary = _run_processes(_launch_config(config, processes), work)
        if not (output / SUMMARY).is_file():  # not node 0, and a folder of its own
            write_sealed(output / SUMMARY, summary.to_dict())
        if owns_folder:
            remove_states(config, output, summary.checkpoints)
        fetch_models(config, output, summary.checkpoints)
    return TrainResult(output, summary, uri=run_uri(config))


def with_environment(config: TrainConfig) -> TrainConfig:
    """The settings with torchrun's variables (PET_NNODES, PET_NODE_RANK, …) where they were left at their defaults."""
    found: dict[str, Any] = {}
    for name in ("nnodes", "node_rank", "nproc_per_node", "rdzv_id", "rdzv_endpoint", "master_addr", "master_port"):
        text = os.environ.get(f"PET_{name.upper()}")
        if text and getattr(config, name) == TrainConfig.model_fields[name].default:
            found[name] = int(text) if text.isdigit() else text
    if config.rdzv_endpoint or found.get("rdzv_endpoint"):
        found.pop("master_addr", None), found.pop("master_port", None)
    return config.replace(**found) if found else config


def num_processes(config: TrainConfig) -> int:
    """Processes on this node. Raises ValueError for "gpu" on a machine without."""
    if isinstance(config.nproc_per_node, int):
        return config.nproc_per_node
    gpus = torch.cuda.device_count()
    if not gpus and config.nproc_per_node == "gpu":
        raise ValueError("nproc_per_node is 'gpu', but there is no GPU on this machine. Use 'auto' or a number")
    return max(1, gpus)


def _launch_config(config: TrainConfig, processes: int) -> "LaunchConfig":
    from torch.distributed.launcher.api import LaunchConfig

    common: dict[str, Any] = {
        "nproc_per_node": processes,
        "max_restarts": 0,
        "monitor_interval": 0.2,
        "shutdown_timeout": _SAVE_SECONDS,
    }
    if CAN_PASS_ON:
        common["signals_to_handle"] = "SIGHUP,SIGQUIT"  # the others are ours, from before the agent is there
    if config.nnodes == 1:
        return LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            run_id=str(config.rdzv_id or uuid.uuid4().hex),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port: several runs may share the machine
            **common,
        )
    # Static, as torchrun without --rdzv_backend: ranks follow node_rank, and node 0 may listen on 0.0.0.0.
    return LaunchConfig(
        min_nodes=config.nnodes,
        max_nodes=config.nnodes,
        run_id=str(config.rdzv_id or "osft"),
        rdzv_backend="static",
        rdzv_endpoint=config.rdzv_endpoint or f"{config.master_addr}:{config.master_port or 29500}",
        rdzv_configs={"rank": config.node_rank, "timeout": round(60 * config.rdzv_timeout_minutes)},
        **common,
    )


def _run_processes(launch: "LaunchConfig", work: dict[str, Any]) -> TrainingSummary:
    """Start `osft.training.worker` in each process, wait, and return the summary. Raises RuntimeError if one fails."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if work["config"]["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs for the same result twice
    workers = partial(children, running=_WORKER)
    summary_file = Path(work["summary_file"])
    work_file = summary_file.with_name(summary_file.name.replace("summary", "work"))
    write_json(work_file, work | {"launcher": os.getpid()})
    try:
        with passing_on(workers, patience_seconds=_SAVE_SECONDS) as asked:
            try:
                elastic_launch(launch, sys.executable)("-u", "-m", _WORKER, str(work_file))
            except (ChildFailedError, RendezvousError, torch.distributed.DistError) as error:
                signum = asked()
                if signum is None:
                    raise
                _tell_interruption(error, signal.Signals(signum))
                raise SignalException(f"asked to end by signal {signum}", signal.Signals(signum)) from None
        return TrainingSummary.from_json(summary_file.read_bytes(), str(summary_file))
    except ChildFailedError as error:
        raise _training_failed(error) from None
    except (RendezvousError, torch.distributed.DistError) as error:
        raise TrainingFailed(f"the nodes did not meet, or lost each other: {error}", CONNECTION_LOST) from None
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + error.sigval) from None
    finally:
        for file in (work_file, summary_file):
            file.unlink(missing_ok=True)


def _tell_interruption(error: Exception, signum: signal.Signals) -> None:
    """Say that the run ends because it was asked to, and what else went wrong on the way."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if isinstance(error, ChildFailedError):
        failure = _training_failed(error)
        if failure.exit_code != INTERRUPTED:
            logger.error(f"train: {failure}")
    logger.warning(f"train: ended by {signum.name}; the same call resumes from the state that was saved last")


def _training_failed(error: "ChildFailedError") -> TrainingFailed:
    """The failure of a run, by the process that the others followed."""
    rank, failure = _root_failure(error)
    if failure.exitcode == INTERRUPTED:
        return TrainingFailed(
            f"training was interrupted: rank {rank} was asked to end (SIGTERM). Its state is saved; the same call "
            "resumes from there",
            INTERRUPTED,
        )
    if failure.exitcode == ABANDONED:
        return TrainingFailed(
            "training has ended itself: nobody has followed it for too long. Its state is saved; the same call resumes "
            "from there",
            ABANDONED,
        )
    details = failure.error_file_data.get("message", failure.message)
    if isinstance(details, dict):
        details = details.get("extraInfo", {}).get("py_callstack") or details.get("message")
    if failure.exitcode < 0:
        return TrainingFailed(
            f"training failed: rank {rank} ended with signal {-failure.exitcode}\n{details}", 128 - failure.exitcode
        )
    reason = note_in(str(details))
    return TrainingFailed(
        f"training failed: rank {rank} ended with exit code {failure.exitcode}\n{details}",
        CONNECTION_LOST if _CONNECTION_LOST.search(str(details)) else FAILED,
        reason=f"training failed: rank {rank}: {reason}" if reason else "",
    )


_CONNECTION_LOST = re.compile(
    r"Dist(Backend|Network|Store)Error|gloo/transport|Connection (reset|closed) by peer|ConnectionError:"
)
"""In the traceback of a process whose peer ended (NCCL, the rendezvous' store, gloo) or whose object store is away."""


def _root_failure(error: "ChildFailedError") -> tuple[int, "ProcessFailure"]:
    """The failure that the others follow from: a process that was killed, else the first that raised.

    When a process is killed, its peers' broken connections are reported with earlier timestamps than its own end.
    """
    for rank, failure in error.failures.items():
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # SIGTERM is how the agent stops the rest
            return rank, failure
    return error.get_first_failure()
