"""Data that is tokenized already -> a dataset folder (see `osft.data.dataset_folder`)."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_from_disk
from tqdm import tqdm

from osft import storage
from osft.atomic import atomic_path
from osft.data.chat import IGNORE
from osft.data.dataset_folder import (
    DatasetWriter,
    PreparedData,
    content_address,
    find_dataset,
    hash_files,
    load_split,
    open_dataset,
    publish_dataset,
)
from osft.data.files import data_files
from osft.data.records import DataError
from osft.data.rows import read_file
from osft.data.split import check_sides, check_validation, is_held_out

COLUMNS = ("input_ids", "labels", "len", "num_loss_counted_tokens")
"""What is read; the last two, as mini-trainer writes them, are optional."""


def import_processed(
    data_path: str,
    output_root: str | Path,
    *,
    max_seq_len: int,
    vocabulary_size: int,
    validation_fraction: float = 0.0,
    validation_data: str | None = None,
    report: Callable[[str], None] = print,
) -> PreparedData:
    """Check tokenized records and store them for training.

    `data_path` is a .jsonl or .parquet file, a folder or glob of them, or a folder that `datasets` saved. A record
    has `input_ids` (token ids below `vocabulary_size`) and as many `labels` (-100 where there is no loss, else a
    token id; not shifted). `len` and `num_loss_counted_tokens`, where they are there, must agree with them. Samples
    longer than `max_seq_len` tokens are dropped and counted. Which side of the split a sample is on depends on the
    hash of its tokens.

    A folder that this package prepared is returned as it is, with the held-out side that it has.

    Raises FileNotFoundError for missing paths, DataError (a ValueError, with file and line, or file and row) for bad
    records or a side that remains empty, and ValueError for settings out of range.
    """
    for name, value, least in (("max_seq_len", max_seq_len, 2), ("vocabulary_size", vocabulary_size, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    check_validation(validation_fraction, validation_data)
    given = storage.fetch(data_path)
    if (given / "dataset.json").is_file() and (given / "train").is_dir():
        if validation_fraction or validation_data:
            raise ValueError(
                f"{data_path} is a prepared dataset with a held-out side of its own. Leave validation_fraction and "
                "validation_data out, or prepare the raw data anew with them"
            )
        for side in ("train", "validation"):
            largest = load_split(given, side).largest_token
            if largest >= vocabulary_size:
                problem = f"its {side} side has token {largest}, but the model's vocabulary has {vocabulary_size}"
                raise DataError(f"{data_path}: {problem}. It was prepared for another model; prepare it anew")
        report(f"data: reused {data_path}")
        return open_dataset(given)

    files = hash_files(_files(data_path))
    validation_files = hash_files(_files(validation_data)) if validation_data else {}
    settings = {
        "max_seq_len": max_seq_len,
        "vocabulary_size": vocabulary_size,
        "validation_fraction": validation_fraction,
    }
    contents = [list(files.values()), list(validation_files.values())]
    address = content_address(output_root, "processed", contents, settings)
    if found := find_dataset(address, report):
        return found

    num_records = num_held_out = 0
    with atomic_path(storage.local(address)) as temporary, DatasetWriter(temporary, max_seq_len=max_seq_len) as writer:
        for source, row in tqdm(read_rows(data_path), desc="check", unit="sample", mininterval=2.0):
            input_ids, labels = check_row(row, source, vocabulary_size)
            num_records += 1
            is_out = validation_fraction > 0 and is_held_out(
                hashlib.sha256(input_ids.tobytes()).hexdigest(), validation_fraction
            )
            num_held_out += is_out
            (writer.validation if is_out else writer.train).append(input_ids, labels, source)
        check_sides(data_path, "records", num_records - num_held_out, num_held_out, validation_fraction)
        if validation_data:
            for source, row in read_rows(validation_data):
                num_held_out += 1
                writer.validation.append(*check_row(row, source, vocabulary_size), source)
        for side, uri, split in (
            ("training", data_path, writer.train),
            ("validation", validation_data, writer.validation),
        ):
            if uri and not split.num_samples:
                raise DataError(f"{uri}: every {side} sample is longer than max_seq_len={max_seq_len} tokens. Raise it")
        statistics = writer.finish(
            {
                "kind": "processed",
                "data_uri": data_path,
                "files": files,
                "validation_data": validation_data,
                "validation_files": validation_files,
                "settings": settings,
                "num_records": num_records,
                "num_duplicates": 0,
                "num_held_out_records": num_held_out,
            }
        )
    dropped = statistics["dropped_as_too_long"]
    report(
        f"data: {statistics['num_train_samples']} training samples ({statistics['num_tokens']} tokens, "
        f"{statistics['num_loss_tokens']} with loss), {statistics['num_validation_samples']} held out; dropped "
        f"{dropped['samples']} samples longer than {max_seq_len} tokens ({dropped['share_of_tokens']:.1%} of all "
        "tokens)"
    )
    return publish_dataset(address, statistics)


def _is_datasets_folder(uri: str) -> bool:
    folder = storage.fetch(uri)
    if (folder / "dataset_dict.json").is_file():
        raise DataError(f"{uri} holds several datasets. Give the folder of one of them, for example {uri}/train")
    return (folder / "state.json").is_file()


def _files(uri: str) -> list[Path]:
    """The files that hold the records, in their order. Raises FileNotFoundError if there is none."""
    if _is_datasets_folder(uri):
        return sorted(storage.fetch(uri).glob("*.arrow"))
    path = storage.fetch(uri)
    if path.is_dir() and not any(path.glob("*.jsonl")) and any(path.glob("*.parquet")):
        return sorted(path.glob("*.parquet"))
    return data_files(uri)


def read_rows(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Source and columns of each record."""
    if _is_datasets_folder(uri):
        tables = load_from_disk(storage.fetch(uri)).with_format("arrow").iter(batch_size=1000)
        yield from _table_rows(uri, tables)
        return
    for file in _files(uri):
        if file.suffix == ".parquet":
            try:
                yield from _table_rows(storage.name_of(file), pq.ParquetFile(file).iter_batches(batch_size=1000))
            except pa.ArrowInvalid as error:
                raise DataError(f"{storage.name_of(file)} is not a Parquet file: {error}") from None
        else:
            yield from read_file(file)


def _table_rows(name: str, tables: Iterator[pa.Table | pa.RecordBatch]) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for table in tables:
        present = [column for column in COLUMNS if column in table.schema.names]
        kept = table.select(present) if {"input_ids", "labels"} <= set(present) else table
        for row in kept.to_pylist():
            number += 1
            yield f"{name}: row {number}", row
    if not number:
        raise DataError(f"{name} holds no record. Give at least one row")


def check_row(row: dict[str, Any], source: str, vocabulary_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The record's tokens and labels, both (T,) int32. Raises DataError that names `source`."""
    missing = [column for column in ("input_ids", "labels") if column not in row]
    if missing:
        columns = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{source}: a processed record needs {' and '.join(missing)}; its columns are {columns}")
    input_ids = _integers(row["input_ids"], f"{source}: input_ids")
    labels = _integers(row["labels"], f"{source}: labels")
    if len(input_ids) != len(labels):
        raise DataError(f"{source}: there are {len(input_ids)} input_ids, but {len(labels)} labels")
    for name, values, allowed in (("input_ids", input_ids, False), ("labels", labels, labels == IGNORE)):
        outside = np.flatnonzero(((values < 0) | (values >= vocabulary_size)) & ~np.array(allowed))
        if len(outside):
            at = outside[0]
            wanted = f"a token of this model, 0 to {vocabulary_size - 1}" + (
                f", or {IGNORE}" if name == "labels" else ""
            )
            raise DataError(f"{source}: {name}[{at}] must be {wanted}; got {values[at]}")
    in_loss = labels != IGNORE
    if not in_loss[1:].any():
        raise DataError(f"{source}: no label after the first one counts, so there is nothing to learn. Drop the record")
    # The first token is never predicted; mini-trainer counts it all the same where it has a label.
    lengths = {"len": (len(input_ids),), "num_loss_counted_tokens": (int(in_loss.sum()), int(in_loss[1:].sum()))}
    for name, real in lengths.items():
        if row.get(name) is not None and row[name] not in real:
            raise DataError(f"{source}: {name} is {row[name]!r}, but the record has {max(real)}")
    return input_ids.astype(np.int32), labels.astype(np.int32)


def _integers(values: Any, name: str) -> np.ndarray:
    """A list of integers as (T,) int64."""
    if not isinstance(values, list) or not values:
        raise DataError(f"{name} must be a non-empty list of integers; got {values!r:.80}")
    if set(map(type, values)) != {int}:
        position, value = next((i, value) for i, value in enumerate(values) if type(value) is not int)
        raise DataError(f"{name}[{position}] must be an integer; got {value!r:.80}")
    try:
        return np.array(values, np.int64)
    except OverflowError:
        raise DataError(f"{name} has a number that no token can have; got {max(values, key=abs)}") from None
