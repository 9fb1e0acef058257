"""Raw documents -> blocks of tokens for continued pretraining (see `osft.data.dataset_folder` for the result)."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

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
from osft.data.records import DataError
from osft.data.rows import read_rows
from osft.data.split import check_sides, check_validation, is_held_out
from osft.storage.atomic import atomic_path

logger = logging.getLogger(__name__)

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20


def prepare_documents(
    data_uri: str,
    model_path: str | Path,
    output_root: str | Path,
    *,
    block_size: int,
    document_column_name: str = "document",
    validation_fraction: float = 0.0,
    validation_data: str | None = None,
    trust_remote_code: bool = False,
) -> PreparedData:
    """Prepare the documents of `data_uri` (as in `osft.data.files.data_files`) for the model at `model_path`.

    Each document is tokenized as the tokenizer does it by itself (with a begin token if it adds one, without a chat
    template) and ends with one end-of-text token. In the order of the files, all of it is one stream, cut into
    blocks of exactly `block_size` tokens; every token counts in the loss. What is left at the end of the stream, less
    than a block, is dropped and counted (`remainder_tokens`).

    The held-out documents, by `validation_fraction` (decided by a document's hash) or from `validation_data`, are a
    stream of their own. Documents are read and written as they come: memory does not grow with their number.

    Raises FileNotFoundError for missing paths, DataError (a ValueError, with file and line) for a document that is
    not a text or a side without one block, and ValueError for settings out of range or a tokenizer without an
    end-of-text token.
    """
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 2:
        raise ValueError(f"block_size must be an integer of at least 2 (tokens), got {block_size!r}")
    if not isinstance(document_column_name, str) or not document_column_name:
        raise ValueError(f"document_column_name must be the name of a column, got {document_column_name!r}")
    check_validation(validation_fraction, validation_data)

    files = hash_files(data_files(data_uri))
    validation_files = hash_files(data_files(validation_data)) if validation_data else {}
    settings = {
        "block_size": block_size,
        "document_column_name": document_column_name,
        "validation_fraction": validation_fraction,
    }
    # In the files' order, which decides where blocks begin.
    contents = [list(files.values()), list(validation_files.values())]
    address = content_address(output_root, "documents", contents, hash_tokenizer(model_path), settings)
    if found := find_dataset(address):
        logger.info(f"data: reused {address}")
        return found
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {model_path} has no end-of-text token to put between documents. Set "
            "`tokenizer.eos_token` and save the tokenizer into the model folder"
        )

    with atomic_path(storage.local(address)) as temporary, DatasetWriter(temporary) as writer:
        train, held_out = _Blocks(writer.train, block_size), _Blocks(writer.validation, block_size)
        for text, tokens, source in _tokenized(data_uri, document_column_name, tokenizer):
            is_out = validation_fraction > 0 and is_held_out(
                hashlib.sha256(text.encode()).hexdigest(), validation_fraction
            )
            (held_out if is_out else train).append(tokens, source)
            if is_out:
                writer.hold_out({"text": text})
        check_sides(data_uri, "documents", train.num_documents, held_out.num_documents, validation_fraction)
        if validation_data:
            for text, tokens, source in _tokenized(validation_data, document_column_name, tokenizer):
                held_out.append(tokens, source)
                writer.hold_out({"text": text})
        train.check_not_empty(data_uri, "training")
        if held_out.num_documents:
            held_out.check_not_empty(validation_data or data_uri, "validation")
        statistics = writer.finish(
            {
                "kind": "documents",
                "data_uri": data_uri,
                "files": files,
                "validation_data": validation_data,
                "validation_files": validation_files,
                "settings": settings,
                "num_records": train.num_documents + (0 if validation_data else held_out.num_documents),
                "num_duplicates": 0,
                "num_held_out_records": held_out.num_documents,
                "remainder_tokens": train.remainder_tokens,
            }
        )
    logger.info(
        f"data: {train.num_documents} documents in {statistics['num_train_samples']} training blocks of {block_size} "
        f"tokens ({statistics['num_tokens']} tokens), {statistics['num_validation_samples']} blocks held out; dropped "
        f"the last {train.remainder_tokens} tokens, which fill no block"
    )
    return publish_dataset(address, statistics)


class _Blocks:
    """Cuts a stream of tokens into blocks."""

    def __init__(self, split: SplitWriter, block_size: int) -> None:
        self._split = split
        self._block = np.empty(block_size, np.int32)
        self._source = ""
        self.num_documents = 0
        self.remainder_tokens = 0
        """Tokens after the last whole block."""

    def append(self, tokens: np.ndarray, source: str) -> None:
        """Continue the stream; a block's source is that of its first token."""
        self.num_documents += 1
        while len(tokens):
            if not self.remainder_tokens:
                self._source = source
            part = tokens[: len(self._block) - self.remainder_tokens]
            self._block[self.remainder_tokens : self.remainder_tokens + len(part)] = part
            self.remainder_tokens += len(part)
            tokens = tokens[len(part) :]
            if self.remainder_tokens == len(self._block):
                block = self._block.copy()
                self._split.append(block, block, self._source)
                self.remainder_tokens = 0

    def check_not_empty(self, uri: str, side: str) -> None:
        """Raise DataError unless there is a block."""
        if not self._split.num_samples:
            raise DataError(
                f"{uri}: the {self.num_documents} {side} documents have {self.remainder_tokens} tokens, less than one "
                f"block of block_size={len(self._block)}. Give more documents or a smaller block_size"
            )


def _tokenized(uri: str, column: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, np.ndarray, str]]:
    """Text, tokens with the end-of-text token, and source of each document."""
    end = tokenizer.eos_token_id
    for texts, sources in _batches(
        tqdm(read_documents(uri, column), desc="tokenize", unit="document", mininterval=2.0)
    ):
        encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        for text, tokens, source in zip(texts, encoded, sources, strict=True):
            if not tokens or tokens[-1] != end:  # some tokenizers add it themselves
                tokens.append(end)
            yield text, np.array(tokens, np.int32), source


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[tuple[list[str], list[str]]]:
    """Texts and sources of as many documents as are worth a call of the tokenizer."""
    texts: list[str] = []
    sources: list[str] = []
    characters = 0
    for text, source in documents:
        texts.append(text)
        sources.append(source)
        characters += len(text)
        if len(texts) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield texts, sources
            texts, sources, characters = [], [], 0
    if texts:
        yield texts, sources


def read_documents(uri: str, column: str) -> Iterator[tuple[str, str]]:
    """Text and source of each document. Raises DataError at the first that has none."""
    for source, value in read_rows(uri, columns=(column,)):
        text = value.get(column)
        if column not in value:
            columns = ", ".join(map(repr, value)) or "none"
            raise DataError(f"{source}: there is no column {column!r}; document_column_name can be one of {columns}")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{source}: column {column!r} must be a non-empty text; got {text!r:.80}")
        yield text, source
