"""What is done before a run trains: its model is tried, and the data that its settings name is prepared.

Everything is found by content if it was there before, so that a call that was killed repeats nothing, and several
nodes may do the same work side by side on one shared folder or each on its own.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from osft import storage
from osft.settings.training import TrainConfig
from osft.subspace.preflight import Preflight, check_data, preflight

if TYPE_CHECKING:
    from osft.data.dataset_folder import PreparedData


def check_model(config: TrainConfig, model: Path) -> Preflight:
    """What the model does with several samples at once. Raises as `preflight`."""
    return preflight(model, attn_implementation=config.attn_implementation, trust_remote_code=config.trust_remote_code)


def data_folder(config: TrainConfig) -> str:
    """Where prepared data and factors go: a path or URI."""
    return config.data_output_dir or storage.join(config.ckpt_output_dir, "_internal_data_processing")


def prepare_training_data(config: TrainConfig, model: Path) -> "PreparedData":
    """The prepared dataset, checked against `max_tokens_per_gpu`.

    Raises ValueError that names the sample if one is longer, and where no held-out sample is left to validate on.
    """
    prepared = _prepared(
        config,
        config.data_path,
        model,
        validation_fraction=config.validation_split,
        validation_data=config.validation_data_path,
    )
    check_lengths(prepared.statistics, config)
    if wants_validation(config) and not prepared.statistics["num_validation_samples"]:
        raise ValueError(
            f"every held-out sample is longer than max_seq_len={config.max_seq_len} tokens, so there is no validation "
            "loss. Raise it, or hold out more with validation_split"
        )
    return prepared


def prepare_replay(config: TrainConfig, model: Path, data: "PreparedData") -> "PreparedData | None":
    """The samples of `config.replay_data` that train beside `data`; None where none is asked for, or there is none.

    Data that is not a prepared dataset is prepared as data_path is, and what validation_split would hold out of it is
    left out. Raises as `prepare_training_data`.
    """
    from osft.data.dataset_folder import is_dataset
    from osft.data.replay import draw_replay

    if not config.replay_data:
        return None
    earlier = []
    for path in config.replay_data:
        how: dict[str, Any] = {"validation_fraction": config.validation_split}
        if is_dataset(path):
            how = {"validation_fraction": 0.0, "is_processed": True}  # it has a held-out side of its own
        earlier.append(_prepared(config, path, model, **how))
    drawn = draw_replay(
        data,
        earlier,
        storage.join(data_folder(config), "data"),
        ratio=config.replay_ratio,
        seed=config.seed,
        max_seq_len=config.max_seq_len,
    )
    if drawn:
        check_lengths(drawn.statistics, config)
    return drawn


def _prepared(
    config: TrainConfig,
    data_path: str,
    model: Path,
    *,
    validation_fraction: float,
    validation_data: str | None = None,
    is_processed: bool = False,
) -> "PreparedData":
    """Data as samples of the model's vocabulary, prepared as the settings say; `is_processed`: it is tokenized."""
    from osft.data.documents import prepare_documents
    from osft.data.prepare import prepare
    from osft.data.processed import import_processed

    output = storage.join(data_folder(config), "data")
    common: dict[str, Any] = {
        "validation_fraction": validation_fraction,
        "validation_data": validation_data,
    }
    if config.use_processed_dataset or is_processed:
        return import_processed(  # which checks rows against the vocabulary
            data_path,
            output,
            max_seq_len=config.max_seq_len,
            vocabulary_size=vocabulary_size(model, trust_remote_code=config.trust_remote_code),
            **common,
        )
    if config.is_pretraining:
        assert config.block_size is not None, "checked by TrainConfig"
        prepared = prepare_documents(
            data_path,
            model,
            output,
            block_size=config.block_size,
            document_column_name=config.document_column_name,
            trust_remote_code=config.trust_remote_code,
            **common,
        )
    else:
        prepared = prepare(
            data_path,
            model,
            output,
            max_seq_len=config.max_seq_len,
            unmask_messages=config.unmask_messages,
            deduplicate=False,
            trust_remote_code=config.trust_remote_code,
            **common,
        )
    check_data(prepared.folder, model, trust_remote_code=config.trust_remote_code)
    return prepared


def held_out_selection(config: TrainConfig, data: "PreparedData", replay: "PreparedData | None") -> list[int]:
    """The training samples of `data` that are held out for `fit_step`. Raises ValueError where there are too few."""
    if not config.fit_step:
        return []
    from osft.data.dataset_folder import load_split
    from osft.data.selection import select

    others = load_split(replay.folder, "train") if replay else None
    return select(load_split(data.folder, "train"), config.selection_samples, others=others)


def check_lengths(statistics: dict[str, Any], config: TrainConfig) -> None:
    """Raise ValueError that names the longest sample of a dataset if a micro-batch cannot hold it.

    `statistics` are those of dataset.json; held-out samples count where a validation loss is asked for.
    """
    sides = [statistics, statistics.get("validation") or {}] if wants_validation(config) else [statistics]
    for side in sides:
        longest = side.get("longest_sample") or 0
        if longest > config.max_tokens_per_gpu:
            raise ValueError(
                f"{side.get('longest_sample_source', config.data_path)}: the sample has {longest} tokens, more than "
                f"max_tokens_per_gpu={config.max_tokens_per_gpu}. Raise that, or lower max_seq_len, which drops longer "
                "samples"
            )


def wants_validation(config: TrainConfig) -> bool:
    """Whether a validation loss is asked for."""
    return bool(config.validation_split or config.validation_data_path)


def vocabulary_size(model: Path, *, trust_remote_code: bool = False) -> int:
    """Number of token ids of a model."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    return int(config.get_text_config().vocab_size)
