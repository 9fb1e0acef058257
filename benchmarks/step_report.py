"""What `benchmarks.step` measured, as tables: ratios, targets, and what got worse since the committed results."""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contestants import CALIBRATION_SAMPLES, CALIBRATION_TOKENS, METHODS, RATIO
from osft.storage.atomic import write_json

RESULTS = Path(__file__).parent / "results"
OURS = ("ours", "ours_core", "ours_activations")
REFERENCES = ("full", "full_targets", "peft_osf", "mini_trainer")
WORSE = 1.1
"""Times a committed figure, above which one is shown in red."""
COLUMNS = (
    "method", "trainable", "s/step (min-max)", "tokens/s", "x full", "x full, same weights", "x PEFT OSF",
    "x mini-trainer", "peak MiB", "x full", "leak U_high", "leak V_high",
)  # fmt: skip


THROUGHPUT = ("records", "prepared", "trained on", "evaluated", "evaluated x trained on")


def evaluate(
    shapes: dict[str, dict[str, dict[str, Any]]], throughput: dict[str, dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """Fill in the ratios of every method, and compare ours with its targets, for each length and kind of records."""
    targets = {}
    for tokens, methods in shapes.items():
        for method, measured in methods.items():
            for reference in REFERENCES:
                measured[f"seconds_to_{reference}"] = _ratios(methods, method, reference)
            measured["memory_to_full"] = measured["peak_bytes"] / methods["full"]["peak_bytes"]
        limits = {"full": 0.85, "peft_osf": 0.60, "mini_trainer": 0.45}
        for method in ("ours", "ours_activations"):
            for reference, limit in limits.items():
                value = methods[method][f"seconds_to_{reference}"]["of_medians"]
                targets[f"{tokens} tokens, {METHODS[method]}: seconds of {METHODS[reference]}"] = (value, limit)
            targets[f"{tokens} tokens, {METHODS[method]}: memory of full fine-tuning"] = (
                methods[method]["memory_to_full"],
                0.60,
            )
    found: dict[str, dict[str, Any]] = {
        name: {"value": value, "limit": limit, "met": value <= limit} for name, (value, limit) in targets.items()
    }
    for kind, of_kind in throughput.items():
        ratio = _ratio(of_kind)
        found[f"{kind}: tokens a second of evaluation to training's"] = {
            "value": ratio, "at_least": 3.0, "met": ratio >= 3.0,
        }  # fmt: skip
    return found


def _ratios(methods: dict[str, dict[str, Any]], method: str, reference: str) -> dict[str, float]:
    """Seconds relative to the reference: of the medians, and the extremes over the rounds."""
    own, other = methods[method]["seconds"], methods[reference]["seconds"]
    rounds = [a / b for a, b in zip(own, other, strict=True)]
    return {"of_medians": median(own) / median(other), "min": min(rounds), "max": max(rounds)}


def worse(result: dict[str, Any], before: dict[str, Any]) -> set[tuple[str, str, str]]:
    """(length or kind of records, method, figure) of ours that is more than a tenth worse than the committed one.

    Ratios and the memory, which do not depend on the machine's speed; its seconds are not compared.
    """
    found = set()
    for tokens, methods in result["shapes"].items():
        for method in OURS:
            earlier = before.get("shapes", {}).get(tokens, {}).get(method)
            if earlier is None:
                continue
            figures = {
                name: measured["of_medians"] for name, measured in earlier.items() if name.startswith("seconds_to_")
            }
            for name, figure in {**figures, "peak_bytes": earlier["peak_bytes"]}.items():
                now = methods[method][name]
                if (now["of_medians"] if isinstance(now, dict) else now) > WORSE * figure:
                    found.add((tokens, method, name))
    for kind, of_kind in result["throughput"].items():
        earlier = before.get("throughput", {}).get(kind)
        if earlier is not None and WORSE * _ratio(of_kind) < _ratio(earlier):
            found.add((kind, "evaluation", "ratio to training"))
    return found


def _ratio(throughput: dict[str, float]) -> float:
    """Tokens a second of evaluation to those of training."""
    return throughput["evaluate"] / throughput["train"]


def table_rows(result: dict[str, Any], tokens: str) -> list[list[str]]:
    """The table's cells for one length, a row a method."""
    rows = []
    for method, measured in result["shapes"][tokens].items():
        ratios = [measured[f"seconds_to_{reference}"] for reference in REFERENCES]
        leak = result["leaks"][method]
        rows.append(
            [
                METHODS[method],
                f"{measured['trainable_parameters'] / 1e6:.1f}M",
                f"{measured['median_seconds']:.2f} ({min(measured['seconds']):.2f}-{max(measured['seconds']):.2f})",
                f"{measured['step_tokens'] / measured['median_seconds']:.0f}",
                *(f"{r['of_medians']:.2f} ({r['min']:.2f}-{r['max']:.2f})" for r in ratios),
                f"{measured['peak_bytes'] / 2**20:.0f}",
                f"{measured['memory_to_full']:.2f}",
                f"{leak['left']:.1e}",
                f"{leak['right']:.1e}",
            ]
        )
    return rows


def per_layer(result: dict[str, Any]) -> dict[str, float]:
    """The seconds of the preparation divided by the layers, by what they are for."""
    names = {"statistics": f"statistics on {CALIBRATION_SAMPLES * CALIBRATION_TOKENS:,} tokens"} | {
        method: f"factors of {name}" for method, name in METHODS.items()
    }
    layers = result["settings"]["num_layers"]
    return {names[what]: value / layers for what, value in result["preparation_seconds"].items()}


def report(result: dict[str, Any], folder: Path) -> None:
    """Print the tables, and write them as JSON and as Markdown; what got worse is red, and named in both."""
    from rich.console import Console
    from rich.table import Table

    name = f"step_{result['settings']['device']}" + (f"_{result['profile']}" if result["profile"] != "cpu" else "")
    file = folder / f"{name}.json"
    red = worse(result, json.loads(file.read_text()) if file.is_file() else {})
    cells = {**{f"seconds_to_{reference}": 4 + i for i, reference in enumerate(REFERENCES)}, "peak_bytes": 8}
    console = Console(width=None if sys.stdout.isatty() else 200)
    lines = ["# One training step", "", "Written by `python -m benchmarks.step`.", ""]
    for tokens, methods in result["shapes"].items():
        title = f"{methods['full']['step_tokens'] // int(tokens)} x {tokens} tokens"
        rows = table_rows(result, tokens)
        lines += [f"## {title}", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
        table = Table(title=title)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "method" else "right")
        for method, row in zip(methods, rows, strict=True):
            for figure, at in cells.items():
                if (tokens, method, figure) in red:
                    row[at] = f"[red]{row[at]}[/red]"
            table.add_row(*row)
        console.print(table)
    notes = _notes(result)
    lines += ["## Tokens a second", "", "| " + " | ".join(THROUGHPUT) + " |", "|---" * len(THROUGHPUT) + "|"]
    table = Table(*THROUGHPUT, title="Tokens a second")
    for kind, of_kind in result["throughput"].items():
        cells_of_kind = [
            f"{of_kind[what]:,.0f}" if what in of_kind else "" for what in ("prepare", "train", "evaluate")
        ]
        row = [kind, *cells_of_kind, f"{_ratio(of_kind):.1f}"]
        lines.append("| " + " | ".join(row) + " |")
        if (kind, "evaluation", "ratio to training") in red:
            row[-1] = f"[red]{row[-1]}[/red]"
        table.add_row(*row)
    lines.append("")
    console.print(table)
    targets = [
        f"{target}: {found['value']:.2f} ({_limit(found)}), {'met' if found['met'] else 'NOT met'}"
        for target, found in result["targets"].items()
    ]
    for line in [*notes, *targets]:
        console.print(f"- {line}", highlight=False)
    for tokens, method, figure in sorted(red):
        what = f"{tokens} tokens, {METHODS[method]}" if method in METHODS else f"{method} of {tokens}"
        console.print(f"[red]{what}: {figure} is a tenth worse than the committed one[/red]")

    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    lines += [*(f"- {line}" for line in notes), "", "Targets:", "", *(f"- {line}" for line in targets)]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lora(result: dict[str, Any]) -> str:
    ratios = [methods["lora"]["seconds_to_mini_trainer"]["of_medians"] for methods in result["shapes"].values()]
    return " and ".join(f"{ratio:.2f}" for ratio in ratios)


def _limit(target: dict[str, Any]) -> str:
    return f"at least {target['at_least']:.2f}" if "at_least" in target else f"at most {target['limit']:.2f}"


def _notes(result: dict[str, Any]) -> list[str]:
    """How it was measured."""
    machine, settings = result["machine"], result["settings"]
    dtype = "bfloat16" if settings["device"] == "cuda" else "float32"
    preparation = "; ".join(f"{what} {seconds:.2f}" for what, seconds in per_layer(result).items())
    return [
        f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, {settings['threads']} threads; "
        f"torch {machine['torch']}, transformers {machine['transformers']}, peft {machine['peft']}, mini-trainer "
        f"{machine['mini_trainer']}; {result['date']}; {result['total_seconds'] / 60:.0f} minutes in all",
        f"random Llama: {settings['num_layers']} layers, hidden {settings['hidden_size']}, intermediate "
        f"{settings['intermediate_size']}, vocabulary {settings['vocab_size']}, stored in bfloat16; unfrozen share "
        f"{RATIO}; AdamW; mini-trainer and full fine-tuning train embeddings, norms and head too",
        f"computed in {dtype}; full fine-tuning keeps weights, gradients and moments in {dtype} too, and no second "
        "copy of the weights",
        f"seconds: median (min-max) of {settings['repetitions']} rounds in which the methods take turns, half as many "
        f"of the long sample; ratios: of the medians (min-max of the rounds)",
        "a forward pass and a backward pass to the inputs, which no method saves, are 4 of full fine-tuning's 6 "
        f"operations a token; LoRA, which adds least to them, takes {_lora(result)} of mini-trainer's time",
        "memory: peak of a step above the process before the model was built, initialization excluded; the "
        "allocator returns freed blocks at once; mapped files count",
        f"leak: median over the weights after {settings['leak_steps']} steps on 2 layers of hidden size 256 in "
        "float32; full fine-tuning shows what no constraint gives; of protect activations the weights' own directions "
        "are not what it freezes",
        "tokens a second: protect activations trains on the right answers, evaluation reads every answer, and a token "
        "counts as often as an answer holds it (`benchmarks/throughput.py`)",
        f"preparation, once before the first step, seconds per layer: {preparation}; what is protected by inputs needs "
        "both statistics and factors",
    ]
