"""Data at the size that people have: seconds and memory of preparing, finding what is new, planning and evaluating.

    python -m benchmarks.data                               # 10,000 and 100,000 chats of about 300 tokens
    python -m benchmarks.data --sizes 10000,100000,1000000  # about an hour of one core, 10 GB of disk

prepare     `osft.data.prepare`: chats as JSON lines -> a dataset of tokens and loss masks
resolve     `osft.rounds.new_records`: which of them are not among ten million known records
plan        `osft.data.packing`: their micro-batches of one epoch, for eight processes
evaluate    `osft.evaluation.scoring`: likelihoods of a hundredth of them in a model of two narrow blocks

Each is a fresh process. CPU seconds are those of all of its processes. Memory is what it holds beside mapped files,
which the kernel can drop, at its peak, with the imports and with what its own processes hold. The chats are words of
Python's source, the tokenizer is trained on it.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.machine import describe_machine
from benchmarks.texts import python_source, write_tokenizer
from osft.data.packing import plan_micro_batches
from osft.data.prepare import prepare
from osft.data.record_hashes import HASH, read_hashes, union, write_hashes
from osft.data.records import read_records
from osft.evaluation.scoring import score_records
from osft.rounds.new_records import find_new_records
from osft.rounds.sources import open_source
from osft.storage.atomic import write_json

RESULTS = Path(__file__).parent / "results"
KNOWN = 10_000_000
TOKENS = 300
VOCABULARY = 16_000
MAX_TOKENS, PROCESSES = 8192, 8
EVALUATED_SHARE = 100
SPREAD = 0.8
"""Standard deviation of the logarithm of a chat's length."""


def write_chats(path: Path, count: int) -> None:
    """Questions and answers of words, with a long tail of lengths; no two are equal."""
    words = re.findall(r"[A-Za-z]+", "".join(python_source()[:40]))
    numbers = random.Random(0)
    with path.open("w", encoding="utf-8") as lines:
        for number in range(count):
            length = round(TOKENS * numbers.lognormvariate(-(SPREAD**2) / 2, SPREAD) / 2.4)
            question, answer = (" ".join(numbers.choices(words, k=max(1, length))) for _ in range(2))
            messages = [{"role": "user", "content": f"{number} {question}"}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": messages}) + "\n")


def measure(step: str, folder: Path, count: int) -> dict[str, Any]:
    """Seconds and peak bytes of a step, and what it found. Runs in a process of its own."""
    chats = str(folder / f"{count}.jsonl")
    work = {"prepare": _prepare, "resolve": _resolve, "plan": _plan, "evaluate": _evaluate}[step]
    with _PeakMemory() as memory:
        started, cpu = time.perf_counter(), _cpu_seconds()
        found = work(chats, folder, count)
        return {"seconds": time.perf_counter() - started, "cpu_seconds": _cpu_seconds() - cpu, **found} | {
            "peak_bytes": memory.peak()
        }


def _cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _prepare(chats: str, folder: Path, count: int) -> dict[str, Any]:
    prepared = prepare(chats, folder / "model", folder / "data", report=print, max_seq_len=MAX_TOKENS)
    return {"tokens": prepared.statistics["num_tokens"]}


def _resolve(chats: str, folder: Path, count: int) -> dict[str, Any]:
    known = union(read_hashes(file) for file in sorted(folder.glob("known-*.bin")))
    new = find_new_records(open_source(chats), known, str(folder / "records"))
    return {"known": len(known), "new": new.data.num_new}


def _plan(chats: str, folder: Path, count: int) -> dict[str, Any]:
    lengths = np.random.default_rng(0).lognormal(np.log(TOKENS) - SPREAD**2 / 2, SPREAD, count)
    sizes = np.clip(lengths, 8, MAX_TOKENS).astype(int).tolist()
    plan = plan_micro_batches(sizes, MAX_TOKENS, PROCESSES)
    filled = np.array([[sum(sizes[at] for at in bin) for bin in steps] for steps in plan])
    return {
        "lost": 1 - filled.sum() / (filled.size * MAX_TOKENS),
        "imbalance": filled.sum(axis=1).max() / filled.sum(axis=1).mean() - 1,
    }


def _evaluate(chats: str, folder: Path, count: int) -> dict[str, Any]:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_TOKENS,
        )
    )
    records = list(islice(read_records(chats), count // EVALUATED_SHARE))
    scores = score_records(model.eval(), tokenizer, records, max_tokens=512, description="evaluate")
    return {"samples": len(records), "loss_tokens": sum(scores.num_loss_tokens)}


class _PeakMemory:
    """Anonymous bytes of this process and its children, looked at ten times a second."""

    def __init__(self) -> None:
        self._peak, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def peak(self) -> int:
        return max(self._peak, _anonymous_bytes())

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self._peak = max(self._peak, _anonymous_bytes())


def _anonymous_bytes() -> int:
    """Shared pages are counted by their shares."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    found = 0
    for process in (str(os.getpid()), *children):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        found += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon"))
    return found


def report(result: dict[str, Any], folder: Path) -> None:
    """Write data_cpu.json and data_cpu.md, and print the table."""
    rows = [
        f"| {row['step']} | {row['samples']:,} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | "
        f"{1e6 * row['cpu_seconds'] / row['samples']:.0f} | {row['peak_bytes'] / 2**20:,.0f} |"
        for row in result["measured"]
    ]
    head = "| | samples | seconds | CPU seconds | microseconds of CPU a sample | MiB |"
    table = [head, "|---" * 6 + "|", *rows]
    machine = result["machine"]
    plans = [row for row in result["measured"] if row["step"] == "plan"]
    lines = [
        "# Data",
        "",
        f"`python -m benchmarks.data`, {result['date']}: {machine['processor']}, {machine['cores']} cores, load "
        f"{result['load']:.1f} at the beginning; chats of about {TOKENS} tokens, {KNOWN:,} known records.",
        "",
        *table,
        "",
        *(
            f"The plan of {row['samples']:,} samples for {PROCESSES} processes leaves {row['lost']:.2%} of "
            f"{MAX_TOKENS:,} tokens a micro-batch empty; the busiest process has {row['imbalance']:.2%} more than the "
            "mean."
            for row in plans
        ),
    ]
    write_json(folder / "data_cpu.json", result)
    (folder / "data_cpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(table))


def main(
    sizes: Annotated[str, typer.Option(help="Numbers of chats.")] = "10000,100000",
    results: Annotated[Path, typer.Option(help="Folder for data_cpu.json and data_cpu.md.")] = RESULTS,
    step: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure what is done with data at several sizes, and write the table to --results."""
    if step and folder:
        write_json(folder / "measured.json", measure(step, folder, int(sizes)))
        return
    about = {"date": date.today().isoformat(), "machine": describe_machine("cpu"), "load": os.getloadavg()[0]}
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(temporary)
        write_tokenizer(where / "model", VOCABULARY)
        generator = np.random.default_rng(0)
        for part in range(10):
            write_hashes(where / f"known-{part}.bin", np.frombuffer(generator.bytes(KNOWN // 10 * 16), HASH))
        for count in map(int, sizes.split(",")):
            write_chats(where / f"{count}.jsonl", count)
            for name in ("prepare", "resolve", "plan", "evaluate"):
                print(f"{name} {count:,}", file=sys.stderr, flush=True)
                command = [sys.executable, "-m", "benchmarks.data", "--step", name, "--folder", temporary]
                subprocess.run([*command, "--sizes", str(count)], check=True, stdout=sys.stderr)
                found = json.loads((where / "measured.json").read_text())
                measured.append({"step": name, "samples": count, **found})
            report({**about, "measured": measured}, results)


if __name__ == "__main__":
    typer.run(main)
