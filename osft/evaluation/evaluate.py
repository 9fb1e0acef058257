"""Base and candidate on the new task and on the anchors."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from osft.data.records import DataError, Record, data_name, read_records
from osft.evaluation.gate import GateRules, decide
from osft.evaluation.scoring import generate, score_set
from osft.models import model_folder


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Records that a model is measured on."""

    name: str
    role: str
    """"new task", or "anchor": something that the model should not forget."""
    source: str
    records: tuple[Record, ...]


def load_set(uri: str, role: str, *, name: str = "", max_samples: int = 0) -> EvaluationSet:
    """Read an evaluation set: JSON lines of chats or of plain text.

    The name defaults to `data_name(uri)`. Of more than `max_samples` distinct records (0: no limit) those with the
    smallest content hashes are taken, so the choice does not depend on the file's order.
    """
    distinct = {record.content_hash: record for record in read_records(uri, allow_text=True)}
    records = [distinct[key] for key in sorted(distinct)][: max_samples or None]
    return EvaluationSet(name or data_name(uri), role, uri, tuple(records))


def evaluate(
    base_model: str | Path,
    candidate_model: str | Path,
    sets: Sequence[EvaluationSet],
    *,
    rules: GateRules | None = None,
    max_tokens: int = 2048,
    num_examples: int = 4,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Score both models on every set and decide.

    Returns a plain dict (written as `evaluation.json`): `task`, `sets`, `results[model][set]` (fields of
    `SetScore`), `decision` (see `gate.decide`) and `examples`, the first `num_examples` records of the new task
    with what each model answers. One model is in memory at a time.

    Raises DataError for sets without a name of their own, or without a new task.
    """
    if len({s.name for s in sets}) != len(sets):
        raise DataError(f"evaluation sets need different names, got {', '.join(s.name for s in sets)}")
    tasks = [s for s in sets if s.role == "new task"]
    if len(tasks) != 1:
        raise DataError(f"exactly one evaluation set must have the role 'new task', got {len(tasks)}")
    examples = [r for r in tasks[0].records if r.messages and r.messages[-1]["role"] == "assistant"][:num_examples]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    results: dict[str, dict[str, dict[str, Any]]] = {}
    answers: dict[str, list[str]] = {}
    for name, path in (("base", model_folder(str(base_model))), ("candidate", model_folder(str(candidate_model)))):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)
        model.to(device).eval()
        results[name] = {
            s.name: score_set(
                model, tokenizer, s.records, max_tokens=max_tokens, description=f"{name} on {s.name}"
            ).to_dict()
            for s in sets
        }
        answers[name] = [generate(model, tokenizer, record) for record in examples]
        del model
    described = {s.name: {"role": s.role, "source": s.source, "num_samples": len(s.records)} for s in sets}
    return {
        "task": tasks[0].name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": str(base_model),
        "candidate_model": str(candidate_model),
        "sets": described,
        "results": results,
        "decision": decide(described, results, rules or GateRules()),
        "examples": [
            {
                "set": tasks[0].name,
                "prompt": record.messages[-2]["content"] if len(record.messages) > 1 else "",
                "reference": record.messages[-1]["content"],
                "base": answers["base"][i],
                "candidate": answers["candidate"][i],
            }
            for i, record in enumerate(examples)
        ],
    }
