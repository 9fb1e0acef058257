"""How many samples and tokens a training run reads, without preparing its data."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from osft import storage
from osft.data.chat import IGNORE, Sample, tokenize_all
from osft.data.record_spool import DIGEST
from osft.data.records import DataError, read_records
from osft.data.rows import read_rows
from osft.data.split import by_prompt, is_held_out
from osft.settings.training import TrainConfig
from osft.subspace.preflight import TOKENIZER_FILES

MAX_COUNTED = 1000
"""Up to so many records are tokenized; of more, so many that are spread evenly."""


@dataclass(frozen=True, slots=True)
class DataCounts:
    """One epoch of the training set."""

    samples: int
    """With token counts: those that are trained on. Without: all records, none being known to be too long."""
    tokens: int | None
    """None where the model's folder has no tokenizer."""
    loss_tokens: int | None
    dropped_samples: int | None
    """Longer than max_seq_len."""
    dropped_tokens: int | None
    """In these samples; with is_pretraining, after the last whole block."""
    largest_loss_share: float
    """Of the tokens of any sample, the largest share that has a loss."""
    counted: int
    """Records that were tokenized, or read as tokens."""
    exact: bool
    """False if the numbers were extrapolated from those that were counted, or are upper bounds."""


def count_data(config: TrainConfig, folder: Path) -> DataCounts:
    """Count the training data of `config` with the tokenizer in the model's `folder`. Writes nothing.

    Raises FileNotFoundError and DataError as the preparation does, and ValueError for a sample that is longer than
    `max_tokens_per_gpu`.
    """
    counts = _count_new(config, folder)
    return _with_replay(counts, config, folder) if config.replay_data else counts


def _with_replay(new: DataCounts, config: TrainConfig, folder: Path) -> DataCounts:
    """The counts with those of the samples that are replayed, which are as long as the earlier data's are on average.

    What the earlier data holds twice, or what is held out of the new data, is not known to be left out.
    """
    from osft.data.dataset_folder import is_dataset

    wanted = round(new.samples * config.replay_ratio / (1 - config.replay_ratio))
    earlier = []
    for path in config.replay_data or []:
        settings: dict[str, Any] = {"data_path": path, "replay_ratio": 0.0, "replay_data": None}
        if is_dataset(path):
            settings |= {"use_processed_dataset": True, "is_pretraining": False, "block_size": None}
        earlier.append(_count_new(config.replace(**settings), folder))
    available = sum(one.samples for one in earlier)
    share = min(1.0, wanted / available)

    def total(name: str) -> int | None:
        parts = [getattr(one, name) for one in earlier]
        before = getattr(new, name)
        return None if before is None or None in parts else before + round(share * sum(parts))

    return replace(
        new,
        samples=new.samples + min(wanted, available),
        tokens=total("tokens"),
        loss_tokens=total("loss_tokens"),
        largest_loss_share=max(one.largest_loss_share for one in (new, *earlier)),
        counted=sum(one.counted for one in (new, *earlier)),
        exact=False,
    )


def _count_new(config: TrainConfig, folder: Path) -> DataCounts:
    """Counts of what stands in data_path."""
    if config.use_processed_dataset:
        statistics = storage.fetch(config.data_path) / "dataset.json"
        if statistics.is_file():
            return _from_statistics(config, statistics)
        sizes = _processed(config, folder)
        return _count(config, sizes, total=len(sizes))
    if not any(file.name.startswith(TOKENIZER_FILES) for file in folder.iterdir()):
        return _without_tokenizer(config)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    if config.is_pretraining:
        return _count_documents(config, tokenizer)
    # Read twice rather than kept, here and below: the records may not fit into memory.
    hashes = b"".join(bytes.fromhex(record.prompt_hash) for record in read_records(config.data_path))
    (positions,) = (~by_prompt(np.frombuffer(hashes, DIGEST), config.validation_split)).nonzero()
    if not len(positions):
        raise DataError(f"{config.data_path}: validation_split={config.validation_split} leaves no training sample")
    chosen = set(positions[_spread(len(positions))].tolist())
    records = [record for position, record in enumerate(read_records(config.data_path)) if position in chosen]
    samples = tokenize_all(records, tokenizer, unmask_messages=config.unmask_messages)
    sizes = [_Size.of(sample, record.source) for sample, record in zip(samples, records, strict=True)]
    return _count(config, sizes, total=len(positions))


class _Size(NamedTuple):
    """Of a sample."""

    source: str
    tokens: int
    loss_tokens: int

    @classmethod
    def of(cls, sample: Sample, source: str) -> "_Size":
        return cls(source, len(sample.input_ids), sample.num_loss_tokens)


def _spread(count: int) -> Sequence[int]:
    """All positions, or MAX_COUNTED of them at equal distances."""
    if count <= MAX_COUNTED:
        return range(count)
    return [position * count // MAX_COUNTED for position in range(MAX_COUNTED)]


def _count(config: TrainConfig, samples: Sequence[_Size], *, total: int) -> DataCounts:
    """Counts of `total` samples, of which some or all are given."""
    kept, dropped_tokens = [], 0
    for source, length, loss_tokens in samples:
        if length > config.max_seq_len:
            dropped_tokens += length
        elif length > config.max_tokens_per_gpu:
            raise ValueError(
                f"{source}: the sample has {length} tokens, more than max_tokens_per_gpu={config.max_tokens_per_gpu}. "
                "Raise that, or lower max_seq_len, which drops longer samples"
            )
        else:
            kept.append((length, loss_tokens))
    if not kept:
        raise DataError(f"{config.data_path}: every sample is longer than max_seq_len={config.max_seq_len}. Raise it")
    scale = total / len(samples)
    return DataCounts(
        samples=round(scale * len(kept)),
        tokens=round(scale * sum(length for length, _ in kept)),
        loss_tokens=round(scale * sum(loss for _, loss in kept)),
        dropped_samples=round(scale * (len(samples) - len(kept))),
        dropped_tokens=round(scale * dropped_tokens),
        largest_loss_share=max(loss / length for length, loss in kept),
        counted=len(samples),
        exact=len(samples) == total,
    )


def _processed(config: TrainConfig, folder: Path) -> list[_Size]:
    """Of all records that are tokenized already, checked as the preparation does."""
    from osft.data.processed import read_rows
    from osft.data.processed_row import check_row
    from osft.training.prepare import vocabulary_size

    vocabulary = vocabulary_size(folder, trust_remote_code=config.trust_remote_code)
    sizes = []
    for source, row in read_rows(config.data_path):
        input_ids, labels = check_row(row, source, vocabulary)
        if not is_held_out(hashlib.sha256(input_ids.tobytes()).hexdigest(), config.validation_split):
            sizes.append(_Size(source, len(input_ids), int((labels[1:] != IGNORE).sum())))
    return sizes


def _count_documents(config: TrainConfig, tokenizer: Any) -> DataCounts:
    """Blocks of the joined documents, an end-of-text token after each."""
    from osft.data.documents import read_documents

    def texts() -> Iterator[str]:
        for text, _ in read_documents(config.data_path, config.document_column_name):
            if not is_held_out(hashlib.sha256(text.encode()).hexdigest(), config.validation_split):
                yield text

    block_size = config.block_size
    assert block_size is not None, "checked by TrainConfig"
    total = sum(1 for _ in texts())
    chosen = set(_spread(total))
    counted = 0
    for position, text in enumerate(texts()):
        if position in chosen:
            tokens = tokenizer(text, verbose=False)["input_ids"]
            counted += len(tokens) + (not tokens or tokens[-1] != tokenizer.eos_token_id)
    found = round(counted * total / max(1, len(chosen)))
    blocks, remainder = divmod(found, block_size)
    if not blocks:
        raise DataError(
            f"{config.data_path}: the {total} training documents have {found} tokens, less than one block of "
            f"block_size={block_size}. Give more documents or a smaller block_size"
        )
    return DataCounts(
        samples=blocks,
        tokens=blocks * block_size,
        loss_tokens=blocks * (block_size - 1),
        dropped_samples=0,
        dropped_tokens=remainder,
        largest_loss_share=(block_size - 1) / block_size,
        counted=len(chosen),
        exact=len(chosen) == total,
    )


def _from_statistics(config: TrainConfig, statistics: Path) -> DataCounts:
    """What the preparation wrote down about a dataset."""
    from osft.training.prepare import check_lengths

    found = json.loads(statistics.read_text(encoding="utf-8"))
    check_lengths(found, config)
    return DataCounts(
        samples=found["num_train_samples"],
        tokens=found["num_tokens"],
        loss_tokens=found["num_loss_tokens"],
        dropped_samples=found["dropped_as_too_long"]["samples"],
        dropped_tokens=found["dropped_as_too_long"]["tokens"],
        largest_loss_share=1.0,
        counted=found["num_train_samples"],
        exact=True,
    )


def _without_tokenizer(config: TrainConfig) -> DataCounts:
    """The number of records is all that is known."""
    records = sum(1 for _ in read_rows(config.data_path, columns=()))
    return DataCounts(
        samples=records,
        tokens=None,
        loss_tokens=None,
        dropped_samples=None,
        dropped_tokens=None,
        largest_loss_share=1.0,
        counted=0,
        exact=False,
    )
