"""One training step of OSFT, against full fine-tuning, LoRA, PEFT's OSF and mini-trainer's OSFT.

    make bench                                                # CPU, a quarter of an hour on two cores
    python -m benchmarks.step --device cuda --profile 8b      # blocks of an 8B Llama; 1b: of a 1B one

The same loop (`osft.training.loop.train_step`, AdamW) steps every method on the same random Llama and tokens, as
several short samples and as one long one. Seconds: all methods live in one process and take turns, so that a
disturbance hits them alike. Memory: a fresh process for each method. Leak: the largest share of the update that lies
in the frozen directions, after training a smaller model in float32, against an independent float64 SVD. Preparation:
what comes once before the first step. Tokens a second: `benchmarks.throughput`. What is more than a tenth worse than
the committed results is shown in red.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.contestants import (
    MAX_TOKENS,
    METHODS,
    RATIO,
    Settings,
    build,
    prepare,
    random_batches,
    seconds_of,
    stepper,
    synchronize,
    train_config,
)
from benchmarks.machine import (
    allocated_memory,
    describe_machine,
    peak_memory,
    reset_peak_memory,
    resident,
    return_freed_memory,
)
from benchmarks.peers import mini_trainer, mini_trainer_merged
from benchmarks.step_report import RESULTS, evaluate, report
from benchmarks.throughput import measure_throughput
from osft.subspace import select_targets

LEAK_STEPS, LEAK_TOKENS, LEAK_LEARNING_RATE = 50, 64, 1e-3
LENGTHS = (512, MAX_TOKENS)
"""Tokens of a sample; a step has as many samples as MAX_TOKENS holds of them, at most `micro_batches`."""
PROFILES = {
    "cpu": Settings(),
    "1b": Settings(
        hidden_size=2048, intermediate_size=8192, num_layers=4, num_heads=32, num_key_value_heads=8, vocab_size=32768
    ),
    "8b": Settings(
        hidden_size=4096, intermediate_size=14336, num_layers=2, num_heads=32, num_key_value_heads=8, vocab_size=32768
    ),
}


# ---- seconds ----


def build_all(
    folder: Path, settings: Settings, preparation: dict[str, float], progress: Callable[[str], None]
) -> dict[str, Any]:
    """Every method's model.

    What it takes to build the peers' models, which is their SVD for the most part, is noted in `preparation`.
    """
    models = {}
    for method in METHODS:
        progress(f"build {METHODS[method]}")
        began = time.perf_counter()
        models[method] = build(method, folder, settings)
        if method in ("peft_osf", "mini_trainer"):
            preparation[method] = time.perf_counter() - began
    return models


def measure_seconds(
    steps: dict[str, Callable[[Any], None]], shape: Settings, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """The seconds of every repetition, by method. The first repetition warms up and does not count."""
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for repetition in range(shape.repetitions + 1):
        batches = random_batches(shape, count=shape.micro_batches, tokens=shape.tokens, seed=shape.seed + repetition)
        for method, step in steps.items():
            progress(f"{shape.tokens} tokens: step {repetition}/{shape.repetitions} {METHODS[method]}")
            taken = seconds_of(partial(step, batches), shape.device)
            if repetition:
                seconds[method].append(taken)
    return seconds


# ---- memory ----


def measure_memory(method: str, folder: Path, shapes: Sequence[Settings]) -> list[dict[str, int]]:
    """Peak bytes of a training step above what the process held before the model was built, for each shape.

    Runs in a process of its own. The initialization's peak does not count: the peak counter starts after it.
    """
    import peft  # noqa: F401  what is imported belongs to the state before
    from transformers import LlamaForCausalLM  # noqa: F401

    settings = shapes[0]
    torch.randn(512, 512) @ torch.randn(512, 512)  # starts the thread pool
    cuda = settings.device == "cuda"
    if cuda:
        torch.cuda.init()
    return_freed_memory()
    before = allocated_memory(settings.device)
    files_before = 0 if cuda else resident()["RssFile"]
    model = build(method, folder, settings)
    step = stepper(model, train_config(folder, method, settings))
    step(random_batches(settings, count=1, tokens=64, seed=settings.seed))  # puts the optimizer's moments in place
    measured = []
    for shape in shapes:
        return_freed_memory()
        reset_peak_memory(settings.device)
        at_rest = allocated_memory(settings.device)
        # In the second micro-batch gradients are in place; others change nothing.
        count = min(2, shape.micro_batches)
        step(random_batches(shape, count=count, tokens=shape.tokens, seed=settings.seed + 1))
        synchronize(settings.device)
        peak = peak_memory(settings.device)
        files = 0 if cuda else resident()["RssFile"] - files_before
        measured.append({"peak_bytes": peak - before, "at_rest_bytes": at_rest - before, "mapped_file_bytes": files})
    return measured


def spawn_memory(method: str, folder: Path, shapes: Sequence[Settings]) -> list[dict[str, int]]:
    """`measure_memory` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.step", "--measure-memory", method, "--prepared", str(folder)]
    command += ["--settings", json.dumps([asdict(shape) for shape in shapes])]
    # glibc keeps what is freed, a few hundred MiB here, unless every block is a mapping of its own.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[1], env=environment)
    measured: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return measured


# ---- leak ----


def measure_leak(settings: Settings, progress: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Median over the weights of |U_high^T D| / |D| and |D V_high| / |D|, after training a smaller model.

    What a split by inputs freezes is another subspace: for that method, both are of the weights' directions too.
    """
    small = Settings(
        device=settings.device,
        hidden_size=256,
        intermediate_size=704,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
        tokens=LEAK_TOKENS,
        seed=settings.seed,
        dtype="float32",  # rounded to bfloat16, the update of any method leaks
    )
    leaks = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, small)
        original = build("full", folder, small)
        targets = [target.name for target in select_targets(original)]
        frozen = {name: _frozen_directions(original.get_submodule(name).weight.detach()) for name in targets}
        for method in METHODS:
            progress(f"leak of {METHODS[method]}")
            model = build(method, folder, small)
            step = stepper(model, train_config(folder, method, small, LEAK_LEARNING_RATE))
            for number in range(LEAK_STEPS):
                step(random_batches(small, count=1, tokens=LEAK_TOKENS, seed=small.seed + 1 + number))
            if method in ("peft_osf", "lora"):
                model = model.merge_and_unload()
            weight_of = mini_trainer_merged(model) if method == "mini_trainer" else _weights_of(model)
            left, right = [], []
            for name in targets:
                u_high, v_high = frozen[name]
                tuned, base = weight_of(name), original.get_submodule(name).weight.detach()
                update = tuned.double() - base.double()
                left.append(((u_high.T @ update).norm() / update.norm()).item())
                right.append(((update @ v_high).norm() / update.norm()).item())
            leaks[method] = {"left": median(left), "right": median(right)}
    return leaks


def _weights_of(model: Any) -> Callable[[str], torch.Tensor]:
    return lambda name: model.get_submodule(name).weight.detach()


def _frozen_directions(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U_high and V_high of an independent SVD, float64."""
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    k = min(weight.shape) - round(RATIO * min(weight.shape))
    return u[:, :k], vh[:k].T


def main(
    device: Annotated[str, typer.Option(help="cpu (float32) or cuda (bfloat16).")] = "cpu",
    profile: Annotated[str, typer.Option(help=f"Shape of the model: {', '.join(PROFILES)}.")] = "cpu",
    repetitions: Annotated[
        int, typer.Option(min=1, help="Timed rounds of short samples, after one that warms up; of long ones, half.")
    ] = 4,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: one a core.")] = 0,
    seed: Annotated[int, typer.Option(help="Of weights and tokens.")] = 0,
    results: Annotated[Path, typer.Option(help="Folder of the tables and their figures.")] = RESULTS,
    measure_memory_of: Annotated[str | None, typer.Option("--measure-memory", hidden=True)] = None,
    prepared: Annotated[Path | None, typer.Option(hidden=True)] = None,
    given: Annotated[str, typer.Option("--settings", hidden=True)] = "",
) -> None:
    """Compare one training step of OSFT with full fine-tuning, LoRA, PEFT's OSF and mini-trainer's OSFT.

    Prints tables of seconds, ratios, peak memory, trainable parameters and leak, and writes them to --results.
    """
    if measure_memory_of and prepared:
        of_shapes = [Settings(**shape) for shape in json.loads(given)]
        torch.set_num_threads(of_shapes[0].threads)
        print(json.dumps(measure_memory(measure_memory_of, prepared, of_shapes)))
        return
    if profile not in PROFILES:
        raise typer.BadParameter(f"there is no profile {profile!r}, but {', '.join(PROFILES)}")
    mini_trainer()
    settings = replace(
        PROFILES[profile],
        device=device,
        repetitions=repetitions,
        threads=threads or len(os.sched_getaffinity(0)),
        seed=seed,
    )
    torch.set_num_threads(settings.threads)
    started = time.perf_counter()

    def progress(what: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {what}", file=sys.stderr, flush=True)

    shapes = [
        replace(
            settings,
            tokens=tokens,
            micro_batches=min(settings.micro_batches, MAX_TOKENS // tokens),
            repetitions=repetitions if tokens < MAX_TOKENS else max(1, repetitions // 2),
        )
        for tokens in LENGTHS
    ]
    measured: dict[str, dict[str, dict[str, Any]]] = {str(tokens): {} for tokens in LENGTHS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        progress("random model and its factors")
        preparation = prepare(folder, settings)
        for method in METHODS:
            progress(f"memory of {METHODS[method]}")
            for tokens, memory in zip(measured, spawn_memory(method, folder, shapes), strict=True):
                measured[tokens][method] = dict(memory)
        models = build_all(folder, settings, preparation, progress)
        steps = {method: stepper(model, train_config(folder, "ours", settings)) for method, model in models.items()}
        for tokens, shape in zip(measured, shapes, strict=True):
            for method, seconds in measure_seconds(steps, shape, progress).items():
                measured[tokens][method] |= {
                    "trainable_parameters": sum(p.numel() for p in models[method].parameters() if p.requires_grad),
                    "seconds": seconds,
                    "median_seconds": median(seconds),
                    "step_tokens": shape.tokens * shape.micro_batches,
                }
        del models, steps
        throughput = measure_throughput(folder, settings, progress)
    leaks = measure_leak(settings, progress)
    result = {
        "date": date.today().isoformat(),
        "machine": describe_machine(settings.device) | {"mini_trainer": version("rhai-innovation-mini-trainer")},
        "profile": profile,
        "settings": {**asdict(settings), "unfreeze_rank_ratio": RATIO, "leak_steps": LEAK_STEPS},
        "preparation_seconds": preparation,
        "leaks": leaks,
        "shapes": measured,
        "throughput": throughput,
        "targets": evaluate(measured, throughput),
        "total_seconds": time.perf_counter() - started,
    }
    report(result, results)


if __name__ == "__main__":
    typer.run(main)
