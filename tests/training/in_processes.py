"""A function on each rank of a real process group, without the seconds of starting Python anew."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch


def in_processes(
    function: Callable[[int], object], folder: Path, *, world_size: int = 2, timeout_seconds: float = 60.0
) -> list[object]:
    """What the function gives on each rank of a gloo group whose timeout this is, or the text of its error."""
    context = multiprocessing.get_context("fork")
    found = context.Queue()

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            torch.distributed.init_process_group(
                "gloo",
                store=torch.distributed.FileStore(str(folder / "store"), world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_seconds),
            )
            found.put((rank, function(rank)))
        except Exception as error:
            found.put((rank, f"{type(error).__name__}: {error}"))

    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for process in processes:
        process.start()
    results = dict(found.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(30)
    return [results[rank] for rank in range(world_size)]
