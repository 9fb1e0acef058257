"""Where the records of a round come from: files that a path or URI names, or a data set of the Hugging Face hub."""

from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from osft import storage
from osft.data.files import data_files, data_name, fetch_hub_dataset, hub_commit, is_hub_dataset
from osft.data.records import Record, read_records_of
from osft.tracking.lineage import DataFile, DataManifest


class Source(Protocol):
    """Something that records are read from, once."""

    uri: str
    conversions: Counter[str]
    """What `records` converted and ignored, as `osft.data.records.read_records` counts it."""

    def name(self, files: frozenset[str]) -> str:
        """What a round that learns records of these files is called."""

    def records(self) -> Iterator[Record]:
        """All records, validated. Raises DataError at the first bad one."""

    def manifest(self, *, num_records: int, num_new: int) -> DataManifest:
        """What was read, after `records` has ended."""


def open_source(uri: str) -> "Source":
    """The records of a file, glob, folder or `s3://` prefix, or of a Hugging Face data set.

    A data set is `org/name` or `org/name@revision`, where no such path is; its split `train` is read.

    Raises FileNotFoundError if there is neither, or the hub cannot be reached.
    """
    return HubDataset(uri) if is_hub_dataset(uri) else Files(uri)


class Files:
    """Files of any format that is read; which ones, is settled when this is made."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._files = data_files(uri)
        self._counts: Counter[str] = Counter()
        self.conversions: Counter[str] = Counter()

    def name(self, files: frozenset[str]) -> str:
        """The file's name; for records of several files, or of a folder that `datasets` saved, the folder's."""
        file = next(iter(files)) if len(files) == 1 else ""
        return data_name(file if file and not file.endswith(".arrow") else self.uri)

    def records(self) -> Iterator[Record]:
        """All records, file by file. Raises DataError at the first bad line."""
        for file in self._files:
            name = storage.name_of(file)
            for record in read_records_of(file, counts=self.conversions):
                self._counts[name] += 1
                yield record

    def manifest(self, *, num_records: int, num_new: int) -> DataManifest:
        """The files as they are now, and what was read of each."""
        from osft.data.dataset_folder import hash_files

        files = tuple(
            DataFile(name=name, sha256=digest, num_records=self._counts[name])
            for name, digest in hash_files(self._files).items()
        )
        return DataManifest(uri=self.uri, files=files, num_records=num_records, num_new=num_new)


class HubDataset:
    """A data set of the Hugging Face hub at the commit that its revision names now."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.conversions: Counter[str] = Counter()
        self._id = uri.partition("@")[0]
        self._revision = hub_commit(uri)

    def name(self, files: frozenset[str]) -> str:
        """The id without its owner."""
        return self._id.split("/")[1]

    def records(self) -> Iterator[Record]:
        """All rows. Raises DataError at the first that is no record, FileNotFoundError if the hub gives none."""
        yield from read_records_of(fetch_hub_dataset(self._id, self._revision), counts=self.conversions)

    def manifest(self, *, num_records: int, num_new: int) -> DataManifest:
        """The commit, and what was read."""
        file = DataFile(name=self._id, sha256="", num_records=num_records)
        return DataManifest(
            uri=self.uri, revision=self._revision, files=(file,), num_records=num_records, num_new=num_new
        )
