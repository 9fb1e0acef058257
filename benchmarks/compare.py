"""A sequence of tasks learned by OSFT, by full fine-tuning and by LoRA: what each learns, and what it forgets.

    python -m benchmarks.compare                    # three tasks, two learning rates, one seed, on a CPU
    python -m benchmarks.compare --dry-run          # what would be run, and how long it should take
    python -m benchmarks.compare --device cuda      # three learning rates, three seeds
    python -m benchmarks.compare --rates osft=1e-4,3e-4 --rates full=1e-5,3e-5 --rates lora=3e-4,1e-3

One model learns the tasks one after the other. After each task it is measured on held-out records of all tasks and on
an anchor, text that none of the tasks is like. Each method is shown at its best learning rate: the one with the lowest
mean loss over all tasks at the end, on held-out records that nothing else uses (the selection records).

Below `--storage` every round (one task of one run) is a file that is written when it is complete, in a folder named by
the hash of the settings, of the model and of the data. The same command goes on where a killed one ended, and makes
nothing twice.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks.compare_report import write_report
from benchmarks.machine import describe_machine
from benchmarks.sequence import (
    METHODS,
    Materials,
    Settings,
    Work,
    count_work,
    describe_settings,
    gather,
    score_model,
    train_round,
)
from osft.atomic import write_json
from osft.console import failures
from osft.data.records import Record
from osft.lock import exclusive
from osft.training.loop import StepMetrics

RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "cpu": {"osft": (2e-4, 5e-4), "full": (3e-5, 1e-4), "lora": (3e-4, 1e-3)},
    "cuda": {"osft": (1e-4, 2e-4, 5e-4), "full": (1e-5, 3e-5, 1e-4), "lora": (1e-4, 3e-4, 1e-3)},
}
"""On a CPU the first of each is one that was tried on sarcasm headlines alone, 24 steps of 8 samples. On 64 held-out
records OSFT 2e-4 gave 63 % and 0.204 nats, full fine-tuning 3e-5 47 % and 0.224, LoRA 3e-4 45 % and 0.225. The second
is about three times as high. On a GPU: what is usual for each, nothing was tried."""
SEEDS = {"cpu": 1, "cuda": 3}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Run:
    """One method at one learning rate and seed, through all tasks."""

    method: str
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"{METHODS[self.method]} at {self.learning_rate:g}, seed {self.seed}"

    def folder(self, storage: Path, described: dict[str, Any]) -> Path:
        """Where its rounds are kept; other settings are another folder."""
        identity = json.dumps([described, asdict(self)], sort_keys=True)
        return storage / "runs" / hashlib.sha256(identity.encode()).hexdigest()[:16]


class Clock:
    """Says on stderr how far the comparison has come, and estimates the rest from the speed so far.

    Work is counted in tokens of a forward pass.
    """

    def __init__(self, remaining: int, tokens_per_second: float) -> None:
        self._remaining, self._done, self._expected_speed = remaining, 0.0, tokens_per_second
        self._started = self._last_line = time.monotonic()

    def advance(self, tokens: float) -> None:
        """Count work as done."""
        self._done += tokens

    def say(self, what: str, *, at_most_every: float = 0.0) -> None:
        """Print a line, unless the last one is younger than `at_most_every` seconds."""
        now = time.monotonic()
        if now - self._last_line < at_most_every:
            return
        self._last_line = now
        elapsed = now - self._started
        # Loading and splitting count in the time and not in the tokens, so a short stretch says too little.
        speed = self._done / elapsed if elapsed > 120 and self._done else self._expected_speed
        left = duration((self._remaining - self._done) / speed)
        print(f"{duration(elapsed)} done, about {left} left: {what}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Hours and minutes."""
    minutes = round(max(0.0, seconds) / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def results_of(folder: Path, num_tasks: int) -> list[dict[str, Any]]:
    """The finished rounds of a run, in their order."""
    files = [folder / f"round-{index}.json" for index in range(num_tasks)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


def play(run: Run, folder: Path, settings: Settings, materials: Materials, work: Work, clock: Clock) -> None:
    """The rounds of a run that are missing."""
    write_json(folder / "run.json", {**asdict(run), "settings": describe_settings(settings, materials)})
    for index in range(len(results_of(folder, len(materials.tasks))), len(materials.tasks)):
        task, learned = materials.tasks[index], materials.tasks[: index + 1]
        model, trained = folder / f"model-{index}", folder / f"trained-{index}.json"
        title = f"{run}: {task.name}"
        if model.is_dir():  # killed while it was measured
            clock.advance(work.train[task.name])
        else:
            clock.say(f"{title}, load{' and split' if run.method == 'osft' else ''}")
            train_round(
                settings,
                run.method,
                run.learning_rate,
                run.seed,
                source=folder / f"model-{index - 1}" if index else materials.base_model,
                dataset=task.dataset,
                target=model,
                # All runs of OSFT begin with the same split.
                factors=(folder if index else folder.parent.parent) / "factors",
                on_step=_tell(clock, title, work.train[task.name] * settings.batch_size / settings.train_samples),
                before_saving=partial(write_json, trained),
            )
        clock.say(f"{title}, learned; measure")
        is_last = learned == materials.tasks
        scores = score_model(model, learned, materials.anchor, settings, selection=is_last)
        measured = json.loads(trained.read_text(encoding="utf-8")) | {"task": task.name, **scores}
        write_json(folder / f"round-{index}.json", measured)
        clock.advance(work.measuring([task.name for task in learned], selection=is_last))
        accuracies = ", ".join(f"{name} {score['accuracy']:.0%}" for name, score in scores["report"].items())
        clock.say(f"{title}, measured: {accuracies}")
        _remove_what_is_used_up(folder, keep=model)


def _tell(clock: Clock, title: str, work_of_a_step: float) -> Callable[[StepMetrics], None]:
    def tell(metrics: StepMetrics) -> None:
        clock.advance(work_of_a_step)
        clock.say(f"{title}, step {metrics.step}, loss {metrics.loss:.3f}", at_most_every=30)

    return tell


def _remove_what_is_used_up(folder: Path, *, keep: Path) -> None:
    """Models that were learned on and what was measured beside them, factors, and what a killed process left."""
    used_up = ("model-*", "trained-*", "factors", "*.incomplete-*")
    for path in [found for pattern in used_up for found in folder.glob(pattern)]:
        if path != keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def measure_base(storage: Path, settings: Settings, materials: Materials) -> dict[str, Any]:
    """The scores of the base model, measured once."""
    identity = json.dumps(describe_settings(settings, materials), sort_keys=True)
    file = storage / "base" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    if not file.is_file():
        scored = score_model(materials.base_model, materials.tasks, materials.anchor, settings, selection=True)
        write_json(file, scored)
    scores: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return scores


def measure_speed(settings: Settings, materials: Materials) -> float:
    """Tokens of a forward pass in a second, measured on three records of each task; loading does not count."""
    tokens, seconds = [], []
    for number in (1, 4):
        few = [replace(task, report=task.report[:number], selection=()) for task in materials.tasks]
        work = count_work(replace(materials, tasks=tuple(few), anchor=materials.anchor[:1]))
        tokens.append(work.measuring([task.name for task in few], selection=False))
        started = time.perf_counter()
        score_model(materials.base_model, few, materials.anchor[:1], settings, selection=False)
        seconds.append(time.perf_counter() - started)
    return max(1, tokens[1] - tokens[0]) / max(1e-3, seconds[1] - seconds[0])


def remaining_work(runs: Sequence[tuple[Run, Path]], materials: Materials, work: Work) -> int:
    """Tokens of a forward pass that are still to be computed."""
    names = [task.name for task in materials.tasks]
    total = 0
    for _, folder in runs:
        for index in range(len(results_of(folder, len(names))), len(names)):
            trained = (folder / f"model-{index}").is_dir()
            total += 0 if trained else work.train[names[index]]
            total += work.measuring(names[: index + 1], selection=index == len(names) - 1)
    return total


def parse_rates(given: Sequence[str], device: str) -> dict[str, tuple[float, ...]]:
    """Learning rates by method: the device's defaults, replaced by `METHOD=RATE,RATE…`; only what is named, if any is.

    Raises ValueError for an unknown method or a rate that is no positive number.
    """
    rates: dict[str, tuple[float, ...]] = {}
    for entry in given:
        method, _, values = entry.partition("=")
        try:
            rates[method] = tuple(float(value) for value in values.split(","))
        except ValueError:
            rates[method] = ()
        if method not in METHODS or not rates[method] or min(rates[method]) <= 0:
            raise ValueError(f"--rates {entry}: give METHOD=RATE,RATE with a method of {', '.join(METHODS)}")
    return rates or RATES[device]


def plan(rates: Mapping[str, Sequence[float]], seeds: int) -> list[Run]:
    """All runs: the first rate of each method, then the second, so that a comparison is there early."""
    columns = zip_longest(*([(method, rate) for rate in values] for method, values in rates.items()))
    return [
        Run(entry[0], entry[1], seed) for seed, column in product(range(seeds), columns) for entry in column if entry
    ]


def compare(
    settings: Settings,
    rates: Mapping[str, Sequence[float]],
    seeds: int,
    storage: Path,
    results: Path,
    *,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Run what is missing below `storage`, and write the results of all runs to the folder `results`.

    Returns the content of `compare_DEVICE.json`, or nothing for a dry run. Raises RuntimeError if another process
    works on the same storage, and as `gather` does.
    """
    with exclusive(storage):
        materials = gather(settings, storage, report=lambda line: print(line, file=sys.stderr, flush=True))
        described = describe_settings(settings, materials)
        runs = [(run, run.folder(storage, described)) for run in plan(rates, seeds)]
        work = count_work(materials)
        speed = measure_speed(settings, materials)
        remaining = remaining_work(runs, materials, work)
        if dry_run:
            print_plan(runs, materials, remaining / speed)
            return {}
        clock = Clock(remaining, speed)
        clock.say(f"{len(runs)} runs of {len(materials.tasks)} rounds; measure the base model")
        base = measure_base(storage, settings, materials)
        for run, folder in runs:
            play(run, folder, settings, materials, work, clock)
    result = {
        "date": date.today().isoformat(),
        "machine": describe_machine(settings.device) | {"threads": torch.get_num_threads()},
        "settings": described,
        "tasks": [task.name for task in materials.tasks],
        "most_frequent_answer": {task.name: most_frequent_share(task.report) for task in materials.tasks},
        "base": base,
        "runs": [asdict(run) | {"rounds": results_of(folder, len(materials.tasks))} for run, folder in runs],
    }
    write_report(result, results)
    return result


def most_frequent_share(records: Sequence[Record]) -> float:
    """The accuracy of always giving the answer that most of the records have."""
    answers = [record.messages[-1]["content"] for record in records]
    return max(map(answers.count, answers)) / len(answers)


def print_plan(runs: Sequence[tuple[Run, Path]], materials: Materials, seconds: float) -> None:
    """What would be run, and how long it should take."""
    print(f"{len(runs)} runs of {len(materials.tasks)} rounds: {', '.join(task.name for task in materials.tasks)}")
    for run, folder in runs:
        print(f"  {run}: {len(results_of(folder, len(materials.tasks)))} of {len(materials.tasks)} rounds are there")
    print(f"expected: {duration(seconds)}, at the speed just measured; loading and splitting come on top")


DEFAULTS = Settings()


def main(
    model: Annotated[str, typer.Option(help="Base model: folder, Hugging Face id or example: URI.")] = DEFAULTS.model,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task, .jsonl of chats with choices or example: URI; repeat it, in the order of learning."),
    ] = None,
    anchor: Annotated[str, typer.Option(help="Records that no method learns: .jsonl or example: URI.")] = (
        DEFAULTS.anchor
    ),
    rates: Annotated[
        list[str] | None,
        typer.Option(help="METHOD=RATE,RATE; repeatable. Methods that are not named are left out."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Sample orders, 0 to this; 0: one on a CPU, three on a GPU.", min=0)] = 0,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="What computes.")] = DEFAULTS.device,
    train_samples: Annotated[int, typer.Option(help="Of each task.", min=1)] = DEFAULTS.train_samples,
    selection_samples: Annotated[
        int, typer.Option(help="Held-out records of each task that choose the learning rate.", min=1)
    ] = DEFAULTS.selection_samples,
    report_samples: Annotated[
        int, typer.Option(help="Other held-out records of each task, on which the results are measured.", min=1)
    ] = DEFAULTS.report_samples,
    anchor_samples: Annotated[int, typer.Option(help="Records of the anchor.", min=1)] = DEFAULTS.anchor_samples,
    batch_size: Annotated[int, typer.Option(help="Samples of an optimizer step.", min=1)] = DEFAULTS.batch_size,
    unfreeze_rank_ratio: Annotated[
        float, typer.Option(help="Share of the directions that OSFT trains.")
    ] = DEFAULTS.unfreeze_rank_ratio,
    lora_rank: Annotated[int, typer.Option(help="Of LoRA; alpha is twice the rank.", min=1)] = DEFAULTS.lora_rank,
    checkpoint_dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="In which the model is kept between tasks.")
    ] = DEFAULTS.checkpoint_dtype,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: one a core.", min=0)] = 0,
    storage: Annotated[Path, typer.Option(help="Folder for what the runs need and leave.")] = Path("runs/compare"),
    results: Annotated[Path, typer.Option(help="Folder for compare_DEVICE.json, .md and .svg.")] = RESULTS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run and how long it should take.")] = (
        False
    ),
) -> None:
    """Let OSFT, full fine-tuning and LoRA learn the same tasks one after the other, and report who forgets what.

    A killed comparison goes on where it was when it is started again.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    settings = Settings(
        model=model,
        tasks=tuple(task or DEFAULTS.tasks),
        anchor=anchor,
        train_samples=train_samples,
        selection_samples=selection_samples,
        report_samples=report_samples,
        anchor_samples=anchor_samples,
        batch_size=batch_size,
        unfreeze_rank_ratio=unfreeze_rank_ratio,
        lora_rank=lora_rank,
        lora_alpha=2 * lora_rank,
        checkpoint_dtype=checkpoint_dtype,
        device=device,
    )
    with failures():
        compare(settings, parse_rates(rates or [], device), seeds or SEEDS[device], storage, results, dry_run=dry_run)


if __name__ == "__main__":
    typer.run(main)
