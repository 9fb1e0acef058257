"""What the split of a weight costs on one CPU core, computed anew and from the last round's split.

    python -m benchmarks.svd      # about two minutes on a quiet core

Seconds are those that the process computed (user and system time of one thread), so that others on the machine count
less than on the wall's clock. The ways take turns.

    torch.linalg.svd, float32   all singular vectors
    torch.linalg.svd, float64   the same, of the weight in float64: what the others are compared with
    decompose                   eigenvectors of the Gram matrix in float64, and of the long side what the split needs
    next_split                  from the split of the weight before a round that moved it, with its checks

How exact a way is, is the sine of the largest angle between its free directions of the input and those of the float64
decomposition.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from benchmarks.machine import describe_machine
from osft.subspace.decomposition import Factors, decompose
from osft.subspace.next_split import next_split

SHAPES = ((2048, 2048), (5632, 2048))
RATIO = 0.25
SINGLE, DOUBLE = "torch.linalg.svd, float32", "torch.linalg.svd, float64"
RESULTS = Path(__file__).parent / "results"


def a_weight(shape: tuple[int, int]) -> torch.Tensor:
    """Some large directions over noise whose scale differs from row to row, float32."""
    m, n = shape
    noise = 0.02 * torch.randn(m, n) * (torch.rand(m, 1) + 0.5) * (torch.rand(1, n) + 0.5)
    sizes = torch.arange(1, 65) ** -0.7
    return noise + 0.05 * (torch.randn(m, 64) * sizes) @ torch.randn(64, n)


def trained(weight: torch.Tensor, factors: Factors) -> torch.Tensor:
    """The weight after an update of 0.2 % of its norm in the free directions. weight: tall or square."""
    assert factors.right is not None
    update = torch.randn(weight.shape) @ factors.right @ factors.right.T
    if factors.left is not None:
        update = factors.left @ (factors.left.T @ update)
    if factors.frozen is not None:
        high = weight @ factors.frozen
        update -= high @ (high.T @ update)
    return weight + 2e-3 * weight.norm() * update / update.norm()


@dataclass(slots=True)
class Measured:
    """One way to split one weight."""

    seconds: list[float] = field(default_factory=list)
    """Of the CPU, a run each."""
    sine: float = 0.0
    """Of the largest angle between its free directions and the exact ones."""


def measure(shape: tuple[int, int], runs: int) -> dict[str, Measured]:
    """Every way `runs` times, in turns."""
    torch.manual_seed(0)
    rank = round(RATIO * min(shape))
    before_weight = a_weight(shape)
    before = decompose(before_weight, rank)
    weight = trained(before_weight, before)
    ways: dict[str, Callable[[], torch.Tensor | None]] = {
        SINGLE: lambda: torch.linalg.svd(weight, full_matrices=False).Vh[-rank:].T,
        DOUBLE: lambda: torch.linalg.svd(weight.double(), full_matrices=False).Vh[-rank:].T,
        "decompose": lambda: decompose(weight, rank).right,
        "next_split": lambda: next_split(weight, before).right,
    }
    frozen = torch.linalg.svd(weight.double(), full_matrices=False).Vh[:-rank]
    measured = {name: Measured() for name in ways}
    for run in range(runs):
        for name, way in ways.items():
            started = time.process_time()
            free = way()
            taken = time.process_time() - started
            measured[name].seconds.append(taken)
            assert free is not None, "of a tall or square weight"
            measured[name].sine = torch.linalg.matrix_norm(frozen @ free.double(), 2).item()
            print(f"{shape} run {run + 1} {name}: {taken:.2f} s", file=sys.stderr, flush=True)
    return measured


def report(measured: dict[tuple[int, int], dict[str, Measured]], results: Path) -> None:
    """Write the table."""
    rows = []
    for (m, n), ways in measured.items():
        single, double = (median(ways[name].seconds) for name in (SINGLE, DOUBLE))
        for name, way in ways.items():
            taken = median(way.seconds)
            spread = f"{taken:.2f} ({min(way.seconds):.2f}-{max(way.seconds):.2f})"
            rows.append(
                f"| {m} x {n} | {name} | {len(way.seconds)} | {spread} | {way.sine:.0e} | {single / taken:.1f} | "
                f"{double / taken:.1f} |"
            )
    machine = describe_machine("cpu")
    lines = [
        "# The split of a weight",
        "",
        "Written by `python -m benchmarks.svd`.",
        "",
        "| weight | way | runs | CPU seconds, median (min-max) | sine of the angle to the exact free directions "
        "| times faster than float32's | than float64's |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"- {machine['processor']}, one thread; torch {machine['torch']}; {date.today().isoformat()}; load "
        f"averages over 1, 5 and 15 minutes at the end: {', '.join(f'{load:.1f}' for load in os.getloadavg())}",
        "- the ways take turns; seconds of the process's own CPU time",
        "- a quarter of the directions is free",
        "- not measured on a GPU: none was there",
    ]
    results.mkdir(parents=True, exist_ok=True)
    (results / "svd_cpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(
    runs: Annotated[int, typer.Option(min=1, help="Of each way, in turns.")] = 3,
    results: Annotated[Path, typer.Option(help="Folder for svd_cpu.md.")] = RESULTS,
) -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    report({shape: measure(shape, runs) for shape in SHAPES}, results)


if __name__ == "__main__":
    typer.run(main)
