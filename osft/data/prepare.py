"""Raw records -> a validated, deduplicated, split and tokenized dataset on disk.

    <folder>/train/             a `datasets` folder: input_ids, labels, source
    <folder>/validation.jsonl   the held-out records, as they came
    <folder>/dataset.json       statistics and provenance

The folder's name is the hash of everything that determines it: the files' bytes, the tokenizer and the settings.
A second run with the same input reuses it; a run that dies half-way leaves nothing under that name.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from osft.atomic import atomic_path
from osft.data.chat import IGNORE, tokenize
from osft.data.records import DataError, Record, data_files, read_records

FORMAT = 1
"""Part of every dataset's hash: raise it when the preparation changes."""


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


def prepare(
    data_uri: str,
    model_path: str | Path,
    output_root: str | Path,
    *,
    max_seq_len: int = 1024,
    validation_fraction: float = 0.1,
    max_train_samples: int = 0,
    max_validation_samples: int = 0,
    trust_remote_code: bool = False,
    report: Callable[[str], None] = print,
) -> PreparedData:
    """Prepare `data_uri` (a .jsonl file, a folder or a glob) for the model at `model_path`.

    Duplicates are dropped. Which side of the split a record is on depends on the hash of its prompt only, so it
    stays there when the file is sorted anew or grows, and one question is never on both sides. Samples longer than
    `max_seq_len` tokens are dropped and counted. A maximum of 0 uses all records; otherwise those with the smallest
    hashes are used, a sample that does not depend on their order.

    Raises FileNotFoundError for missing paths, DataError (a ValueError, with file and line) for bad records, for a
    side of the split that remains empty, and ValueError for settings out of range.
    """
    if not isinstance(max_seq_len, int) or max_seq_len < 2:
        raise ValueError(f"max_seq_len must be an integer of at least 2, got {max_seq_len!r}")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in (0, 1), got {validation_fraction!r}")
    if min(max_train_samples, max_validation_samples) < 0:
        raise ValueError("max_train_samples and max_validation_samples must be 0 (all) or more")

    files = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in data_files(data_uri)}
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    settings = {
        "max_seq_len": max_seq_len,
        "validation_fraction": validation_fraction,
        "max_train_samples": max_train_samples,
        "max_validation_samples": max_validation_samples,
    }
    identity = [FORMAT, sorted(files.values()), _tokenizer_hash(Path(model_path)), settings]
    folder = Path(output_root) / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    if (folder / "dataset.json").is_file():
        report(f"data: reused {folder}")
        return PreparedData(folder, json.loads((folder / "dataset.json").read_text(encoding="utf-8")), reused=True)

    unique: dict[str, Record] = {}
    num_records = 0
    for record in read_records(data_uri):
        num_records += 1
        unique.setdefault(record.content_hash, record)
    by_hash = [unique[key] for key in sorted(unique)]
    held_out = [r for r in by_hash if int(r.prompt_hash[:8], 16) < validation_fraction * 2**32]
    held_out_hashes = {r.content_hash for r in held_out}
    train = [r for r in by_hash if r.content_hash not in held_out_hashes]
    for side, found in (("training", train), ("validation", held_out)):
        if not found:
            raise DataError(
                f"{data_uri}: the {len(unique)} distinct records leave the {side} side of the split empty "
                f"(validation_fraction={validation_fraction}). Give more data or another fraction"
            )

    columns, dropped = _tokenize_all(train, tokenizer, max_seq_len, max_train_samples)
    if not columns["source"]:
        raise DataError(f"{data_uri}: every training sample is longer than max_seq_len={max_seq_len} tokens. Raise it")
    held_out = held_out[: max_validation_samples or None]
    lengths = [len(tokens) for tokens in columns["input_ids"]]
    statistics = {
        "data_uri": data_uri,
        "files": files,
        "settings": settings,
        "num_records": num_records,
        "num_duplicates": num_records - len(unique),
        "num_train_samples": len(lengths),
        "num_validation_samples": len(held_out),
        "num_tokens": sum(lengths),
        "num_loss_tokens": int(sum((labels[1:] != IGNORE).sum() for labels in columns["labels"])),
        "longest_sample": max(lengths),
        "dropped_as_too_long": dropped,
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        token_list = List(Value("int32"))
        features = Features({"input_ids": token_list, "labels": token_list, "source": Value("string")})
        Dataset.from_dict(columns, features=features).save_to_disk(temporary / "train")
        with (temporary / "validation.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record.to_dict(), ensure_ascii=False) + "\n" for record in held_out)
        (temporary / "dataset.json").write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
    report(
        f"data: {len(lengths)} training samples ({sum(lengths)} tokens, {statistics['num_loss_tokens']} with loss), "
        f"{len(held_out)} held out; dropped {statistics['num_duplicates']} duplicates and "
        f"{dropped['samples']} samples longer than {max_seq_len} tokens"
    )
    return PreparedData(folder, statistics, reused=False)


def _tokenize_all(
    records: list[Record], tokenizer: PreTrainedTokenizerBase, max_seq_len: int, max_samples: int
) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """Columns of the first `max_samples` records that fit, and how much did not."""
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "source": []}
    dropped = {"samples": 0, "tokens": 0}
    for record in tqdm(records[: max_samples or None], desc="tokenize", unit="sample", mininterval=2.0):
        sample = tokenize(record, tokenizer)
        if len(sample.input_ids) > max_seq_len:
            dropped["samples"] += 1
            dropped["tokens"] += len(sample.input_ids)
            continue
        columns["input_ids"].append(np.array(sample.input_ids, dtype=np.int32))
        columns["labels"].append(np.array(sample.labels, dtype=np.int32))
        columns["source"].append(record.source)
    return columns, dropped


def _tokenizer_hash(model_path: Path) -> str:
    """Hash of the files that determine tokens and loss masks."""
    digest = hashlib.sha256()
    for file in sorted(model_path.iterdir()):
        if file.name.startswith(("tokenizer", "chat_template", "vocab", "merges", "special_tokens", "added_tokens")):
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
