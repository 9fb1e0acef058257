"""The first step of a round: which model is trained further, and whether there is something for it to learn."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from osft import storage
from osft.data import examples
from osft.data.record_hashes import NONE
from osft.rounds.new_records import find_new_records
from osft.rounds.sources import open_source
from osft.settings.values import number
from osft.storage.record import Migration, Record
from osft.tracking import lineage
from osft.tracking.champion import settled_champion
from osft.tracking.lineage import DataManifest, Lineage, check_task

if TYPE_CHECKING:
    from mlflow import MlflowClient


def _without_format(found: dict[str, Any]) -> dict[str, Any]:
    """Before records had a format, and the first ones before replay and reports of conversions."""
    return {"earlier_data": {}, "conversions": {}} | found


class ResolvedRound(Record):
    """What a round starts from; `round.json`."""

    MIGRATIONS: ClassVar[Mapping[int, Migration]] = {0: _without_format}

    base_model: str
    parent_version: int | None
    """The champion when the round began, None for the base model: `expected_champion` of `champion.promote`."""
    model: str
    """Path or URI of the model to train on: the champion's checkpoint, or the base model as it was given."""
    task: str
    """The name of the file if all that is new is in one, else of the data; with a number if an ancestor's task has it
    already, since results are told apart by it."""
    earlier_tasks: tuple[str, ...]
    """Of the champion and its ancestors, the oldest first."""
    data: DataManifest
    records: str
    """Path or URI of the new records, JSON lines; empty if there is nothing to learn."""
    nothing_to_learn: str
    """Why the round ends here; empty if it continues."""
    earlier_data: dict[str, str]
    """Earlier task -> path or URI of the dataset that its round learned, whether or not it is still there."""
    conversions: dict[str, int]
    """What was converted in the data and ignored, and in how many records."""


def resolve(
    mlflow: "MlflowClient",
    *,
    model_name: str,
    base_model: str,
    data_uri: str,
    storage_root: str,
    min_new_samples: int = 1,
) -> ResolvedRound:
    """Read the registry and the data, and decide which records are new to the champion's lineage.

    A record is known if the champion or an ancestor took it, to learn or to be measured on. What only a refused
    version took is new. Given what is new, the file of it below `storage_root`/records is the same, whatever order and
    files it came in. An `example:` data set is fetched first. Nothing is cached: the answer changes with the registry
    and with the data.

    Raises FileNotFoundError for missing data or a checkpoint that is gone, DataError for a bad record, LineageError for
    a champion without a readable history, and ValueError for another base model than the champion's.
    """
    wanted = number(min_new_samples, whole=True)
    if wanted is None or wanted < 1:
        raise ValueError(f"min_new_samples must be an integer of at least 1, got {min_new_samples!r}")
    min_new_samples = int(wanted)
    for uri in (base_model, data_uri, storage_root):
        storage.is_remote(uri)  # refuses credentials, before anything is written down
    champion = settled_champion(mlflow, model_name, storage_root=storage_root)
    known, tasks, model, datasets = NONE, list[str](), base_model, dict[str, str]()
    if champion is not None:
        versions = lineage.history(mlflow, model_name, champion)
        parent = versions[champion]
        if parent.base_model != base_model:
            raise ValueError(
                f"{model_name} descends from {parent.base_model}, not from {base_model}. Give that base_model, or "
                "another model_name to start over"
            )
        model = _checkpoint(parent, f"version {champion} of {model_name}")
        known = lineage.known_records(mlflow, model_name, versions)
        tasks = [row.task for row in parent.rows]
        datasets = {one.task: storage.join(storage_root, "data", one.dataset) for one in versions.values()}
    source = open_source(examples.resolve(data_uri, storage.join(storage_root, "examples")))
    new = find_new_records(source, known, storage.join(storage_root, "records"), min_new_samples=min_new_samples)
    task = _distinct(source.name(new.files), tasks)
    check_task(task)
    return ResolvedRound(
        base_model=base_model,
        parent_version=champion,
        model=model,
        task=task,
        earlier_tasks=tuple(tasks),
        earlier_data=datasets,
        data=new.data,
        conversions=dict(new.conversions),
        records=new.location,
        nothing_to_learn=_reason(new.data, min_new_samples, champion) if not new.location else "",
    )


def _checkpoint(parent: Lineage, version: str) -> str:
    if storage.is_remote(parent.checkpoint):
        complete = "config.json" in storage.files(parent.checkpoint)
    else:
        complete = storage.find(parent.checkpoint, marker="config.json") is not None
    if not complete:
        raise FileNotFoundError(
            f"{parent.checkpoint}, the checkpoint of {version}, is gone. Put it back from model/ in the artifacts of "
            "the version's MLflow run, if it was copied there (copy_checkpoint), or set the alias champion to another "
            "version"
        )
    return parent.checkpoint


def _distinct(name: str, taken: list[str]) -> str:
    """`name`, or the first of name-2, name-3, … that is not taken."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def _reason(data: DataManifest, min_new_samples: int, champion: int | None) -> str:
    compared = "" if champion is None else f" that version {champion} does not know"
    wanted = f", and min_new_samples is {min_new_samples}" if data.num_new else ""
    return f"nothing to learn: {data.uri} has {data.num_new} records{compared} ({data.num_records} in all){wanted}"
