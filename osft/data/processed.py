"""Data that is tokenized already -> a dataset folder (see `osft.data.dataset_folder`)."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from osft import storage
from osft.data import rows
from osft.data.dataset_folder import (
    DatasetWriter,
    PreparedData,
    check_dataset,
    content_address,
    find_dataset,
    hash_files,
    is_dataset,
    load_split,
    publish_dataset,
)
from osft.data.files import data_files
from osft.data.processed_row import COLUMNS, check_columns, check_row
from osft.data.records import DataError
from osft.data.split import check_sides, check_validation, is_held_out
from osft.storage.atomic import atomic_path

logger = logging.getLogger(__name__)


def import_processed(
    data_path: str,
    output_root: str | Path,
    *,
    max_seq_len: int,
    vocabulary_size: int,
    validation_fraction: float = 0.0,
    validation_data: str | None = None,
) -> PreparedData:
    """Check tokenized records and store them for training.

    `data_path` is data of any format (`osft.data.rows`), a folder that `datasets` saved among them. A record has
    `input_ids` (token ids below `vocabulary_size`) and as many `labels` (-100 where there is no loss, else a token id;
    not shifted). What `attention_mask` says is padding, before or after the sample, is left out. `position_ids`,
    `token_type_ids`, `len` and `num_loss_counted_tokens`, where they are there, must agree with that; other columns
    are named in the log and not read. Samples longer than `max_seq_len` tokens are dropped and counted. Which side
    of the split a sample is on depends on the hash of its tokens.

    A folder that this package prepared is returned as it is, with the held-out side that it has.

    Raises FileNotFoundError for missing paths, DataError (a ValueError, with file and line, or file and row) for bad
    records or a side that remains empty, and ValueError for settings out of range.
    """
    for name, value, least in (("max_seq_len", max_seq_len, 2), ("vocabulary_size", vocabulary_size, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    check_validation(validation_fraction, validation_data)
    if is_dataset(data_path):
        given = storage.fetch(data_path)
        if validation_fraction or validation_data:
            raise ValueError(
                f"{data_path} is a prepared dataset with a held-out side of its own. Leave validation_fraction and "
                "validation_data out, or prepare the raw data again with them"
            )
        for side in ("train", "validation"):
            largest = load_split(given, side).largest_token
            if largest >= vocabulary_size:
                problem = f"its {side} side has token {largest}, but the model's vocabulary has {vocabulary_size}"
                raise DataError(f"{data_path}: {problem}. It was prepared for another model; prepare it again")
        logger.info(f"data: reused {data_path}")
        return check_dataset(given)

    files = hash_files(data_files(data_path))
    validation_files = hash_files(data_files(validation_data)) if validation_data else {}
    settings = {
        "max_seq_len": max_seq_len,
        "vocabulary_size": vocabulary_size,
        "validation_fraction": validation_fraction,
    }
    contents = [list(files.values()), list(validation_files.values())]
    address = content_address(output_root, "processed", contents, settings)
    if found := find_dataset(address):
        logger.info(f"data: reused {address}")
        return found

    num_records = num_held_out = 0
    counts, unused = Counter[str](), set[str]()
    with atomic_path(storage.local(address)) as temporary, DatasetWriter(temporary, max_seq_len=max_seq_len) as writer:
        for source, row in tqdm(read_rows(data_path, unused), desc="check", unit="sample", mininterval=2.0):
            input_ids, labels = check_row(row, source, vocabulary_size, counts)
            num_records += 1
            is_out = validation_fraction > 0 and is_held_out(
                hashlib.sha256(input_ids.tobytes()).hexdigest(), validation_fraction
            )
            num_held_out += is_out
            (writer.validation if is_out else writer.train).append(input_ids, labels, source)
        check_sides(data_path, "records", num_records - num_held_out, num_held_out, validation_fraction)
        if validation_data:
            for source, row in read_rows(validation_data, unused):
                num_held_out += 1
                writer.validation.append(*check_row(row, source, vocabulary_size, counts), source)
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
                "left_out": {what: number for what, number in counts.items() if number},
                "unused_columns": sorted(unused),
            }
        )
    dropped = statistics["dropped_as_too_long"]
    logger.info(
        f"data: {statistics['num_train_samples']} training samples ({statistics['num_tokens']} tokens, "
        f"{statistics['num_loss_tokens']} with loss), {statistics['num_validation_samples']} held out; dropped "
        f"{dropped['samples']} samples longer than {max_seq_len} tokens ({dropped['share_of_tokens']:.1%} of all "
        "tokens)"
    )
    for what, number in statistics["left_out"].items():
        logger.info(f"data: {number} {what}")
    if unused:
        logger.info(f"data: these columns are not used: {', '.join(sorted(unused))}")
    return publish_dataset(address, statistics)


def read_rows(uri: str, unused: set[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Source and columns of each record, of any format that `osft.data.rows` reads.

    Of Parquet and Arrow files only the columns that are used are read. To `unused` are added the names of the others.
    """
    unused = set() if unused is None else unused
    for file in data_files(uri):
        names = _arrow_columns(file)
        if names is not None:
            check_columns(names, storage.name_of(file))
            unused.update(set(names) - set(COLUMNS))
        for source, row in rows.read_file(file, COLUMNS):
            unused.update(row.keys() - set(COLUMNS))
            yield source, row


def _arrow_columns(file: Path) -> list[str] | None:
    """Names of the columns of a Parquet or Arrow file; None for other files, and for one that is damaged.

    Raises DataError for numbers in a type that has not all token ids.
    """
    with file.open("rb") as content:
        head = content.read(6)
    try:
        if head.startswith(b"PAR1"):
            schema = pq.read_schema(file)
        elif head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
            with pa.memory_map(str(file)) as mapped:
                schema = (pa.ipc.open_file if head == b"ARROW1" else pa.ipc.open_stream)(mapped).schema
        else:
            return None
    except (pa.ArrowInvalid, OSError):
        return None  # reading it says what is wrong
    for field in schema:
        kind = getattr(field.type, "value_type", field.type)
        if field.name in ("input_ids", "labels") and pa.types.is_float16(kind):
            raise DataError(
                f"{storage.name_of(file)}: {field.name} is of the type float16, which rounds numbers above 2048. "
                "Store token ids as integers"
            )
    return list(schema.names)
