"""Base, champion and candidate on the new task, on all earlier tasks, on the anchors and on public benchmarks."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from osft.data.files import data_name
from osft.data.records import DataError, Record, read_records
from osft.evaluation.drift import plan_comparison
from osft.evaluation.measure import MeasuredModel, served_dtype
from osft.evaluation.record import (
    BenchmarkResults,
    BenchmarkScore,
    EvaluatedModel,
    EvaluatedSet,
    Evaluation,
    Example,
    SetDrift,
)
from osft.evaluation.score_store import ScoreStore
from osft.evaluation.scoring import RecordScores, changes, describe_accuracy
from osft.models.checkpoint import CheckpointReader
from osft.models.loading import model_folder

logger = logging.getLogger(__name__)

MODELS = ("base", "champion", "candidate")
"""What a round compares, in this order; the first round has no champion."""
ROLES = ("new task", "earlier task", "anchor", "self-written")


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Records that a model is measured on."""

    name: str
    role: str
    """"new task", "earlier task" (held out when an ancestor learned it), "anchor": something general that the model
    should not forget, or "self-written": text that the base model wrote, on which drift is all that is measured."""
    source: str
    records: tuple[Record, ...]

    @property
    def digest(self) -> str:
        """Hash of the records' contents, in their order."""
        return hashlib.sha256("".join(record.content_hash for record in self.records).encode()).hexdigest()


def load_set(uri: str, role: str, *, name: str = "", max_samples: int = 0) -> EvaluationSet:
    """Read an evaluation set: JSON lines of chats or of plain text.

    The name defaults to `data_name(uri)`. Of more than `max_samples` distinct records (0: no limit) those with the
    smallest content hashes are taken, so the choice does not depend on the file's order.
    """
    distinct = {record.content_hash: record for record in read_records(uri, allow_text=True)}
    records = [distinct[key] for key in sorted(distinct)][: max_samples or None]
    return EvaluationSet(name or data_name(uri), role, uri, tuple(records))


def evaluate(
    models: Mapping[str, str],
    sets: Sequence[EvaluationSet],
    *,
    benchmarks: Sequence[str] = (),
    benchmark_folder: str | None = None,
    max_benchmark_samples: int = 0,
    score_store: str | None = None,
    num_examples: int = 4,
    max_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Measure the models on every set and benchmark, and compare the candidate with the others.

    models: "base", "champion" (may be absent) and "candidate" -> folder, URI or Hugging Face id. For the drift all are
    in memory, or if there is no room the candidate with one of the others, each over all GPUs, in float32 (in bfloat16
    if the GPUs have no room for two). A model is loaded only if `score_store` (a path or URI) lacks one of its numbers.
    benchmarks: names of lm-evaluation-harness tasks, groups or tags (`osft.evaluation.benchmarks`), those in the YAML
    files of `benchmark_folder` among them, with the first `max_benchmark_samples` questions of each (0: all).
    max_tokens: of a micro-batch; None: `FAST_TOKENS` of the device.
    num_examples: of the new task and of each earlier one, how many records are shown with the models' answers.

    The matrix, the decision and the champion's version are for `osft.rounds` to add.

    Raises ValueError for other models, and for benchmarks that cannot be run (before a model is loaded); DataError for
    sets without a name of their own or a known role, an empty one, or not exactly one new task.
    """
    _check_models(models)
    task = _check_sets(sets)
    public = None
    if benchmarks:
        from osft.evaluation.benchmarks import Benchmarks

        public = Benchmarks(benchmarks, folder=benchmark_folder, max_samples=max_benchmark_samples)
    present = [name for name in MODELS if name in models]
    folders = {name: model_folder(str(models[name])) for name in present}
    store = ScoreStore(score_store)
    scored = [s for s in sets if s.role != "self-written"]
    shown = {s.name: _chats(s.records)[:num_examples] for s in sets if s.role in ("new task", "earlier task")}

    def measured(name: str, **how: Any) -> MeasuredModel:
        return MeasuredModel(folders[name], store, max_tokens=max_tokens, trust_remote_code=trust_remote_code, **how)

    # First, because the logits that are compared give the scores, too.
    dtype, at_once = plan_comparison(list(folders.values()))
    candidate = measured("candidate", dtype=dtype)
    in_memory = {"candidate": candidate}
    drift: dict[str, dict[str, SetDrift | None]] = {name: {} for name in present[:-1]}
    for group in [present[:-1]] if at_once else [[name] for name in present[:-1]]:
        references = {name: measured(name, dtype=dtype) for name in group}
        for s in sets:
            compared = f"{' and '.join(group)} to candidate on {s.name}"
            moved = candidate.drift(list(references.values()), s.records, compared)
            for name, from_it in zip(group, moved, strict=True):
                drift[name][s.name] = from_it.summary() if from_it else None
        in_memory |= references if at_once else {}
        del references
    del candidate
    if dtype is not served_dtype():
        in_memory.clear()
    scores: dict[str, dict[str, RecordScores]] = {}
    answers: dict[str, dict[str, list[str]]] = {}
    benchmark_results: dict[str, dict[str, BenchmarkScore]] = {}
    for name in present:
        model = in_memory.pop(name, None) or measured(name)
        scores[name] = {s.name: model.scores(s.records, f"{name} on {s.name}") for s in scored}
        answers[name] = {key: model.answers(records) for key, records in shown.items() if records}
        if public is not None:
            benchmark_results[name] = model.benchmarks(public, f"{name} on benchmarks")
        del model  # the next one needs its memory
    notes = {s.name: describe_accuracy(s.records, scores["candidate"][s.name]) for s in scored}
    for set_name, of_set in notes.items():
        for note in of_set:
            logger.info(f"evaluation set {set_name}: {note}")
    exact = None
    if CheckpointReader(folders["candidate"]).is_exact:
        unrounded = measured("candidate", exact=True)
        exact = unrounded.scores(task.records, f"candidate's exact weights on {task.name}").summary()

    return Evaluation(
        task=task.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        models={name: EvaluatedModel(path=str(models[name]), version=None) for name in present},
        reference="champion" if "champion" in models else "base",
        sets={
            s.name: EvaluatedSet(
                role=s.role, source=s.source, num_samples=len(s.records), notes=tuple(notes.get(s.name, ()))
            )
            for s in sets
        },
        results={name: {key: score.summary() for key, score in of_sets.items()} for name, of_sets in scores.items()},
        exact=exact,
        changes={
            name: {s.name: changes(scores[name][s.name], scores["candidate"][s.name]) for s in scored}
            for name in present[:-1]
        },
        drift=drift,
        benchmarks=None if public is None else BenchmarkResults(tasks=public.described, results=benchmark_results),
        examples=tuple(
            Example(
                set=key,
                prompt=record.messages[-2]["content"] if len(record.messages) > 1 else "",
                reference=record.messages[-1]["content"],
                answers={name: answers[name][key][i] for name in present},
            )
            for key, records in shown.items()
            for i, record in enumerate(records)
        ),
        matrix=None,
        decision=None,
    )


def _check_models(models: Mapping[str, str]) -> None:
    unknown = [name for name in models if name not in MODELS]
    missing = [name for name in ("base", "candidate") if name not in models]
    if unknown or missing:
        problem = f"there is no model {unknown[0]!r}" if unknown else f"the model {missing[0]!r} is missing"
        raise ValueError(f"{problem}: give 'base' and 'candidate', and 'champion' if there is one")


def _check_sets(sets: Sequence[EvaluationSet]) -> EvaluationSet:
    """The set of the new task."""
    if len({s.name for s in sets}) != len(sets):
        raise DataError(f"evaluation sets need different names, got {', '.join(s.name for s in sets)}")
    for s in sets:
        if s.role not in ROLES:
            raise DataError(f"the evaluation set {s.name} has the role {s.role!r}; there are {', '.join(ROLES)}")
        if not s.records:
            raise DataError(
                f"the evaluation set {s.name} ({s.source}) has no records. Give at least one, or leave it out"
            )
    tasks = [s for s in sets if s.role == "new task"]
    if len(tasks) != 1:
        raise DataError(f"exactly one evaluation set must have the role 'new task', got {len(tasks)}")
    return tasks[0]


def _chats(records: Sequence[Record]) -> list[Record]:
    """The records with an answer that a model can be asked for."""
    return [record for record in records if record.messages and record.messages[-1]["role"] == "assistant"]
