"""Chats -> a validated, deduplicated, split and tokenized dataset on disk (see `osft.data.dataset_folder`)."""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from osft import storage
from osft.data.dataset_folder import (
    DatasetWriter,
    PreparedData,
    SplitWriter,
    content_address,
    find_dataset,
    hash_files,
    hash_tokenizer,
    publish_dataset,
)
from osft.data.files import data_files
from osft.data.record_hashes import RECORDS_FILE, shortened, write_hashes
from osft.data.record_spool import RecordSpool
from osft.data.records import DataError, read_records, report_lines
from osft.data.split import by_prompt, check_sides, check_validation
from osft.data.tokenizing import Tokenizing
from osft.storage.atomic import atomic_path

logger = logging.getLogger(__name__)


def prepare(
    data_uri: str,
    model_path: str | Path,
    output_root: str | Path,
    *,
    max_seq_len: int = 1024,
    validation_fraction: float = 0.1,
    validation_data: str | None = None,
    hold_out_a_prompt: bool = False,
    max_train_samples: int = 0,
    max_validation_samples: int = 0,
    deduplicate: bool = True,
    unmask_messages: bool = False,
    trust_remote_code: bool = False,
    report: Callable[[str], None] = logger.info,
) -> PreparedData:
    """Prepare `data_uri` (as in `osft.data.files.data_files`) for the model at `model_path`.

    Which side of the split a record is on depends on the hash of its prompt only, so it stays there when the file is
    sorted again or grows, and one question is never on both sides. Only where a side would be empty, one prompt is
    moved to it. With a `validation_fraction` of 0 everything trains, unless `hold_out_a_prompt` asks for one to
    measure, and `validation_data` (a path as `data_uri`) may name the held-out records.

    With `deduplicate`, duplicates are dropped, and so are training records that `validation_data` holds; without it
    every line of `data_uri` is a sample, and those in `validation_data` are only counted. `unmask_messages` puts a
    loss on all messages but the system's. Samples longer than `max_seq_len` tokens are dropped and counted
    (`validation.jsonl` keeps them). A maximum of 0 uses all records; otherwise those with the smallest hashes are
    used, a sample that does not depend on their order. What is left out of training either way is not among the
    records that the dataset says it took, and so is new to a later round. Killed, and called again, it reads everything
    again and tokenizes what is left. `report` gets the lines that say what was
    found; by default they are logged. Memory holds a few hundred bytes of a record, however long it is, the disk below
    `output_root` a copy of it.

    Raises FileNotFoundError for missing paths, DataError (a ValueError, with file and line) for bad records, for a
    side of the split that remains empty, and ValueError for settings out of range.
    """
    if not isinstance(max_seq_len, int) or max_seq_len < 2:
        raise ValueError(f"max_seq_len must be an integer of at least 2, got {max_seq_len!r}")
    if min(max_train_samples, max_validation_samples) < 0:
        raise ValueError("max_train_samples and max_validation_samples must be 0 (all) or more")
    check_validation(validation_fraction, validation_data)

    files = hash_files(data_files(data_uri))
    validation_files = hash_files(data_files(validation_data)) if validation_data else {}
    settings = {
        "max_seq_len": max_seq_len,
        "validation_fraction": validation_fraction,
        "hold_out_a_prompt": hold_out_a_prompt,
        "max_train_samples": max_train_samples,
        "max_validation_samples": max_validation_samples,
        "deduplicate": deduplicate,
        "unmask_messages": unmask_messages,
    }
    contents = [sorted(files.values()), sorted(validation_files.values())]
    address = content_address(output_root, "chats", contents, hash_tokenizer(model_path), settings)
    if found := find_dataset(address):
        report(f"data: reused {address}")
        return found
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)

    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_path(storage.local(address)))
        records = stack.enter_context(closing(_read(data_uri, temporary.parent, counts)))
        distinct = _in_order(records, deduplicate)
        num_duplicates = len(records) - len(distinct)
        num_also_held_out = 0
        if validation_data:
            others = stack.enter_context(closing(_read(validation_data, temporary.parent, counts)))
            held_out = _in_order(others, deduplicate)
            is_held_out = np.isin(records.content_hashes[distinct], others.content_hashes)
            num_also_held_out = int(is_held_out.sum())
            train = distinct[~is_held_out] if deduplicate else distinct
            if not len(train):
                raise DataError(
                    f"{data_uri}: validation_data={validation_data!r} holds all of its records. Give others"
                )
        else:
            others = records
            prompts = records.prompt_hashes[distinct]
            if hold_out_a_prompt and len(np.unique(prompts)) < 2:
                raise DataError(
                    f"{data_uri}: the records have one prompt in all, and one to measure is needed. Give more"
                )
            is_held_out = by_prompt(prompts, validation_fraction, at_least_one=hold_out_a_prompt)
            train, held_out = distinct[~is_held_out], distinct[is_held_out]
            unit = "distinct records" if deduplicate else "records"
            check_sides(data_uri, unit, len(train), len(held_out), validation_fraction)
        num_left_out = len(train) + len(held_out)
        train, held_out = train[: max_train_samples or None], held_out[: max_validation_samples or None]
        num_left_out -= len(train) + len(held_out)

        writer = stack.enter_context(DatasetWriter(temporary, max_seq_len=max_seq_len))
        kept = _kept(address)
        stack.enter_context(_removed_unless_killed(kept))
        work = Tokenizing(records, tokenizer, unmask_messages, kept / "training")
        learned = _write(work, train, writer.train, counts, description="training")
        work = Tokenizing(others, tokenizer, unmask_messages, kept / "validation")
        _write(work, held_out, writer.validation, counts, description="validation", hold_out=writer.hold_out)
        for side, uri, split in (
            ("training", data_uri, writer.train),
            ("validation", validation_data, writer.validation),
        ):
            if uri and not split.num_samples:
                raise DataError(f"{uri}: every {side} sample is longer than max_seq_len={max_seq_len} tokens. Raise it")
        taken = np.concatenate([records.content_hashes[learned], others.content_hashes[held_out]])
        write_hashes(temporary / RECORDS_FILE, shortened(taken))
        statistics = writer.finish(
            {
                "kind": "chats",
                "data_uri": data_uri,
                "files": files,
                "validation_data": validation_data,
                "validation_files": validation_files,
                "settings": settings,
                "num_records": len(records),
                "num_duplicates": num_duplicates,
                "num_also_held_out": num_also_held_out,
                "num_held_out_records": len(held_out),
                "conversions": dict(counts),
                "num_over_maximum": num_left_out,
            }
        )
    dropped = statistics["dropped_as_too_long"]
    overlap = ""
    if num_also_held_out:
        done = "dropped" if deduplicate else "kept, though they are no measure then"
        overlap = f"; {num_also_held_out} training records that validation_data holds were {done}"
    if num_left_out:
        overlap += f"; {num_left_out} records beyond max_train_samples or max_validation_samples were left out"
    report(
        f"data: {statistics['num_train_samples']} training samples ({statistics['num_tokens']} tokens, "
        f"{statistics['num_loss_tokens']} with loss), {len(held_out)} held out; dropped {num_duplicates} duplicates "
        f"and {dropped['samples']} samples longer than {max_seq_len} tokens ({dropped['share_of_tokens']:.1%} of all "
        f"tokens){overlap}"
    )
    for line in report_lines(counts):
        report(f"data: {line}")
    return publish_dataset(address, statistics)


def _kept(address: str) -> Path:
    """Where what is tokenized waits for the rest: a name that nothing reads, and the same for the next attempt."""
    folder = storage.local(address)
    return folder.with_name(f"{folder.name}.incomplete-{folder.name[:8]}")


@contextmanager
def _removed_unless_killed(folder: Path) -> Iterator[None]:
    """Remove the folder when it is of no use any more: at the end, and where the next attempt would fail alike."""
    try:
        yield
    except BrokenProcessPool:
        raise
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _read(uri: str, folder: Path, counts: Counter[str]) -> RecordSpool:
    read = read_records(uri, counts=counts)
    return RecordSpool(tqdm(read, desc="read", unit="record", mininterval=2.0, delay=5.0), folder)


def _in_order(records: RecordSpool, deduplicate: bool) -> np.ndarray:
    """The numbers of the records in the order of their content; of equal ones only the first, with `deduplicate`."""
    order = np.argsort(records.content_hashes, kind="stable")
    if not deduplicate:
        return order
    ordered = records.content_hashes[order]
    return order[np.concatenate([np.ones(min(1, len(order)), bool), ordered[1:] != ordered[:-1]])]


def _write(
    tokenizing: Tokenizing,
    numbers: np.ndarray,
    split: SplitWriter,
    counts: Counter[str],
    *,
    description: str,
    hold_out: Callable[[dict[str, Any]], None] | None = None,
) -> np.ndarray:
    """Tokenize and write the records of a side; `description` is its name. Returns the numbers of those not too long.

    `hold_out` is called with each record.
    """
    kept: list[int] = []
    title = f"tokenize {description}"
    with tqdm(total=len(numbers), desc=title, unit="sample", mininterval=2.0, disable=not len(numbers)) as progress:
        for chunk in tokenizing.chunks(numbers.tolist()):
            for number, sample in zip(chunk.numbers, chunk.samples, strict=True):
                if split.append(*sample):
                    kept.append(number)
            if hold_out:
                for record in tokenizing.spool.read(chunk.numbers):
                    hold_out(record.to_dict())
            counts.update(chunk.replaced_roles)
            progress.update(len(chunk.samples))
    return np.array(kept, np.int64)
