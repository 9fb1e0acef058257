"""Data sets as inputs of MLflow runs: what a run learned and was measured on, beside it in MLflow's pages."""

import json
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit, urlunsplit

from osft.data.files import is_hub_dataset

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

Context = Literal["training", "evaluation"]

_MAX_DIGEST = 36  # MLflow's limit, in characters


def dataset_input(*, name: str, digest: str, source: str, num_records: int, context: Context) -> "DatasetInput":
    """A data set as MLflow's entity.

    digest: of the content, in hex; MLflow keeps its first 36 characters, the profile all.
    source: path, URI or Hugging Face id; credentials and queries (where signed links have theirs) are left out.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind, address = _source(source)
    profile = {"num_records": num_records, "digest": digest}
    dataset = Dataset(
        name=name, digest=digest[:_MAX_DIGEST], source_type=kind, source=address, profile=json.dumps(profile)
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])


def _source(source: str) -> tuple[str, str]:
    """MLflow's name for the kind of source, and the source in the JSON that MLflow reads back."""
    parts = urlsplit(source)
    if "://" not in source:
        if is_hub_dataset(source):
            name, _, revision = source.partition("@")
            return "hugging_face", json.dumps({"path": name, "revision": revision or None})
        return "local", json.dumps({"uri": source})
    bare = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    if parts.scheme in ("http", "https"):
        return "http", json.dumps({"url": bare})
    return parts.scheme, json.dumps({"uri": bare})
