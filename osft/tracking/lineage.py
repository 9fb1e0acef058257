"""Where a model version comes from: `lineage.json`, and what a later round needs of it.

In the artifacts of the MLflow run that registered the version, beside its checkpoint:

    lineage/lineage.json                    everything below, with the hashes of the other two files
    lineage/records.bin                     hashes of the records that this round took (`osft.data.record_hashes`)
    lineage/evaluation_sets/<task>.jsonl    the round's held-out records; absent if there are none. What a URI gives a
                                            meaning to is a dash in this name

A version names its parent, so one version leads back to the base model. What several rounds share is not copied: the
records that a model has learned, and the evaluation sets of all its tasks, are the union over its history.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import JsonValue, model_validator

from osft.data.record_hashes import RECORDS_FILE, Hashes, read_hashes, union, write_hashes
from osft.evaluation.matrix import Score, negated
from osft.models.origin import StoredStatistics
from osft.storage.atomic import atomic_path, write_json
from osft.storage.hashes import file_sha256
from osft.storage.record import Record, RecordError, RecordPart
from osft.tracking.registry import LINEAGE

if TYPE_CHECKING:
    from mlflow import MlflowClient

LINEAGE_FILE = "lineage.json"
EVALUATION_SETS = "evaluation_sets"
_TASK = re.compile(r"[^/\\.\x00-\x1f][^/\\\x00-\x1f]{0,199}")

Scores = dict[str, dict[str, Score]]
"""Of one model: the name of an evaluation set -> metric -> value, None if not measured.

The metrics are "loss" and "accuracy", their "…_stderr", and of the models after a round how far these moved: "kl_base",
"kl_champion" (from the round's parent) and their "…_stderr", in nats per token.
"""


class LineageError(ValueError):
    """A version whose history cannot be read; the message names it."""


class DataFile(RecordPart):
    """One file that a round read."""

    name: str
    """Path or URI; of a Hugging Face data set its id."""
    sha256: str
    """Of the bytes; empty for a Hugging Face data set, which the revision determines."""
    num_records: int


class DataManifest(RecordPart):
    """What a round read."""

    uri: str
    revision: str = ""
    """The commit of a Hugging Face data set."""
    files: tuple[DataFile, ...]
    num_records: int
    """Lines, with duplicates and with what was known."""
    num_new: int
    """Distinct records that no ancestor had."""


class StoredFile(RecordPart):
    """A file beside lineage.json."""

    sha256: str
    num_records: int


class Row(RecordPart):
    """A model of the history, and what was measured of it: a row of the continual-learning matrix."""

    task: str
    """What the round learned."""
    scores: Scores


class Lineage(Record):
    """The content of `lineage.json`."""

    model_name: str
    parent_version: int | None
    """None: the base model."""
    base_model: str
    task: str
    """Not the name of an ancestor's task."""
    checkpoint: str
    """Path or URI below the storage root; the same files are in the version's artifacts."""
    checkpoint_sha256: str = ""
    """Of the names and bytes of its files, exact weights included; empty in versions from before this was recorded."""
    data: DataManifest
    settings: dict[str, JsonValue]
    factor_key: str
    statistics: StoredStatistics | None = None
    """What the next round has to keep: the base model and all that was learned so far (protect="activations"). They
    stay below the storage root. None in versions from before this was recorded."""
    code_version: str
    image: str
    pipeline_run_id: str
    mlflow_run_id: str
    baseline: Scores
    """Of the base model."""
    rows: tuple[Row, ...]
    """Of the model after each round so far; the last is this version's."""
    records: StoredFile = StoredFile(sha256="", num_records=0)
    """`records.bin`; `write` fills it in."""
    evaluation_set: StoredFile | None = None
    """The held-out records; `write` fills it in."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        tasks = [row.task for row in self.rows]
        if not tasks or tasks[-1] != self.task or len(set(tasks)) != len(tasks):
            raise ValueError(f"rows must be of different tasks and end with this round's, {self.task!r}; got {tasks}")
        if (self.parent_version is None) != (len(tasks) == 1):
            raise ValueError(f"parent_version is {self.parent_version}, which does not fit {len(tasks)} rounds")
        check_task(self.task)
        return self

    @property
    def dataset(self) -> str:
        """The key of the prepared dataset that the round learned, its folder's name below the storage root's data/."""
        return str(self.settings.get("dataset", ""))

    @property
    def evaluation_set_name(self) -> str:
        """Where the evaluation set lies, below the lineage's folder."""
        # MLflow takes a name for a part of a URI, in which ?, # and % mean something.
        return f"{EVALUATION_SETS}/{re.sub('[^A-Za-z0-9._-]', '-', self.task)}.jsonl"

    def matrix(self, metric: str) -> tuple[list[list[Score]], list[Score]]:
        """The continual-learning matrix (T, T) and the baseline (T,) for `osft.evaluation.matrix`.

        metric: "accuracy", or "loss", which is negated. What was not measured is None.
        """
        tasks = [row.task for row in self.rows]
        models = [self.baseline, *(row.scores for row in self.rows)]
        values = [[scores.get(task, {}).get(metric) for task in tasks] for scores in models]
        baseline, *rows = negated(values) if metric == "loss" else values
        return rows, baseline


def check_task(task: str) -> None:
    """Raise ValueError for a name that cannot be a file's."""
    if not _TASK.fullmatch(task):
        raise ValueError(f"{task!r} cannot be a task's name: give 1 to 200 characters without / and \\, no leading dot")


def next_rows(parent: Lineage | None, task: str, *, parent_scores: Scores, scores: Scores) -> tuple[Row, ...]:
    """The rows of a version: its parent's, to whose last one the measurements of this round are added, and its own.

    `parent_scores` has what forward transfer needs, the parent's score on the new task.
    """
    rows = parent.rows if parent else ()
    if rows:
        rows = (*rows[:-1], rows[-1].replace(scores=rows[-1].scores | parent_scores))
    return (*rows, Row(task=task, scores=scores))


def write(folder: Path, lineage: Lineage, *, record_hashes: Hashes, held_out: Path | None) -> Lineage:
    """Make the folder that `registry.register` stores with a version. Returns the lineage with the files' hashes.

    record_hashes: (n,) of the records that the round took, on either side of its split: neither is new to a later one.
    held_out: JSON lines, the round's evaluation set; None or an empty file if it has none.
    """
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        hashes = union([record_hashes])
        write_hashes(temporary / RECORDS_FILE, hashes)
        records = StoredFile(sha256=file_sha256(temporary / RECORDS_FILE), num_records=len(hashes))
        evaluation_set = None
        if held_out is not None and held_out.stat().st_size:
            stored = temporary / lineage.evaluation_set_name
            stored.parent.mkdir()
            shutil.copyfile(held_out, stored)
            with stored.open("rb") as lines:
                count = sum(1 for line in lines if line.strip())
            evaluation_set = StoredFile(sha256=file_sha256(stored), num_records=count)
        lineage = lineage.replace(records=records, evaluation_set=evaluation_set)
        write_json(temporary / LINEAGE_FILE, lineage.to_dict())
    return lineage


def parse(text: str, source: str) -> Lineage:
    """The lineage of a `lineage.json`. Raises LineageError that names `source` for anything else."""
    try:
        return Lineage.from_json(text, f"{source}: its {LINEAGE_FILE}")
    except RecordError as error:
        raise LineageError(str(error)) from None


def read(mlflow: "MlflowClient", model_name: str, version: int) -> Lineage:
    """The lineage of a registered version. Raises LineageError if there is no such version, or no lineage of it."""
    with _downloaded(mlflow, model_name, version, LINEAGE_FILE) as file:
        found = parse(file.read_text(encoding="utf-8"), _name(model_name, version))
    if found.model_name != model_name:
        raise LineageError(f"{_name(model_name, version)}: its {LINEAGE_FILE} is that of a {found.model_name}")
    return found


def history(mlflow: "MlflowClient", model_name: str, version: int) -> dict[int, Lineage]:
    """A version and its ancestors, from the first one after the base model on.

    Raises LineageError that names the version if an ancestor is missing, the parents form a cycle, or a version does
    not continue its parent's tasks and base model.
    """
    found: dict[int, Lineage] = {}
    at: int | None = version
    while at is not None:
        if at in found:
            path = " -> ".join(map(str, [*found, at]))
            raise LineageError(f"{_name(model_name, at)} is its own ancestor: {path}")
        try:
            found[at] = read(mlflow, model_name, at)
        except LineageError as error:
            if not found:
                raise
            raise LineageError(f"the parent of {_name(model_name, list(found)[-1])} cannot be read: {error}") from None
        at = found[at].parent_version
    ordered = dict(reversed(found.items()))
    before: Lineage | None = None
    for number, lineage in ordered.items():
        if before is not None:
            expected = [row.task for row in before.rows]
            if [row.task for row in lineage.rows[:-1]] != expected or lineage.base_model != before.base_model:
                raise LineageError(
                    f"{_name(model_name, number)} does not continue its parent, version {lineage.parent_version}, "
                    f"which comes from {before.base_model} and learned {', '.join(expected)}"
                )
        before = lineage
    return ordered


def known_records(mlflow: "MlflowClient", model_name: str, versions: Mapping[int, Lineage]) -> Hashes:
    """The set of the records that the versions of a `history` took. Raises LineageError for a damaged file."""
    sets = []
    for version, lineage in versions.items():
        with _downloaded(mlflow, model_name, version, RECORDS_FILE) as file:
            _check(file, lineage.records, _name(model_name, version), RECORDS_FILE)
            sets.append(read_hashes(file))
    return union(sets)


def earlier_evaluation_sets(
    mlflow: "MlflowClient", model_name: str, versions: Mapping[int, Lineage], to: Path
) -> dict[str, Path]:
    """Fetch the evaluation sets of the versions of a `history` to `to`/<task>.jsonl.

    Returns task -> file, the oldest first. What is there and equal is not fetched again.

    Raises LineageError for a file that is gone, or whose content is not what its version was registered with.
    """
    found = {}
    for number, lineage in versions.items():
        if lineage.evaluation_set is None:
            continue
        path = to / f"{lineage.task}.jsonl"
        if not (path.is_file() and file_sha256(path) == lineage.evaluation_set.sha256):
            with _downloaded(mlflow, model_name, number, lineage.evaluation_set_name) as file:
                _check(file, lineage.evaluation_set, _name(model_name, number), lineage.evaluation_set_name)
                with atomic_path(path) as temporary:
                    shutil.copyfile(file, temporary)
        found[lineage.task] = path
    return found


@contextmanager
def _downloaded(mlflow: "MlflowClient", model_name: str, version: int, name: str) -> Iterator[Path]:
    """A file of a version's lineage, in a temporary folder. Raises LineageError if it is not there."""
    from mlflow.exceptions import MlflowException

    try:
        run_id = mlflow.get_model_version(model_name, str(version)).run_id
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise LineageError(
            f"{_name(model_name, version)} is not in the registry: it was deleted, or never made"
        ) from None
    path = f"{LINEAGE}/{name}"
    folder = path.rsplit("/", 1)[0]
    if not run_id or path not in {entry.path for entry in mlflow.list_artifacts(run_id, folder)}:
        raise LineageError(
            f"{_name(model_name, version)} has no {name}: it was registered without its lineage, or the artifacts of "
            "its MLflow run were deleted. Point the alias at a version that has one, or take another model_name"
        )
    with tempfile.TemporaryDirectory(prefix="osft-lineage-") as temporary:
        yield Path(mlflow.download_artifacts(run_id, path, temporary))


def _check(file: Path, expected: StoredFile, version: str, name: str) -> None:
    if file_sha256(file) != expected.sha256:
        raise LineageError(f"{version}: its {name} is not what it was registered with (its SHA-256 differs)")


def _name(model_name: str, version: int) -> str:
    return f"version {version} of {model_name}"
