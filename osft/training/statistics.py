"""What protect="activations" keeps a model as it is on: the statistics that it comes with, or that are measured now.

    <store>/statistics/              by what they were measured on (`osft.subspace.statistics_store`)
    <store>/texts/<sha256>.jsonl     the text that a model wrote itself, by the hash of its tokens, as plain text

Those of a lineage are handed on (`osft.training.round_statistics`): what the base model and every round knew. A model
without, such as a base model, is measured on text that it writes itself, and on records that are given.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from osft import storage
from osft.data.chat import Sample, tokenize
from osft.data.files import data_files
from osft.data.packing import FAST_TOKENS, Feeding
from osft.data.records import read_records
from osft.data.self_written import FORMAT, as_samples, save_texts
from osft.models.loading import load_model
from osft.settings.subspace import SubspaceConfig
from osft.storage.hashes import files_sha256, named_sha256
from osft.subspace.calibration import measure, text_sha256
from osft.subspace.preflight import Preflight
from osft.subspace.statistics import Statistics
from osft.subspace.statistics_store import (
    find_statistics,
    load_statistics,
    save_statistics,
    statistics_key,
    stored_parts,
)
from osft.subspace.targets import select_targets
from osft.training.identity import model_contents
from osft.training.own_text import default_text_tokens, written_text
from osft.training.round_statistics import carried_statistics

logger = logging.getLogger(__name__)

MAX_TOKENS = 2048
"""Of a record of calibration_data."""


def calibrated(
    model: Path,
    store: str | Path,
    subspace: SubspaceConfig,
    *,
    preflight: Preflight,
    device: str,
    trust_remote_code: bool = False,
) -> str:
    """The path or URI, below `store`, of the statistics for a model: those that it carries, or measured now, once.

    Raises FileNotFoundError or DamagedFile for carried ones that are not what was written, DataError for bad records of
    calibration_data, ValueError for a model that writes no text.
    """
    if carried := carried_statistics(model, store, subspace, trust_remote_code=trust_remote_code):
        statistics = load_statistics(carried)
        logger.info(f"statistics: {_described(statistics)}, carried by the model ({carried})")
        if subspace.calibration_data:
            logger.warning(
                "statistics: calibration_data is not read: what a model carries is more than it is measured on again"
            )
        return carried if carried.startswith(f"{store}/") else save_statistics(statistics, store)
    key = statistics_key(**_made_of(model, subspace))
    if found := find_statistics(store, key):
        logger.info(f"statistics: reused {found}")
        return found
    statistics = _measured(
        model,
        store,
        subspace,
        preflight=preflight,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    address = save_statistics(statistics, store, key)
    logger.info(f"statistics: measured {_described(statistics)} ({address})")
    return address


def self_written_text(statistics: str | Path) -> str | None:
    """The path or URI of the text that the base model wrote itself for these statistics, a path or URI, if it is there.

    Raises FileNotFoundError or DamagedFile for statistics that are not what was written.
    """
    store = str(statistics).rsplit("/", 2)[0]
    for part in stored_parts(statistics):
        address = storage.join(store, "texts", f"{part.text_sha256}.jsonl")
        if storage.find(address) is not None:
            return address
    return None


def _measured(
    folder: Path,
    store: str | Path,
    subspace: SubspaceConfig,
    *,
    preflight: Preflight,
    device: str,
    trust_remote_code: bool,
) -> Statistics:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = load_model(
        folder, dtype=dtype, device=device, attention=preflight.attention, trust_remote_code=trust_remote_code
    )
    targets = select_targets(model, subspace.target_patterns)
    default = default_text_tokens(targets)
    num_tokens = subspace.calibration_tokens
    if num_tokens is None:
        num_tokens = default
    texts: dict[str, tuple[str, list[Sample]]] = {}
    if num_tokens:
        written = written_text(model, tokenizer, folder, store, subspace, num_tokens=num_tokens)
        samples = as_samples(written)
        address = storage.join(store, "texts", f"{text_sha256(samples)}.jsonl")
        save_texts(written, tokenizer, storage.local(address))
        storage.publish(address)
        described = f"written by the model, seed {subspace.calibration_seed}, "
        texts["base"] = (described + f"temperature {subspace.calibration_temperature:g}", samples)
    if subspace.calibration_data:
        given = _given(subspace.calibration_data, tokenizer, num_tokens or default)
        texts["calibration_data"] = (subspace.calibration_data, given)
    weights = model_contents(folder)["weights"]
    statistics: Statistics | None = None
    for name, (source, samples) in texts.items():
        max_tokens = max(FAST_TOKENS[device], *(len(sample.input_ids) for sample in samples))
        feeding = Feeding(max_tokens=max_tokens, device=torch.device(device), batching=preflight.batching)
        statistics = measure(
            model,
            targets,
            samples,
            feeding=feeding,
            name=name,
            source=source,
            model_sha256=weights,
            onto=statistics,
        )
    assert statistics is not None, "without tokens of its own text there is calibration_data"
    return statistics


def _given(uri: str, tokenizer: Any, num_tokens: int) -> list[Sample]:
    """Records up to `num_tokens`, those with the smallest content hashes: whatever the files' order."""
    distinct = {record.content_hash: record for record in read_records(uri, allow_text=True)}
    chosen: list[list[int]] = []
    for key in sorted(distinct):
        chosen.append(tokenize(distinct[key], tokenizer, max_text_tokens=MAX_TOKENS).input_ids[:MAX_TOKENS])
        if sum(map(len, chosen)) >= num_tokens:
            break
    logger.info(f"statistics: {len(chosen):,} of {len(distinct):,} records of {uri}, for {num_tokens:,} tokens")
    return as_samples(chosen)


def _made_of(model: Path, subspace: SubspaceConfig) -> dict[str, Any]:
    """What determines the statistics, but for the hardware."""
    data = ""
    if subspace.calibration_data:
        digests = files_sha256(data_files(subspace.calibration_data))
        data = named_sha256({file.name: digest for file, digest in digests.items()})
    return {
        "model": model_contents(model),
        "targets": subspace.target_patterns,
        "text format": FORMAT,
        "tokens": subspace.calibration_tokens,
        "temperature": subspace.calibration_temperature,
        "seed": subspace.calibration_seed,
        "data": data,
    }


def _described(statistics: Statistics) -> str:
    return " and ".join(f"{part.name} ({part.num_tokens:,} tokens)" for part in statistics.parts)
