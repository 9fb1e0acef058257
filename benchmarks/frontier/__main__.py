"""The experiment that decides the project's defaults: what does a method learn, and how far does the model drift?

    python -m benchmarks.frontier                    # all that is missing, then the report (hours on a CPU)
    python -m benchmarks.frontier --dry-run          # what would be run, and how long it should take
    python -m benchmarks.frontier -e screen          # one experiment only
    python -m benchmarks.frontier --report-only      # the report of what is there

A healed SmolLM2-135M learns far domains by many methods. Each run is measured, also with its update scaled: how much
it learned, how far predictions on other text moved, what became of earlier tasks. Below --storage a finished run is a
file; the same command goes on where a killed one ended, and several processes share the work: start it twice to use
two cores. Runs that are published in --results are not made again, if model, texts and settings are the same. The
manual pages come from Debian's packages (apt-get download), the model and the rest from osft.data.examples.
"""

import sys
import time
from collections.abc import Set
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.frontier.materials import gather
from benchmarks.frontier.plan import EXPERIMENTS
from benchmarks.frontier.report import published_runs, write_report
from benchmarks.frontier.runs import Run, execute_missing, finished
from osft.process.console import failures

RESULTS = Path(__file__).parents[1] / "results"
SECONDS_PER_STEP = {"screen": 2.0, "whole": 6.5}
"""Of one thread, to begin with; measuring a run takes about as long as its training."""


def main(
    experiment: Annotated[
        list[str] | None, typer.Option("--experiment", "-e", help=f"One of {', '.join(EXPERIMENTS)}; repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs take other training blocks with each seed.", min=1)] = 3,
    storage: Annotated[Path, typer.Option(help="Model, texts and finished runs.")] = Path("runs/frontier"),
    results: Annotated[Path, typer.Option(help="Where the report is written.")] = RESULTS,
    threads: Annotated[int, typer.Option(help="CPU threads of this process.", min=1)] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and how long.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Only report what is there.")] = False,
) -> None:
    """Run what is missing of the experiments, and write the report of all of them."""
    unknown = set(experiment or ()) - set(EXPERIMENTS)
    if unknown:
        raise typer.BadParameter(f"there is no {unknown.pop()}; there are {', '.join(EXPERIMENTS)}", param_hint="-e")
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()

    def progress(what: str) -> None:
        print(f"{(time.perf_counter() - started) / 60:5.1f} min  {what}", file=sys.stderr, flush=True)

    with failures():
        materials = gather(storage / "cache", device, progress)
        published = published_runs(results, materials.identity)
        plans = {name: plan.runs(seeds) for name, plan in EXPERIMENTS.items()}
        chosen = [run for name, runs in plans.items() if not experiment or name in experiment for run in runs]
        if dry_run:
            made_here = {run: result["seconds"] for run, result in finished(chosen, materials, storage).items()}
            _print_plan(chosen, published.keys() | made_here.keys(), made_here)
            return
        if not report_only:
            execute_missing([run for run in chosen if run not in published], materials, storage, device, progress)
        found = {
            name: {run: published[run] for run in runs if run in published} | finished(runs, materials, storage)
            for name, runs in plans.items()
        }
        missing = {name: [run for run in runs if run not in found[name]] for name, runs in plans.items()}
        write_report(found, missing, results, materials.identity)


def _print_plan(runs: list[Run], done: Set[Run], made_here: dict[Run, float]) -> None:
    """What there is to do; runs that others published say nothing of this machine's speed."""
    seconds = 0.0
    for run in runs:
        if run in done:
            print(f"  there     {run}")
            continue
        alike = [took for other, took in made_here.items() if (other.scope, other.tasks) == (run.scope, run.tasks)]
        estimate = 2 * SECONDS_PER_STEP[run.scope] * run.steps * len(run.tasks)
        expected = sum(alike) / len(alike) if alike else estimate
        seconds += expected
        print(f"  {expected / 60:4.1f} min  {run}")
    to_do = sum(run not in done for run in runs)
    print(f"{to_do} of {len(runs)} runs to do, about {seconds / 3600:.1f} hours of one process")


if __name__ == "__main__":
    typer.run(main)
