"""Tokens a second of preparing, training on and evaluating the same records, with the model of `benchmarks.step`.

A token counts as often as a sample holds it, and a sample is a question with one of its answers, or a text. Training
reads the right answers, a step all of them; evaluation reads every answer, and computes a question once.
"""

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.contestants import Settings, build, seconds_of, stepper, train_config
from benchmarks.texts import python_source, write_tokenizer
from osft.data.packing import FAST_TOKENS, Batching, Feeding
from osft.data.prepare import prepare
from osft.data.records import parse_record
from osft.data.samples import SampleList
from osft.evaluation.scoring import Asked, score_records

RECORDS, WORDS, PREPARED, ROUNDS = 32, 24, 4000, 3
"""Records that are trained on and evaluated, words of a question, records that are prepared, timed rounds."""
KINDS = {"plain text": 0, "questions with 2 choices": 2, "questions with 4 choices": 4}


def measure_throughput(
    folder: Path, settings: Settings, progress: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Kind of records -> tokens a second of "prepare" (of chats), "train" and "evaluate".

    Training is protect="activations", evaluation that of the model alone. They take turns; medians.
    """
    from transformers import AutoTokenizer

    progress("tokens per second")
    write_tokenizer(folder / "model", settings.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    served = build("full", folder, settings).requires_grad_(False).eval()
    trained = build("ours_activations", folder, settings)
    step = stepper(trained, train_config(folder, "ours_activations", settings))
    device = torch.device(settings.device)
    shared = Batching.BRANCHED if settings.device == "cpu" else Batching.PACKED
    feeding = Feeding(max_tokens=FAST_TOKENS[settings.device], device=device, batching=shared)
    found = {}
    for kind, choices in KINDS.items():
        lines = _lines(PREPARED if choices else RECORDS, choices)
        records = [parse_record(line, kind, allow_text=True) for line in lines[:RECORDS]]
        right, all_answers = (Asked.of(records, tokenizer, choices=each).samples for each in (False, True))
        batches = [batch for _, batch in feeding.batches(SampleList(right))]
        seconds: dict[str, list[float]] = {"train": [], "evaluate": []}

        works: dict[str, Callable[[], Any]] = {
            "train": partial(step, batches),
            "evaluate": partial(
                score_records, served, tokenizer, records, max_tokens=feeding.max_tokens, batching=shared
            ),
        }
        for repetition in range(ROUNDS + 1):  # the first one warms up
            progress(f"tokens per second, {kind}: {repetition}/{ROUNDS}")
            for what, work in works.items():
                taken = seconds_of(work, settings.device)
                if repetition:
                    seconds[what].append(taken)
        found[kind] = {
            what: _num_tokens(samples) / median(seconds[what])
            for what, samples in (("train", right), ("evaluate", all_answers))
        }
        if choices:
            found[kind]["prepare"] = _prepared(folder, kind, lines)
    return found


def _prepared(folder: Path, kind: str, lines: Sequence[str]) -> float:
    """Tokens a second of preparing the records."""
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    started = time.perf_counter()
    made = prepare(str(file), folder / "model", folder / "data", report=lambda line: None)
    tokens: int = made.statistics["num_tokens"]
    return tokens / (time.perf_counter() - started)


def _num_tokens(samples: Sequence[Any]) -> int:
    return sum(len(sample.input_ids) for sample in samples)


def _lines(count: int, choices: int) -> list[str]:
    """Records of words of Python's source as JSON lines, no two alike."""
    words = re.findall(r"[A-Za-z]+", "".join(python_source()[:40]))
    numbers = random.Random(choices)
    lines = []
    for number in range(count):
        text = f"{number} " + " ".join(numbers.choices(words, k=WORDS))
        options = [f"{letter}: {numbers.choice(words)}" for letter in "ABCD"[:choices]]
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": (options or [""])[0]}]
        lines.append(json.dumps({"messages": messages, "choices": options} if choices else {"text": text}))
    return lines
