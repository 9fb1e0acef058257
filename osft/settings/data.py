"""What a user sets of the data: what is learned, what is replayed, what is held out."""

import warnings
from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from osft.settings.base import Settings
from osft.settings.values import Boolean, GivenLocation, Integer, Location, Locations, Number, Text


class DataSettings(Settings):
    """What a run learns, and how records become samples."""

    model_config = ConfigDict(title="Data")

    data_path: GivenLocation
    """Training data: a file, a folder of files or a glob, as a path or an `s3://` URI, or the id of a Hugging Face data
    set, `org/name` or `org/name@revision`. JSON lines, a JSON array, CSV and TSV, also compressed, Parquet, Arrow, and
    what `datasets` saved. See `use_processed_dataset` and `is_pretraining` for what a record holds; otherwise it is a
    chat, {"messages": [{"role": …, "content": …}, …]}, or in a form that is converted: ShareGPT, Alpaca,
    prompt/completion, question/answer."""

    max_seq_len: Annotated[Integer, Field(ge=2)]
    """Longest sample in tokens; longer ones are dropped, and their number and share of tokens reported."""

    data_output_dir: Location | None = None
    """Folder for prepared data and factors, a path or an `s3://` URI. None: `_internal_data_processing` in
    ckpt_output_dir. Shared between runs, it spares them the work: what is in it is found by content."""

    factors: Location | None = None
    """Precomputed decompositions: the manifest of a factor set, or a factor store's folder, in which what is missing
    is computed; a path or an `s3://` URI. None: the store `factors` in data_output_dir."""

    use_processed_dataset: Boolean = False
    """data_path is already tokenized for this model: records with `input_ids` and `labels` (JSON lines, Parquet, or a
    folder of `datasets`), where a label of -100 takes a token out of the loss."""

    unmask_messages: Boolean = False
    """Loss on all messages but the system's. False: on the assistant's. A record decides for itself with
    `"unmask": true`."""

    is_pretraining: Boolean = False
    """Train on raw documents: they are joined, an end-of-text token after each, and cut into blocks of exactly
    block_size tokens, with loss on all. The remainder that fills no block is dropped and reported."""

    block_size: Annotated[Integer | None, Field(ge=2)] = None
    """Tokens of a block. Required with is_pretraining, and of no use without."""

    document_column_name: Text = "document"
    """With is_pretraining: the key of a record's text."""

    replay_ratio: Annotated[Number, Field(ge=0.0, le=0.99)] = 0.0
    """Share of the training samples that is drawn from replay_data, earlier data, so that training on new data does not
    move the model away from what it learned before. The datasets of replay_data take turns; no sample comes twice in an
    epoch. With too few there, all are taken, which is reported."""

    replay_data: Locations | None = None
    """With replay_ratio: the earlier data, each as data_path, or the folder of a dataset that this package prepared
    (`data/<hash>` in data_output_dir). What is held out, there or here, is not replayed."""

    @model_validator(mode="after")
    def _check_replay(self) -> Self:
        if self.replay_ratio and not self.replay_data:
            raise ValueError(f"replay_ratio={self.replay_ratio} needs replay_data: the earlier data to draw from")
        if self.replay_data and not self.replay_ratio:
            raise ValueError(
                "replay_data needs replay_ratio: the share of the training samples to draw from it, such as 0.05"
            )
        return self

    @model_validator(mode="after")
    def _check_data_mode(self) -> Self:
        if self.is_pretraining and self.block_size is None:
            raise ValueError("block_size is required with is_pretraining=True: the tokens of a block, such as 1024")
        if self.is_pretraining and (self.unmask_messages or self.use_processed_dataset):
            other = "unmask_messages" if self.unmask_messages else "use_processed_dataset"
            raise ValueError(f"is_pretraining=True and {other}=True exclude each other. Turn one of them off")
        if self.block_size is not None and not self.is_pretraining:
            warnings.warn("block_size is of use with is_pretraining=True only; it is ignored", stacklevel=4)
        return self


class ValidationSettings(Settings):
    """What is held out, and when the loss on it is measured."""

    model_config = ConfigDict(title="Validation")

    validation_split: Annotated[Number, Field(ge=0.0, le=0.99)] = 0.0
    """Share of the data that is held out for the validation loss. Which side a record falls on depends on its
    content only."""

    validation_data_path: Location | None = None
    """Data for the validation loss, of the same kind as data_path. Instead of validation_split."""

    validation_frequency: Annotated[Integer | None, Field(ge=1)] = None
    """Optimizer steps between two validations. None: at the end of each epoch. The last step is always validated."""

    save_best_val_loss: Boolean = False
    """Also keep the model with the lowest validation loss, as `hf_format/samples_<n>.0_best_val_loss`."""

    @model_validator(mode="after")
    def _check_validation(self) -> Self:
        if self.validation_split and self.validation_data_path:
            raise ValueError("validation_split and validation_data_path exclude each other. Give one of them")
        if not (self.validation_split or self.validation_data_path):
            for name in ("validation_frequency", "save_best_val_loss"):
                if getattr(self, name):
                    raise ValueError(f"{name} needs validation data: give validation_split or validation_data_path")
        return self
