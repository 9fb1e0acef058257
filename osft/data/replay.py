"""Experience replay: samples of earlier data that train beside the new ones (see `osft.data.dataset_folder`).

Drawn samples are a dataset folder of their own, so that what is measured on the new data (its validation loss, the
layers' importance, what the round learned) sees the new data only, and what a round takes is not counted again.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_from_disk

from osft import storage
from osft.data.chat import Sample
from osft.data.dataset_folder import (
    DatasetWriter,
    PreparedData,
    TokenizedSplit,
    content_address,
    find_dataset,
    load_split,
    publish_dataset,
)
from osft.storage.atomic import atomic_path

logger = logging.getLogger(__name__)


def draw_replay(
    data: PreparedData,
    earlier: Sequence[PreparedData],
    output_root: str | Path,
    *,
    ratio: float,
    seed: int,
    max_seq_len: int,
) -> PreparedData | None:
    """Draw training samples of `earlier` data, so many that they are `ratio` of those that train with `data`'s.

    The earlier datasets take turns, so that a small one is not lost among large ones; within one, the order is random
    by `seed` and both contents. No sample comes twice, none is longer than `max_seq_len` tokens, and none equals one
    that `data` or an earlier dataset holds out. With too few, all are taken. None if there is not one.

    `statistics` of the result has `sources`: data_uri, dataset (its key), num_samples and num_tokens of each. The
    ratio actually reached is in the log.
    """
    num_new = data.statistics["num_train_samples"]
    wanted = round(num_new * ratio / (1 - ratio))
    settings = {"ratio": ratio, "seed": seed, "max_seq_len": max_seq_len}
    address = content_address(output_root, "replay", data.key, [source.key for source in earlier], settings)
    if found := find_dataset(address):
        logger.info(_described(found.statistics, num_new, wanted))
        return found if found.statistics["num_train_samples"] else None

    seen = {_digest(sample) for source in (data, *earlier) for sample in _all(load_split(source.folder, "validation"))}
    sources: list[dict[str, Any]] = [
        {"data_uri": source.statistics["data_uri"], "dataset": source.key, "num_samples": 0, "num_tokens": 0}
        for source in earlier
    ]
    drawn = _in_turns([_shuffled(source, f"{seed} {data.key} {source.key}") for source in earlier])
    with atomic_path(storage.local(address)) as temporary, DatasetWriter(temporary) as writer:
        while writer.train.num_samples < wanted and (entry := next(drawn, None)):
            number, name, sample = entry
            digest = _digest(sample)
            if digest in seen or len(sample.input_ids) > max_seq_len:
                continue
            seen.add(digest)
            writer.train.append(np.array(sample.input_ids, np.int32), np.array(sample.labels, np.int32), name)
            sources[number]["num_samples"] += 1
            sources[number]["num_tokens"] += len(sample.input_ids)
        statistics = writer.finish({"kind": "replay", "data": data.key, "settings": settings, "sources": sources})
    logger.info(_described(statistics, num_new, wanted))
    written = publish_dataset(address, statistics)
    return written if statistics["num_train_samples"] else None


def _shuffled(source: PreparedData, seed: str) -> Iterator[tuple[str, Sample]]:
    """The training samples of a dataset, each with the record that it comes from."""
    train, names = load_split(source.folder, "train"), load_from_disk(source.folder / "train")["source"]
    generator = np.random.default_rng(list(hashlib.sha256(seed.encode()).digest()))
    for index in generator.permutation(len(train)).tolist():
        yield names[index], train[index]


def _in_turns(sources: Sequence[Iterator[tuple[str, Sample]]]) -> Iterator[tuple[int, str, Sample]]:
    for turn in zip_longest(*sources):
        for number, entry in enumerate(turn):
            if entry is not None:
                yield number, *entry


def _all(split: TokenizedSplit) -> Iterator[Sample]:
    return (split[index] for index in range(len(split)))


def _digest(sample: Sample) -> bytes:
    return hashlib.sha256(np.array(sample.input_ids, np.int32).tobytes()).digest()


def _described(statistics: dict[str, Any], num_new: int, wanted: int) -> str:
    drawn = statistics["num_train_samples"]
    parts = ", ".join(f"{part['num_samples']} of {part['data_uri']}" for part in statistics["sources"])
    fewer = f"; {wanted} were asked for, and there are no more" if drawn < wanted else ""
    return (
        f"replay: {drawn} samples ({statistics['num_tokens']} tokens) of earlier data, {drawn / (drawn + num_new):.1%} "
        f"of all that train: {parts}{fewer}"
    )
