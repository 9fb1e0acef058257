"""Chats -> a validated, deduplicated, split and tokenized dataset on disk (see `osft.data.dataset_folder`)."""

import logging
from collections import Counter
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from osft import storage
from osft.data.chat import tokenize
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
from osft.data.record_hashes import HASH, RECORDS_FILE, short_hash, write_hashes
from osft.data.records import DataError, Record, read_records, report_lines
from osft.data.split import check_sides, check_validation, held_out_prompts
from osft.data.template_keys import replaced_roles
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
    records that the dataset says it took, and so is new to a later round. `report` gets the lines that say what was
    found; by default they are logged.

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
    records, num_records = _read(data_uri, deduplicate, counts)
    num_duplicates = num_records - len(records)
    num_also_held_out = 0
    if validation_data:
        held_out = _read(validation_data, deduplicate, counts)[0]
        hashes = {content_hash for content_hash, _ in held_out}
        train = [entry for entry in records if entry[0] not in hashes]
        num_also_held_out = len(records) - len(train)
        if not deduplicate:
            train = records
        if not train:
            raise DataError(f"{data_uri}: validation_data={validation_data!r} holds all of its records. Give others")
    else:
        prompts = [record.prompt_hash for _, record in records]
        chosen = held_out_prompts(prompts, validation_fraction, at_least_one=hold_out_a_prompt)
        if hold_out_a_prompt and len(set(prompts)) < 2:
            raise DataError(f"{data_uri}: the records have one prompt in all, and one to measure is needed. Give more")
        on_side = [prompt in chosen for prompt in prompts]
        held_out = [entry for entry, out in zip(records, on_side, strict=True) if out]
        train = [entry for entry, out in zip(records, on_side, strict=True) if not out]
        unit = "distinct records" if deduplicate else "records"
        check_sides(data_uri, unit, len(train), len(held_out), validation_fraction)
    num_left_out = len(train) + len(held_out)
    train, held_out = train[: max_train_samples or None], held_out[: max_validation_samples or None]
    num_left_out -= len(train) + len(held_out)

    with atomic_path(storage.local(address)) as temporary, DatasetWriter(temporary, max_seq_len=max_seq_len) as writer:
        sides = [("training", data_uri, train, writer.train)]
        sides += [("validation", validation_data or data_uri, held_out, writer.validation)]
        template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
        counts.update(name for _, record in (*train, *held_out) for name in replaced_roles(template, record))
        learned: list[str] = []
        for side, uri, entries, split in sides:
            kept = _tokenize_all(entries, tokenizer, split, unmask_messages=unmask_messages, description=side)
            learned += kept if side == "training" else []
            if not split.num_samples and (side == "training" or validation_data):
                raise DataError(f"{uri}: every {side} sample is longer than max_seq_len={max_seq_len} tokens. Raise it")
        for _, record in held_out:
            writer.hold_out(record.to_dict())
        taken = [*learned, *(content_hash for content_hash, _ in held_out)]
        write_hashes(temporary / RECORDS_FILE, np.array(list(map(short_hash, taken)), HASH))
        statistics = writer.finish(
            {
                "kind": "chats",
                "data_uri": data_uri,
                "files": files,
                "validation_data": validation_data,
                "validation_files": validation_files,
                "settings": settings,
                "num_records": num_records,
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


def _read(uri: str, deduplicate: bool, counts: Counter[str]) -> tuple[list[tuple[str, Record]], int]:
    """Content hash and record, in the order of the hashes; and how many records there were with the duplicates."""
    read = read_records(uri, counts=counts)
    entries = sorted(((record.content_hash, record) for record in read), key=itemgetter(0))
    if not deduplicate:
        return entries, len(entries)
    distinct: dict[str, Record] = {}
    for content_hash, record in entries:
        distinct.setdefault(content_hash, record)
    return list(distinct.items()), len(entries)


def _tokenize_all(
    entries: list[tuple[str, Record]],
    tokenizer: PreTrainedTokenizerBase,
    split: SplitWriter,
    *,
    unmask_messages: bool,
    description: str,
) -> list[str]:
    """Tokenize the records of a side; `description` is its name. Returns the content hashes of those not too long."""
    kept = []
    title = f"tokenize {description}"
    for content_hash, record in tqdm(entries, desc=title, unit="sample", mininterval=2.0, disable=not entries):
        sample = tokenize(record, tokenizer, unmask_messages=unmask_messages)
        if split.append(np.array(sample.input_ids, np.int32), np.array(sample.labels, np.int32), record.source):
            kept.append(content_hash)
    return kept
