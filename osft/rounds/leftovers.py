"""What below a storage root no version, alias or running round refers to, and its removal (`osft clean`).

What is needed is read from the registry and from MLflow's runs; it is an error, and nothing is removed, where that
cannot be done, or a lineage or manifest cannot be read.

    what                                           stays as long as
    rounds/<id>/                                   its round is running, may be retried, or is not in this MLflow
    … the checkpoint of a version                  the version is in the registry
    … records of the round (JSON, report, metrics) one of its versions is
    … training state, other models, copies         only till then: nothing reads them after the round
    data/                                          a version learned it: replay draws from it
    factors/sets/, weights/                        a round that started from the champion (without one: from the base)
                                                   was refused: the next reuses them; with protect="weights" also those
                                                   that the champion was trained with: the next's follow from them
    factors/statistics/, moments/, texts/          a version, or a set that stays, names them
    records/, scores/, a model's own text          only while a round runs: the next one writes what it needs
    models/, examples/, champions/, mlflow/        always: rounds share them
    anything else                                  always: it is named

Everything outside rounds/ is shared, and a round that begins may be about to use it: none of it is removed while any
round is running or may be retried. A round that begins in the very seconds of a removal can miss a file; its step fails
and names it, and its retry writes it again.
"""

import logging
import re
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from osft import storage
from osft.rounds.pipeline_run import EVALUATION_FILE, FACTORS_FILE, REPORT_FILE, ROUND_FILE, VERSION_FILE
from osft.tracking import lineage, registry, runs

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

RETRY_DAYS = 7.0
"""How long a round that failed keeps its files: Kubeflow can retry it."""
_ROUND_RECORDS = {
    *(ROUND_FILE, FACTORS_FILE, EVALUATION_FILE, REPORT_FILE, VERSION_FILE),
    *("train/config.json", "train/metrics.jsonl", "train/training.json"),
}
_PASSING = re.compile(
    r"(lineage|evaluation_sets|train/(state|_internal_data_processing|\.lock))/.+"
    r"|train/(stop|lease|(work|summary)-\d+\.json)"
)
"""What only the round itself reads: it can be computed again, or the version's lineage has it."""
_INCOMPLETE = re.compile(r"\.incomplete(-[0-9a-f]{8})?(/|$)")
_ALWAYS = {
    "models": "fetched once for all rounds",
    "examples": "fetched once for all rounds",
    "champions": "the claims of champions",
    "mlflow": "MLflow's own",
}


@dataclass(kw_only=True, slots=True)
class Part:
    """Files below a storage root that have one fate."""

    place: str
    """Relative to the root."""
    fate: Literal["remove", "stay", "unknown"]
    reason: str
    files: list[str] = field(default_factory=list)
    """Relative to the root."""
    size: int = 0
    """Bytes."""


def sort_files(
    mlflow: "MlflowClient", storage_root: str, *, ended: Collection[str] = (), retry_days: float = RETRY_DAYS
) -> list[Part]:
    """What becomes of every file below a storage root, a path or URI.

    `ended`: ids of pipeline runs that MLflow takes for running, or that may be retried, and that are over nevertheless.

    Raises FileNotFoundError if nothing is there, ValueError for an id in `ended` of no round, LineageError or
    DamagedFile for a version or a manifest that cannot be read, and what MLflow and the store raise.
    """
    files = storage.sizes(storage_root)
    if not files:
        raise FileNotFoundError(f"there is nothing below {storage_root}. Give the storage_root of the pipeline")
    ids = {name.split("/")[1] for name in files if name.startswith("rounds/") and name.count("/") > 1}
    states = _round_states(mlflow, retry_days)
    if strangers := set(ended) - ids - set(states):
        raise ValueError(f"there is no round {sorted(strangers)[0]} below {storage_root}. Give the id of its folder")
    needed = _Needed(mlflow, storage_root, set(files))
    unsettled = {id: states.get(id, "MLflow knows no run of it") for id in ids | set(states)}
    unsettled = {id: state for id, state in unsettled.items() if state and id not in ended}
    parts: dict[tuple[str, str], Part] = {}
    for name in sorted(files):
        place, fate, reason = _fate(name, needed, unsettled)
        part = parts.setdefault((place, reason), Part(place=place, fate=fate, reason=reason))
        part.files.append(name)
        part.size += files[name]
    return list(parts.values())


def remove(storage_root: str, parts: Collection[Part]) -> None:
    """Remove the parts whose fate that is: what names files before these, so that nothing is half there."""
    removed = [part for part in parts if part.fate == "remove"]
    for part in sorted(removed, key=lambda part: not part.place.endswith(("/sets", "/statistics"))):
        storage.remove_files(storage_root, part.files)
        if not storage.is_remote(storage_root):
            _remove_empty_folders(Path(storage_root), part.files)


def end_runs(mlflow: "MlflowClient", ended: Collection[str]) -> int:
    """End the MLflow runs that the pipeline runs `ended`, which are over, have left RUNNING. Returns how many."""
    left = 0
    for id in ended:
        for run in _runs(mlflow, f"tags.`{runs.PIPELINE_RUN_TAG}` = '{id}' AND attributes.status = 'RUNNING'"):
            if run.info.lifecycle_stage == "active":
                runs.end_killed(mlflow, run.info.run_id)
                left += 1
    return left


def remove_factors(mlflow: "MlflowClient", storage_root: str, *, ended: str) -> None:
    """Remove the factors that no champion has any more, when the round `ended` has promoted one.

    They stay for `osft clean` while another round is running, and where it cannot be known.
    """
    try:
        parts = sort_files(mlflow, storage_root, ended=[ended])
        factors = [part for part in parts if part.place in ("factors/sets", "factors/weights")]
        remove(storage_root, factors)
    except Exception as error:  # the promotion holds whatever becomes of old files
        logger.warning(f"storage: the factors of earlier models stay ({error}). `osft clean` removes them")
        return
    for part in factors:
        told = "removed" if part.fate == "remove" else "stay"
        logger.info(
            f"storage: {len(part.files)} files of {part.place}, {part.size / 1e9:.3g} GB, {told}: {part.reason}"
        )


class _Needed:
    """What the versions of the registry refer to, relative to the storage root."""

    def __init__(self, mlflow: "MlflowClient", storage_root: str, files: Collection[str]) -> None:
        self.checkpoints: dict[str, dict[str, str]] = {}
        """Id of a round -> the folder of a checkpoint in it -> whose it is."""
        self.datasets: set[str] = set()
        self.files: set[str] = set()
        """Of the factor store."""
        sets: set[str] = set()
        champions: dict[str, int | None] = {}
        for version in _pages(mlflow.search_model_versions, ""):
            name, number = version.name, int(version.version)
            found = lineage.read(mlflow, name, number) if registry.CHECKPOINT_TAG in version.tags else None
            address = found.checkpoint if found else str(version.source)  # of one that was registered by hand
            if place := re.search(r"(?:^|/)rounds/([^/]+)/(train/.+)", address):
                self.checkpoints.setdefault(place[1], {})[place[2].rstrip("/")] = f"version {number} of {name}"
            if found is None:
                continue
            if name not in champions:
                champions[name] = registry.champion(mlflow, name)
            self.datasets.add(found.dataset)
            if found.statistics:
                address = found.statistics.address.rpartition("factors/")[2]
                self.files |= {f"factors/{address}", f"factors/statistics/{found.statistics.sha256[:32]}.json"}
            is_followed = number == champions[name] and found.settings.get("protect") != "activations"
            if is_followed or found.parent_version == champions[name]:
                sets.add(f"factors/sets/{found.factor_key}.json")
        self._add_factors(storage_root, sets & set(files), files)

    def _add_factors(self, storage_root: str, sets: Collection[str], files: Collection[str]) -> None:
        from osft.subspace.factor_set import read_factor_set
        from osft.subspace.statistics_store import stored_files, stored_parts

        for name in sets:
            found = read_factor_set(storage.fetch(storage.join(storage_root, name)), 0)
            self.files |= {name, *(f"factors/{weight.file}" for weight in found.weights.values())}
            if found.statistics:
                self.files.add(f"factors/{found.statistics}")
        for name in [name for name in self.files & set(files) if name.startswith("factors/statistics/")]:
            address = storage.join(storage_root, name)
            self.files |= {f"factors/{file}" for file in stored_files(address)}
            self.files |= {f"factors/texts/{part.text_sha256}.jsonl" for part in stored_parts(address)}


def _round_states(mlflow: "MlflowClient", retry_days: float) -> dict[str, str]:
    """Id of a pipeline run that MLflow has -> why its files stay; empty if it has ended."""
    found = _runs(mlflow, f"tags.`{runs.PIPELINE_RUN_TAG}` LIKE '%'")
    of_rounds = {run.info.run_id for run in found}
    states = {}
    for run in found:
        if run.data.tags.get("mlflow.parentRunId") in of_rounds:  # a step
            continue
        state = ""
        if run.info.status in ("RUNNING", "SCHEDULED"):
            state = "the round is running"
        elif run.info.status != "FINISHED" and time.time() - (run.info.end_time or 0) / 1000 < retry_days * 86400:
            state = f"the round failed less than {retry_days:g} days ago, and may be retried"
        states[run.data.tags[runs.PIPELINE_RUN_TAG]] = state
    return states


def _runs(mlflow: "MlflowClient", query: str) -> list[Any]:
    """The runs of all experiments, deleted ones too."""
    from mlflow.entities import ViewType

    experiments = [found.experiment_id for found in _pages(mlflow.search_experiments, ViewType.ALL)]
    if not experiments:
        return []
    return list(_pages(lambda **page: mlflow.search_runs(experiments, query, run_view_type=ViewType.ALL, **page)))


def _pages(search: Any, *arguments: Any) -> Iterator[Any]:
    """All that a search of MLflow finds."""
    token = None
    while True:
        page = search(*arguments, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _fate(
    name: str, needed: _Needed, unsettled: Mapping[str, str]
) -> tuple[str, Literal["remove", "stay", "unknown"], str]:
    """The place of a file, what becomes of it, and why."""
    top, *rest = name.split("/")
    if top in _ALWAYS:
        return top, "stay", _ALWAYS[top]
    if top == "rounds" and len(rest) > 1:
        return _fate_in_round(name, rest[0], "/".join(rest[1:]), needed, unsettled)
    place = "/".join([top, *rest[: top == "factors"]]) if rest else name
    known = re.fullmatch(r"(records|data|scores|factors/(sets|weights|statistics|moments|texts))/.+", name)
    if not known:
        return place, "unknown", "not of a round: what it is, is not known"
    if unsettled:
        id, state = min(unsettled.items())
        return place, "stay", f"a round may use it: {id}, {state}"
    if _INCOMPLETE.search(name):
        return place, "remove", "was not written to its end"
    if top == "data":
        if rest[0] in needed.datasets:
            return place, "stay", "versions learned it"
        return place, "remove", "no version learned it"
    if top == "factors":
        if name in needed.files:
            return place, "stay", "a champion, or the statistics of a version"
        return place, "remove", "neither of a champion nor what a version keeps"
    return place, "remove", "no round is running that reads it"


def _fate_in_round(
    name: str, id: str, file: str, needed: _Needed, unsettled: Mapping[str, str]
) -> tuple[str, Literal["remove", "stay", "unknown"], str]:
    place = f"rounds/{id}"
    if id in unsettled:
        return place, "stay", unsettled[id]
    checkpoints = needed.checkpoints.get(id, {})
    for folder, version in checkpoints.items():
        if file.startswith(f"{folder}/"):
            return f"{place}/{folder}", "stay", version
    if file in _ROUND_RECORDS:
        if checkpoints:
            return place, "stay", "records of a version's round"
        return place, "remove", "the round made no version that is still there"
    if _INCOMPLETE.search(name):
        return place, "remove", "was not written to its end"
    if file.startswith("train/hf_format/"):
        return f"{place}/train/hf_format", "remove", "a model that no version is"
    if _PASSING.fullmatch(file):
        return f"{place}/{file.rpartition('/')[0].split('/step-')[0]}", "remove", "only its round needed it"
    return place, "unknown", "not of a round: what it is, is not known"


def _remove_empty_folders(root: Path, files: Collection[str]) -> None:
    """Remove the folders of removed files that are empty now, but for those at the top."""
    folders = {parent for file in files for parent in Path(file).parents if len(parent.parts) > 1}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        if (root / folder).is_dir() and not any((root / folder).iterdir()):
            (root / folder).rmdir()
