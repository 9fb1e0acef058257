"""Training without starting processes, for tests of what happens inside of one."""

import os
import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from osft.cli import app
from osft.models.training_summary import TrainingSummary
from osft.training import launch, local_job, worker
from osft.training.job import JobStatus, Phase


class InProcessJob:
    """`osft.training.local_job.LocalJob` in this process: over when it is submitted."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments

    def describe(self) -> str:
        return " ".join(self._arguments)

    def submit(self) -> None:
        app(self._arguments, standalone_mode=False)

    def status(self) -> JobStatus:
        return JobStatus(phase=Phase.SUCCEEDED, since=datetime.now(UTC))

    def logs(self, stop: threading.Event) -> Iterator[str]:
        return iter(())

    def cancel(self) -> None:
        pass


def run_in_process(monkeypatch) -> None:
    """From now on a run of one process happens in this one: the same worker, without the seconds of starting it."""

    def run_processes(launch_config: Any, work: dict[str, Any]) -> TrainingSummary:
        assert launch_config.nproc_per_node == 1
        assert launch_config.max_nodes == 1
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
        torch_state = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
        try:
            worker.train_process(work)
            return TrainingSummary.from_json(Path(work["summary_file"]).read_bytes(), work["summary_file"])
        finally:
            Path(work["summary_file"]).unlink(missing_ok=True)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
            torch.use_deterministic_algorithms(torch_state[0])
            torch.set_num_threads(torch_state[1])

    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(launch, "_run_processes", run_processes)
    monkeypatch.setattr(local_job, "LocalJob", InProcessJob)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
