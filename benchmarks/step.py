"""One training step of OSFT, against full fine-tuning, LoRA and PEFT's OSF: seconds, memory, and what leaks.

    python -m benchmarks.step                       # CPU, about five minutes on two cores
    python -m benchmarks.step --device cuda --hidden-size 4096 --intermediate-size 14336 --num-layers 2 --tokens 8192
    python -m benchmarks.step --vocab-size 32000    # full fine-tuning then mostly trains embeddings

The same loop (`osft.training.loop.train_step`, AdamW) steps every method on the same random Llama and tokens.
Seconds: all methods live in one process and take turns, so that a disturbance hits them alike. Memory: one fresh
process each. Leak: the largest share of the update that lies in the frozen directions, after training a smaller
model in float32, against an independent float64 SVD. Preparation: what comes once before the first step.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.contestants import (
    CALIBRATION_SAMPLES,
    METHODS,
    RATIO,
    Settings,
    build,
    prepare,
    random_batches,
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
from osft.storage.atomic import write_json
from osft.subspace import select_targets

LEAK_STEPS, LEAK_TOKENS, LEAK_LEARNING_RATE = 50, 64, 1e-3
RESULTS = Path(__file__).parent / "results"


# ---- seconds ----


def measure_seconds(folder: Path, settings: Settings, progress: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Every repetition's seconds and the number of trainable parameters, by method."""
    models = {}
    for method in METHODS:
        progress(f"build {METHODS[method]}")
        models[method] = build(method, folder, settings)
    config = train_config(folder, "ours", settings)
    steps = {method: stepper(model, config) for method, model in models.items()}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for repetition in range(settings.repetitions + 1):  # the first one warms up
        batches = random_batches(
            settings, count=settings.micro_batches, tokens=settings.tokens, seed=settings.seed + repetition
        )
        for method, step in steps.items():
            progress(f"step {repetition}/{settings.repetitions} {METHODS[method]}")
            synchronize(settings.device)
            started = time.perf_counter()
            step(batches)
            synchronize(settings.device)
            if repetition:
                seconds[method].append(time.perf_counter() - started)
    return {
        method: {
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds": seconds[method],
            "median_seconds": median(seconds[method]),
        }
        for method, model in models.items()
    }


# ---- memory ----


def measure_memory(method: str, folder: Path, settings: Settings) -> dict[str, int]:
    """Peak bytes of a training step above what the process held before the model was built.

    Runs in a process of its own. The initialization's peak does not count: the peak counter starts after it.
    """
    import peft  # noqa: F401  what is imported belongs to the state before
    from transformers import LlamaForCausalLM  # noqa: F401

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
    return_freed_memory()
    reset_peak_memory(settings.device)
    at_rest = allocated_memory(settings.device)
    step(random_batches(settings, count=settings.micro_batches, tokens=settings.tokens, seed=settings.seed + 1))
    synchronize(settings.device)
    peak = peak_memory(settings.device)
    files = 0 if cuda else resident()["RssFile"] - files_before
    return {"peak_bytes": peak - before, "at_rest_bytes": at_rest - before, "mapped_file_bytes": files}


def spawn_memory(method: str, folder: Path) -> dict[str, int]:
    """`measure_memory` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.step", "--measure-memory", method, "--prepared", str(folder)]
    # glibc keeps what is freed, a few hundred MiB here, unless every block is a mapping of its own.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[1], env=environment)
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
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
            left, right = [], []
            for name in targets:
                u_high, v_high = frozen[name]
                tuned, base = model.get_submodule(name).weight.detach(), original.get_submodule(name).weight.detach()
                update = tuned.double() - base.double()
                left.append(((u_high.T @ update).norm() / update.norm()).item())
                right.append(((update @ v_high).norm() / update.norm()).item())
            leaks[method] = {"left": median(left), "right": median(right)}
    return leaks


def _frozen_directions(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U_high and V_high of an independent SVD, float64."""
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    k = min(weight.shape) - round(RATIO * min(weight.shape))
    return u[:, :k], vh[:k].T


# ---- the report ----


def _ratios(methods: dict[str, dict[str, Any]], method: str, reference: str) -> dict[str, float]:
    """Seconds relative to the reference: of the medians, and the extremes over the rounds."""
    own, other = methods[method]["seconds"], methods[reference]["seconds"]
    rounds = [a / b for a, b in zip(own, other, strict=True)]
    return {"of_medians": median(own) / median(other), "min": min(rounds), "max": max(rounds)}


def evaluate(methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Fill in the ratios of every method, and compare ours with its targets."""
    for method, measured in methods.items():
        for reference in ("full", "full_targets", "peft_osf"):
            measured[f"seconds_to_{reference}"] = _ratios(methods, method, reference)
            measured[f"memory_to_{reference}"] = measured["peak_bytes"] / methods[reference]["peak_bytes"]
    ours, by_inputs = methods["ours"], methods["ours_activations"]
    reached = {
        "seconds <= 1.0 x full fine-tuning": (ours["seconds_to_full"]["of_medians"], 1.0),
        "seconds <= 0.7 x PEFT OSF": (ours["seconds_to_peft_osf"]["of_medians"], 0.7),
        "memory <= 0.7 x full fine-tuning": (ours["memory_to_full"], 0.7),
        "activations: seconds <= 0.95 x full fine-tuning": (by_inputs["seconds_to_full"]["of_medians"], 0.95),
        "activations: memory <= 0.75 x full fine-tuning": (by_inputs["memory_to_full"], 0.75),
    }
    return {name: {"value": value, "limit": limit, "met": value <= limit} for name, (value, limit) in reached.items()}


COLUMNS = (
    "method", "trainable", "s/step (min-max)", "x full", "x full, same weights", "x PEFT OSF",
    "peak MiB", "x full", "leak U_high", "leak V_high",
)  # fmt: skip


def table_rows(methods: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table's cells, a row a method."""
    rows = []
    for method, measured in methods.items():
        ratios = [measured[f"seconds_to_{reference}"] for reference in ("full", "full_targets", "peft_osf")]
        rows.append(
            [
                METHODS[method],
                f"{measured['trainable_parameters'] / 1e6:.1f}M",
                f"{measured['median_seconds']:.2f} ({min(measured['seconds']):.2f}-{max(measured['seconds']):.2f})",
                *(f"{r['of_medians']:.2f} ({r['min']:.2f}-{r['max']:.2f})" for r in ratios),
                f"{measured['peak_bytes'] / 2**20:.0f}",
                f"{measured['memory_to_full']:.2f}",
                f"{measured['leak']['left']:.1e}",
                f"{measured['leak']['right']:.1e}",
            ]
        )
    return rows


def per_layer(result: dict[str, Any]) -> dict[str, float]:
    """The seconds of the preparation divided by the layers, by what they are for."""
    settings, seconds = result["settings"], result["preparation_seconds"]
    tokens = CALIBRATION_SAMPLES * settings["tokens"]
    names = {"statistics": f"statistics on {tokens:,} tokens"} | {
        method: f"factors of {name}" for method, name in METHODS.items()
    }
    return {names[what]: value / settings["num_layers"] for what, value in seconds.items()}


def report(result: dict[str, Any], folder: Path) -> None:
    """Print the table, and write it as JSON and as Markdown."""
    from rich.console import Console
    from rich.table import Table

    machine, settings = result["machine"], result["settings"]
    rows = table_rows(result["methods"])
    table = Table(title="One training step")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table)

    dtype = "bfloat16" if settings["device"] == "cuda" else "float32"
    preparation = "; ".join(f"{what} {seconds:.2f}" for what, seconds in per_layer(result).items())
    targets = [
        f"{name}: {target['value']:.2f}, {'met' if target['met'] else 'NOT met'}"
        for name, target in result["targets"].items()
    ]
    notes = [
        f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, {settings['threads']} threads; "
        f"torch {machine['torch']}, transformers {machine['transformers']}, peft {machine['peft']}; {result['date']}",
        f"random Llama: {settings['num_layers']} layers, hidden {settings['hidden_size']}, intermediate "
        f"{settings['intermediate_size']}, vocabulary {settings['vocab_size']}, stored in bfloat16; unfrozen share "
        f"{RATIO}; a step is {settings['micro_batches']} micro-batches of {settings['tokens']} tokens and AdamW",
        f"computed in {dtype}; full fine-tuning keeps weights, gradients and moments in {dtype} too, and no second "
        "copy of the weights",
        f"seconds: median (min-max) of {settings['repetitions']} rounds in which the methods take turns; ratios: of "
        "the medians (min-max of the rounds)",
        "memory: peak of a step above the process before the model was built, initialization excluded; the "
        "allocator returns freed blocks at once; mapped files count",
        f"leak: median over the weights after {LEAK_STEPS} steps at learning rate {LEAK_LEARNING_RATE:g}, on 2 layers "
        "of hidden size 256 in float32; full fine-tuning shows what no constraint gives",
        f"preparation, once before the first step, seconds per layer: {preparation}",
    ]
    for line in [*notes, *targets]:
        console.print(f"- {line}", highlight=False)

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"step_{settings['device']}.json", result)
    lines = [
        "# One training step",
        "",
        "Written by `python -m benchmarks.step`.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(f"- {line}" for line in notes),
        "",
        "Targets:",
        "",
        *(f"- {line}" for line in targets),
    ]
    (folder / f"step_{settings['device']}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(
    device: Annotated[str, typer.Option(help="cpu (float32) or cuda (bfloat16).")] = "cpu",
    hidden_size: Annotated[
        int, typer.Option(help="Width of the model, a multiple of 256: heads are 64 wide, four share a key.")
    ] = 1024,
    intermediate_size: Annotated[int, typer.Option(help="Width of its MLP.")] = 2816,
    num_layers: Annotated[int, typer.Option(help="Transformer blocks.")] = 4,
    vocab_size: Annotated[
        int, typer.Option(help="Vocabulary. The larger, the dearer full fine-tuning: the others freeze the head.")
    ] = 8192,
    tokens: Annotated[int, typer.Option(help="Tokens of one micro-batch.")] = 1024,
    micro_batches: Annotated[int, typer.Option(help="Micro-batches of one step.")] = 2,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed rounds, after one that warms up.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: one a core.")] = 0,
    seed: Annotated[int, typer.Option(help="Of weights and tokens.")] = 0,
    results: Annotated[Path, typer.Option(help="Folder for step_DEVICE.json and step_DEVICE.md.")] = RESULTS,
    measure_memory_of: Annotated[str | None, typer.Option("--measure-memory", hidden=True)] = None,
    prepared: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare one training step of OSFT with full fine-tuning, with LoRA and with PEFT's OSF.

    Prints a table of seconds, ratios, peak memory, trainable parameters and leak, and writes it to --results.
    """
    if measure_memory_of and prepared:
        settings = Settings(**json.loads((prepared / "prepared.json").read_text())["settings"])
        torch.set_num_threads(settings.threads)
        print(json.dumps(measure_memory(measure_memory_of, prepared, settings)))
        return
    settings = Settings(
        device=device,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 256,
        vocab_size=vocab_size,
        micro_batches=micro_batches,
        tokens=tokens,
        repetitions=repetitions,
        threads=threads or len(os.sched_getaffinity(0)),
        seed=seed,
    )
    torch.set_num_threads(settings.threads)
    started = time.perf_counter()

    def progress(what: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {what}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        progress("random model and its factors")
        preparation = prepare(folder, settings)
        memory = {}
        for method in METHODS:
            progress(f"memory of {METHODS[method]}")
            memory[method] = spawn_memory(method, folder)
        methods = measure_seconds(folder, settings, progress)
    leaks = measure_leak(settings, progress)
    for method, measured in methods.items():
        measured.update(memory[method], leak=leaks[method])
    targets = evaluate(methods)
    result = {
        "date": date.today().isoformat(),
        "machine": describe_machine(settings.device),
        "settings": {**asdict(settings), "unfreeze_rank_ratio": RATIO, "leak_steps": LEAK_STEPS},
        "preparation_seconds": preparation,
        "methods": methods,
        "targets": targets,
        "total_seconds": time.perf_counter() - started,
    }
    report(result, results)


if __name__ == "__main__":
    typer.run(main)
