"""One run: a method at a learning rate learns tasks one after the other, and is measured after each of them.

A finished run is a JSON file, named by the hash of all that determines it. Processes that work on the same storage
share the runs: each is locked by the process that does it.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.frontier.bench import Bench, Scope
from benchmarks.frontier.materials import OTHERS, Materials
from benchmarks.frontier.methods import Method
from benchmarks.frontier.network import Reference, measure, reference
from benchmarks.frontier.training import samples_of_steps, train
from benchmarks.machine import describe_machine
from osft.storage.atomic import write_json
from osft.storage.lock import exclusive

SCALES = (1.0, 0.75, 0.5, 0.25)
"""Of the update from the base: every run gives so many points."""
FORMAT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """All that tells a run from another one, besides model and texts."""

    scope: Scope
    """"screen": the last 8 blocks, and a softmax over the tokens that occur. "whole": the whole model."""
    tasks: tuple[str, ...]
    steps: int
    """Of each task."""
    method: Method
    learning_rate: float
    seed: int = 0

    def __str__(self) -> str:
        tasks = ", ".join(self.tasks)
        return f"{self.scope}, {tasks}, {self.steps} steps: {self.method}, {self.learning_rate:g}, seed {self.seed}"

    def file(self, storage: Path, identity: str) -> Path:
        """Where its result is kept."""
        described = json.dumps([FORMAT, asdict(self), SCALES, identity], sort_keys=True)
        return storage / "runs" / f"{hashlib.sha256(described.encode()).hexdigest()[:16]}.json"


def execute(run: Run, bench: Bench, progress: Callable[[str], None]) -> dict[str, Any]:
    """The result of a run."""
    network, started = bench.network, time.perf_counter()
    network.put({}, 0.0)
    texts = [*run.tasks, *OTHERS]
    references = {"base": bench.base_reference(texts)}
    own: dict[str, Reference] = {}
    stages, losses, seconds = [], {}, 0.0
    carried = None
    for number, task in enumerate(run.tasks):
        known, others = bench.known(run.method, carried), bench.others(run.method, run.tasks[:number])
        began = time.perf_counter()
        losses[task] = train(
            network,
            run.method,
            run.learning_rate,
            bench.task(task),
            steps=run.steps,
            seed=run.seed,
            known=known,
            others=others,
        )
        seconds += time.perf_counter() - began
        progress(f"{run}: {task} learned, loss {losses[task][0]:.3f} -> {losses[task][-1]:.3f}")
        tuned = {name: tensor.clone() for name, tensor in network.weights().items()}
        learned, is_last = run.tasks[: number + 1], number == len(run.tasks) - 1
        if not is_last:
            own[task] = reference(network, {task: bench.held_out(task)})
        for scale in SCALES if is_last else (1.0,):
            network.put(tuned, scale)
            measured = {
                name: measure(
                    network,
                    bench.held_out(name),
                    name,
                    references | ({"own": own[name]} if name in own and name != task else {}),
                )
                for name in (*learned, *OTHERS)
            }
            stages.append({"task": task, "scale": scale, "measured": measured})
        network.put(tuned)
        if not is_last:
            samples = [sample for step in samples_of_steps(bench.task(task), run.steps, run.seed) for sample in step]
            carried = bench.carry(run.method, carried, task, samples)
    return {
        "run": asdict(run),
        "name": str(run),
        "base": {name: bench.base[name] for name in texts},
        "losses": losses,
        "stages": stages,
        "train_seconds": seconds,
        "seconds": time.perf_counter() - started,
        "machine": describe_machine(network.device) | {"threads": torch.get_num_threads()},
    }


def execute_missing(
    runs: list[Run], materials: Materials, storage: Path, device: str, progress: Callable[[str], None]
) -> None:
    """Do the runs that are not there yet, in their order, and that no other process is at."""
    bench: tuple[Scope, Bench] | None = None
    for number, run in enumerate(runs):
        file = run.file(storage, materials.identity)
        if file.is_file():
            continue
        try:
            with exclusive(storage / "claims" / file.stem):
                if file.is_file():
                    continue
                if bench is None or bench[0] != run.scope:
                    bench = None
                    bench = run.scope, Bench(materials, run.scope, storage / "cache", device, progress)
                progress(f"run {number + 1} of {len(runs)}, {run}")
                write_json(file, execute(run, bench[1], progress))
        except RuntimeError as error:
            if "another process" not in str(error):
                raise


def finished(runs: list[Run], materials: Materials, storage: Path) -> dict[Run, dict[str, Any]]:
    """The results that are there."""
    files = {run: run.file(storage, materials.identity) for run in runs}
    return {run: json.loads(file.read_text()) for run, file in files.items() if file.is_file()}
