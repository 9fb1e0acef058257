"""The data that training and evaluation read."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from osft import storage
from osft.data import examples
from osft.data.records import read_records, report_lines
from osft.rounds.pipeline_run import PipelineRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """What `prepare_data` hands to the other steps."""

    base_model_path: str
    model_path: str
    """Of the model to train: the champion, or the base model."""
    data_path: str
    anchor_paths: list[str]
    statistics: dict[str, Any]


def prepare_data(
    run: PipelineRun,
    *,
    base_model: str,
    model: str,
    records: str,
    anchor_uris: Sequence[str],
    max_seq_len: int,
    validation_fraction: float,
    max_train_samples: int,
    max_validation_samples: int,
) -> PreparedData:
    """Fetch what is named by URI, check every evaluation set, and prepare the new records for training.

    `base_model` is as the user gave it, `model` and `records` are those of `resolve_round`.
    """
    from osft.data.prepare import prepare
    from osft.models.loading import model_folder, stored_model
    from osft.subspace.preflight import check_data, preflight

    root = run.storage_root
    fetched = storage.join(root, "examples")
    with run.step("prepare_data") as step:
        anchors = [examples.resolve(uri, fetched) for uri in anchor_uris]
        for anchor in anchors:
            counts: Counter[str] = Counter()
            for _ in read_records(anchor, allow_text=True, counts=counts):
                pass
            for line in report_lines(counts):
                logger.info(f"{anchor}: {line}")
        base = stored_model(examples.resolve(base_model, fetched), storage.join(root, "models"))
        if model == base_model:
            model = base
        folder = model_folder(model)
        logger.info(preflight(folder).line())
        check_chats(anchors, folder)
        prepared = prepare(
            records,
            folder,
            storage.join(root, "data"),
            max_seq_len=max_seq_len,
            validation_fraction=validation_fraction,
            hold_out_a_prompt=True,
            max_train_samples=max_train_samples,
            max_validation_samples=max_validation_samples,
        )
        check_data(prepared.folder, folder)
        resolved = run.resolved()
        step.log_dataset(
            name=resolved.task,
            digest=prepared.key,
            source=resolved.data.uri,
            num_records=prepared.statistics["num_train_samples"],
            context="training",
            to_parent=True,
        )
        step.log_params(prepared.statistics["settings"])
        step.log_metrics({k: v for k, v in prepared.statistics.items() if isinstance(v, int)})
        step.log_artifact(prepared.folder / "dataset.json")
    return PreparedData(
        base_model_path=base,
        model_path=model,
        data_path=storage.join(root, "data", prepared.key),
        anchor_paths=anchors,
        statistics=prepared.statistics,
    )


def check_chats(uris: Sequence[str], model_path: Path) -> None:
    """Raise DataError for a record that the model's chat template cannot render as evaluation will ask it to."""
    from transformers import AutoTokenizer

    from osft.data.chat import tokenize_all
    from osft.data.tokenizing import CHUNK

    if uris:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        for uri in uris:
            records = read_records(uri, allow_text=True)
            while chunk := list(islice(records, CHUNK)):
                tokenize_all(chunk, tokenizer)
