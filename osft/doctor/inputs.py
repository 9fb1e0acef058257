"""The model and the data that are configured, as far as they can be looked at from here.

The same functions check what `make run` is given.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from osft import storage
from osft.doctor.finding import Finding, error, not_checked, ok, separated
from osft.doctor.subject import Subject

if TYPE_CHECKING:
    from osft.subspace.preflight import Preflight


def check_model(subject: Subject) -> Iterator[Finding]:
    """Is the model complete, can it be trained, are there weights that the patterns name?"""
    configuration = subject.configuration
    model = configuration.text("base_model")
    if not model:
        yield not_checked("model", "base_model is not given")
        return
    about = f"model {model}"
    if not is_local_model(model):
        yield not_checked(about, "is not on this machine: the first step fetches it and refuses what cannot be trained")
        return
    if _is_elsewhere(subject, model):
        yield not_checked(about, "is on the shared volume, which is not mounted here: run osft doctor in a pod")
        return
    patterns, ratio = configuration.values.get("target_patterns"), configuration.values["unfreeze_rank_ratio"]
    try:
        yield ok(about, look_at_model(model, patterns, ratio).line())
    except (ValueError, FileNotFoundError) as refusal:
        yield error(about, *separated(refusal))


def check_data(subject: Subject) -> Iterator[Finding]:
    """Can every record be read that is to be learned, and every text that is to be kept?"""
    configuration = subject.configuration
    for name, uris in (
        ("data_uri", [configuration.text("data_uri")]),
        ("anchor_uris", configuration.values.get("anchor_uris") or []),
    ):
        for uri in uris:
            yield _data(subject, name, uri)


def _data(subject: Subject, name: str, uri: str) -> Finding:
    about = f"{name} {uri}".rstrip()
    if not uri:
        return not_checked(about, "is not given")
    if _is_elsewhere(subject, uri):
        return not_checked(about, "is on the shared volume, which is not mounted here: run osft doctor in a pod")
    try:
        count = count_records(uri, allow_text=name != "data_uri")
    except (ValueError, FileNotFoundError) as refusal:
        return error(about, *separated(refusal))
    if count is None:
        return not_checked(about, "is not looked at before a round: the first step fetches it")
    return ok(about, f"{count:,} records can be used")


def _is_elsewhere(subject: Subject, location: str) -> bool:
    """Whether a path lies below a storage root that only the pods have."""
    root = subject.configuration.storage_root
    below = not storage.is_remote(root) and Path(location).is_relative_to(root)
    return below and not Path(root).is_dir()


def is_local_model(model: str) -> bool:
    """Whether a model is a folder of this machine, not an id of the hub."""
    return Path(model).is_dir() or model.startswith((".", "/", "~")) or model.count("/") > 1


def look_at_model(model: str, target_patterns: Sequence[str] | None, unfreeze_rank_ratio: float) -> "Preflight":
    """How a local model would be fed. Raises ValueError for what cannot be trained, FileNotFoundError."""
    from osft.models.checkpoint import CheckpointReader
    from osft.models.loading import empty_model
    from osft.subspace import select_targets, unfrozen_rank
    from osft.subspace.preflight import preflight

    CheckpointReader(model)
    found = preflight(model)
    for target in select_targets(empty_model(model), target_patterns or None):
        unfrozen_rank(target.shape, unfreeze_rank_ratio)
    return found


def count_records(uri: str, *, allow_text: bool) -> int | None:
    """The records at a place, all of which can be used; None for one that only a round fetches.

    Raises DataError, a ValueError, for a record that cannot be used, and FileNotFoundError.
    """
    from osft.data.examples import SCHEME
    from osft.data.files import is_hub_dataset
    from osft.data.records import read_records

    if uri.startswith(SCHEME) or is_hub_dataset(uri):
        return None
    return sum(1 for _ in read_records(uri, allow_text=allow_text))
