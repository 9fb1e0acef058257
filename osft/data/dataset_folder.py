"""A prepared dataset on disk: how it is addressed, written and read.

    <folder>/train/             a `datasets` folder: input_ids, labels, source
    <folder>/validation/        the held-out samples, the same way; absent where there are none
    <folder>/validation.jsonl   the held-out records as they came, for evaluation; may be empty
    <folder>/records.bin        of chats: which records it learns or holds out (`osft.data.record_hashes`)
    <folder>/dataset.json       statistics and provenance, written last

The folder's name is the hash of everything that determines it: the files' bytes, the tokenizer and the settings.
A second run with the same input reuses it; a run that dies half-way leaves nothing under that name.
"""

import hashlib
import json
import logging
import shutil
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, load_from_disk

from osft import storage
from osft.data.chat import IGNORE, Sample
from osft.data.sample_table import SAMPLES, Row, to_batch
from osft.storage.hashes import file_sha256, files_sha256
from osft.storage.sealed import DamagedFile, read_sealed, write_sealed

logger = logging.getLogger(__name__)

FORMAT = 4
"""Part of every dataset's hash: raise it when a preparation or the layout changes."""

_STATISTICS = "dataset.json"
_WRITTEN = "written"
"""In dataset.json: the other files of the folder, each with its size and SHA-256."""
_REMEDY = "Remove the dataset's folder and prepare it again"
BUFFERED_TOKENS = 1 << 20
BUFFERED_SAMPLES = 1 << 12


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A dataset on disk."""

    folder: Path
    statistics: dict[str, Any]
    reused: bool

    @property
    def key(self) -> str:
        """The dataset's content hash."""
        return self.folder.name


def hash_files(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file's bytes, by its path or URI."""
    return {storage.name_of(path): file_sha256(path) for path in files}


def hash_tokenizer(model_path: str | Path) -> str:
    """Hash of the files of a model's folder that determine tokens and loss masks."""
    names = ("token", "chat_template", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece")
    folder = Path(model_path)
    files = [file for file in folder.iterdir() if file.is_file() and file.name.startswith((*names, "tekken"))]
    files += (folder / "additional_chat_templates").glob("*.jinja")
    digests = {Path(file).name: digest for file, digest in hash_files(sorted(files)).items()}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def content_address(output_root: str | Path, *identity: Any) -> str:
    """The path or URI of the dataset that `identity`, plain values, determines."""
    return storage.join(output_root, hashlib.sha256(json.dumps([FORMAT, *identity]).encode()).hexdigest()[:32])


def is_dataset(location: str | Path) -> bool:
    """Whether a path or URI is a complete dataset folder."""
    if storage.is_remote(location):
        return _STATISTICS in storage.files(location)
    return Path(location, _STATISTICS).is_file() and Path(location, "train").is_dir()


def open_dataset(folder: Path) -> PreparedData:
    """A complete dataset folder.

    Raises FileNotFoundError if it is not one, DamagedFile if dataset.json is not what was written, or a file that it
    names has another size.
    """
    statistics = folder / _STATISTICS
    if not statistics.is_file():
        raise FileNotFoundError(f"{folder} is not a prepared dataset: it has no dataset.json")
    found = PreparedData(folder, read_sealed(statistics, _REMEDY), reused=True)
    for name, (size, _) in found.statistics.get(_WRITTEN, {}).items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise DamagedFile(f"{storage.name_of(file)} is missing, or has not its {size} bytes. {_REMEDY}")
    return found


def check_dataset(folder: Path) -> PreparedData:
    """As `open_dataset`, and every file is read: DamagedFile names one that is not what was written."""
    found = open_dataset(folder)
    written = found.statistics.get(_WRITTEN, {})  # of an older release: none
    for file, digest in files_sha256(folder / name for name in written).items():
        if digest != written[file.relative_to(folder).as_posix()][1]:
            raise DamagedFile(f"{storage.name_of(file)} is damaged: its sha256 is another. {_REMEDY}")
    return found


def find_dataset(address: str) -> PreparedData | None:
    """The dataset of an address if it is there and complete. A damaged one is removed, and that is said."""
    folder = storage.find(address, marker=_STATISTICS)
    if folder is None:
        return None
    try:
        found = check_dataset(folder)
    except DamagedFile as error:
        logger.warning(f"data: prepared again, for {error}")
        storage.remove(address)
        shutil.rmtree(folder)
        return None
    return found


def publish_dataset(address: str, statistics: dict[str, Any]) -> PreparedData:
    """The dataset that was just written to the address; with a URI, others find it from now on."""
    storage.publish(address, marker=_STATISTICS)
    return PreparedData(storage.local(address), statistics, reused=False)


class SplitWriter:
    """Writes one side of a dataset as samples come, and counts them. Memory does not grow with their number."""

    def __init__(self, folder: Path, max_seq_len: int | None) -> None:
        self._folder = folder
        self._max_seq_len = max_seq_len
        self._stream = folder.with_suffix(".arrow")
        self._writer = pa.ipc.new_stream(str(self._stream), SAMPLES)
        self._rows: list[Row] = []
        self._buffered_tokens = 0
        self.num_samples = self.num_tokens = self.num_loss_tokens = 0
        self.longest_sample, self.longest_sample_source = 0, ""
        self._dropped_samples = self._dropped_tokens = 0

    def append(self, input_ids: np.ndarray, labels: np.ndarray, source: str) -> bool:
        """Add a sample, both arrays (T,) int32; if it has more than `max_seq_len` tokens, only count it.

        Returns whether it was added.
        """
        length = len(input_ids)
        if self._max_seq_len is not None and length > self._max_seq_len:
            self._dropped_samples += 1
            self._dropped_tokens += length
            return False
        self._rows.append((input_ids, labels, source))
        self._buffered_tokens += length
        self.num_samples += 1
        self.num_tokens += length
        self.num_loss_tokens += int(np.count_nonzero(labels[1:] != IGNORE))
        if length > self.longest_sample:
            self.longest_sample, self.longest_sample_source = length, source
        if len(self._rows) >= BUFFERED_SAMPLES or self._buffered_tokens >= BUFFERED_TOKENS:
            self._flush()
        return True

    @property
    def counts(self) -> dict[str, Any]:
        """As dataset.json has them; `share_of_tokens` is that of all tokens that there were."""
        share = self._dropped_tokens / max(1, self._dropped_tokens + self.num_tokens)
        return {
            "num_tokens": self.num_tokens,
            "num_loss_tokens": self.num_loss_tokens,
            "longest_sample": self.longest_sample,
            "longest_sample_source": self.longest_sample_source,
            "dropped_as_too_long": {
                "samples": self._dropped_samples,
                "tokens": self._dropped_tokens,
                "share_of_tokens": share,
            },
        }

    def save(self) -> None:
        """Make the `datasets` folder, if there is a sample."""
        self._flush()
        self._writer.close()
        if self.num_samples:
            Dataset.from_file(str(self._stream)).save_to_disk(self._folder)
        self._stream.unlink()

    def close(self) -> None:
        """Close the file, whether or not it was saved."""
        self._writer.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        self._writer.write_batch(to_batch(self._rows))
        self._rows.clear()
        self._buffered_tokens = 0


class DatasetWriter:
    """Writes a dataset folder (one that does not exist yet): use it in a `with` block and end with `finish`."""

    def __init__(self, folder: Path, *, max_seq_len: int | None = None) -> None:
        folder.mkdir()
        self._folder = folder
        with ExitStack() as stack:
            self.train = SplitWriter(folder / "train", max_seq_len)
            stack.callback(self.train.close)
            self.validation = SplitWriter(folder / "validation", max_seq_len)
            stack.callback(self.validation.close)
            self._held_out = stack.enter_context((folder / "validation.jsonl").open("w", encoding="utf-8"))
            self._open = stack.pop_all()

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def hold_out(self, record: dict[str, Any]) -> None:
        """Add a line to `validation.jsonl`."""
        self._held_out.write(json.dumps(record, ensure_ascii=False) + "\n")

    def finish(self, provenance: dict[str, Any]) -> dict[str, Any]:
        """Save both sides and `dataset.json`: `provenance` and what was counted. Returns these statistics."""
        self._held_out.close()
        self.train.save()
        self.validation.save()
        counted = {
            "num_train_samples": self.train.num_samples,
            "num_validation_samples": self.validation.num_samples,
            **self.train.counts,
            "validation": self.validation.counts,
        }
        files = sorted(file for file in self._folder.rglob("*") if file.is_file())
        written = {
            file.relative_to(self._folder).as_posix(): [file.stat().st_size, digest]
            for file, digest in files_sha256(files).items()
        }
        statistics = provenance | counted | {_WRITTEN: written}
        write_sealed(self._folder / _STATISTICS, statistics)
        return statistics


class TokenizedSplit:
    """One side of a dataset, memory-mapped: `split[i]` reads sample i from disk, `len(split)` is their number."""

    lengths: list[int]
    """Tokens of each sample."""
    num_loss_tokens: list[int]
    """Tokens of each sample that are predicted: those with a label, but for the first one of the sample."""

    def __init__(self, dataset: Dataset | None) -> None:
        self.lengths, self.num_loss_tokens = [], []
        self._dataset = dataset  # keeps the files mapped
        self._first_of_chunk: list[int] = []
        self._chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        if dataset is None:
            return
        columns = (dataset.data.column(name).chunks for name in ("input_ids", "labels"))
        for input_ids, labels in zip(*columns, strict=True):
            # Views of the mapped file: bounds[i]:bounds[i + 1] are the tokens of the chunk's sample i.
            bounds = input_ids.offsets.to_numpy()
            values = (input_ids.values.to_numpy(), labels.values.to_numpy())
            counted = np.concatenate([[0], np.cumsum(values[1] != IGNORE)])
            first_counts = values[1][bounds[:-1]] != IGNORE
            self._first_of_chunk.append(len(self.lengths))
            self._chunks.append((bounds, *values))
            self.lengths += np.diff(bounds).tolist()
            self.num_loss_tokens += (counted[bounds[1:]] - counted[bounds[:-1]] - first_counts).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"sample {index} of {len(self.lengths)}")
        chunk = bisect_right(self._first_of_chunk, index) - 1
        bounds, input_ids, labels = self._chunks[chunk]
        position = index - self._first_of_chunk[chunk]
        start, end = bounds[position], bounds[position + 1]
        return Sample(input_ids[start:end].tolist(), labels[start:end].tolist())

    @property
    def largest_token(self) -> int:
        """The largest token id; -1 without samples."""
        return max((int(input_ids.max()) for _, input_ids, _ in self._chunks if len(input_ids)), default=-1)


def load_split(folder: str | Path, side: Literal["train", "validation"]) -> TokenizedSplit:
    """One side of a prepared dataset; empty if it holds no validation samples.

    Raises FileNotFoundError if `folder` is not a complete dataset.
    """
    open_dataset(Path(folder))
    part = Path(folder) / side
    if side == "validation" and not part.is_dir():
        return TokenizedSplit(None)
    return TokenizedSplit(load_from_disk(part))
