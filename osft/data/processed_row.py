"""One record that is tokenized already: what its columns mean, and what of it is trained on."""

from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np

from osft.data.chat import IGNORE
from osft.data.files import DataError

LENGTHS = ("len", "num_loss_counted_tokens")
"""As mini-trainer writes them: tokens, and those with a label."""
LOSS_MASKS = ("loss_mask", "assistant_masks", "completion_mask")
"""Where other programs say what has a loss."""
COLUMNS = (
    *("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids"),
    *("seq_lengths", "seq_idx"),
    *LOSS_MASKS,
    *LENGTHS,
)
"""What is read; all but the first two are optional."""

CHANGES_MEANING = frozenset(
    {
        *("inputs_embeds", "pixel_values", "pixel_values_videos", "image_grid_thw", "input_features", "input_values"),
        *("loss_weight", "loss_weights", "weight", "weights", "sample_weight", "decoder_input_ids"),
        *("chosen_input_ids", "rejected_input_ids"),
    }
)
"""Columns without which a record says something else; a record with one of them is refused."""


def check_columns(names: Collection[str], source: str) -> None:
    """Raise DataError that names `source` unless the columns are those of tokens and labels alone."""
    if missing := [column for column in ("input_ids", "labels") if column not in names]:
        columns = ", ".join(map(repr, names)) or "none"
        raise DataError(f"{source}: a processed record needs {' and '.join(missing)}; its columns are {columns}")
    if unknown := sorted(CHANGES_MEANING.intersection(names)):
        raise DataError(
            f"{source}: {unknown[0]!r} changes what a record means, and cannot be trained on. Drop the column if it "
            "does not matter, or give raw chats"
        )


def check_row(
    row: dict[str, Any], source: str, vocabulary_size: int, counts: Counter[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The record's tokens and labels without padding, both (T,) int32.

    To `counts` is added what was left out. Raises DataError that names `source`.
    """
    row = {column: value for column, value in row.items() if value is not None}
    check_columns(row, source)
    input_ids = _integers(row["input_ids"], f"{source}: input_ids")
    labels = _integers(row["labels"], f"{source}: labels")
    if len(input_ids) != len(labels):
        raise DataError(f"{source}: there are {len(input_ids)} input_ids, but {len(labels)} labels")
    first, last = _attended(row, source, len(input_ids))
    padding_labels = int((labels != IGNORE).sum())  # with those of the padding
    whole = len(labels)
    input_ids, labels = input_ids[first:last], labels[first:last]
    padding_labels -= int((labels != IGNORE).sum())
    if counts is not None:
        counts["padding tokens, which attention_mask names, were left out"] += whole - len(labels)
        counts["labels of padding were left out with it"] += padding_labels
    _check_tokens(input_ids, labels, source, vocabulary_size)
    _check_one_sample(row, source, first, last)
    _check_loss(row, source, input_ids, labels, first)
    # The first token is never predicted; mini-trainer counts it all the same where it has a label.
    in_loss = labels != IGNORE
    loss_tokens = int(in_loss.sum())
    allowed = {
        "len": {len(input_ids), whole},
        "num_loss_counted_tokens": {loss_tokens, int(in_loss[1:].sum()), loss_tokens + padding_labels},
    }
    for name, real in allowed.items():
        if name in row and (isinstance(row[name], list | dict | str) or row[name] not in real):
            raise DataError(f"{source}: {name} is {row[name]!r}, but the record has {max(real)}")
    return input_ids.astype(np.int32), labels.astype(np.int32)


def _attended(row: dict[str, Any], source: str, length: int) -> tuple[int, int]:
    """The first token that is no padding, and the one after the last."""
    if "attention_mask" not in row:
        return 0, length
    mask = _flags(row["attention_mask"], f"{source}: attention_mask", length)
    (attended,) = np.nonzero(mask)
    if not len(attended):
        raise DataError(f"{source}: attention_mask is 0 everywhere, so the record has no token. Drop the record")
    first, last = int(attended[0]), int(attended[-1]) + 1
    if last - first != len(attended):
        at = first + int(np.flatnonzero(mask[first:last] == 0)[0])
        raise DataError(
            f"{source}: attention_mask[{at}] is 0 between tokens that are attended. Padding stands before or after a "
            "sample; take these tokens out, or set their mask to 1 and their labels to -100"
        )
    return first, last


def _check_tokens(input_ids: np.ndarray, labels: np.ndarray, source: str, vocabulary_size: int) -> None:
    for name, values, allowed in (("input_ids", input_ids, False), ("labels", labels, labels == IGNORE)):
        outside = np.flatnonzero(((values < 0) | (values >= vocabulary_size)) & ~np.array(allowed))
        if len(outside):
            at = outside[0]
            wanted = f"a token of this model, 0 to {vocabulary_size - 1}" + (
                f", or {IGNORE}" if name == "labels" else ""
            )
            raise DataError(f"{source}: {name}[{at}] must be {wanted}; got {values[at]}")


def _check_one_sample(row: dict[str, Any], source: str, first: int, last: int) -> None:
    """Raise DataError if a column says that the record is not one sample whose tokens follow one another."""
    packed = "several samples are packed into this record. Give each one a record of its own: they are packed anyway"
    length = _length(row)
    if "position_ids" in row:
        positions = _integers(row["position_ids"], f"{source}: position_ids")
        _check_length("position_ids", len(positions), length, source)
        steps = np.flatnonzero(np.diff(positions[first:last]) != 1)
        if len(steps):
            at = first + int(steps[0]) + 1
            again = positions[at] == 0
            problem = packed if again else "the tokens of a sample follow one another. Drop the column"
            raise DataError(f"{source}: position_ids[{at}] is {positions[at]} after {positions[at - 1]}: {problem}")
        if positions[first] not in (0, first):
            raise DataError(
                f"{source}: position_ids begin at {positions[first]}; a sample begins at 0. Drop the column"
            )
    if "token_type_ids" in row:
        types = _integers(row["token_type_ids"], f"{source}: token_type_ids")
        _check_length("token_type_ids", len(types), length, source)
        if types[first:last].any():
            at = first + int(np.flatnonzero(types[first:last])[0])
            raise DataError(
                f"{source}: token_type_ids[{at}] is {types[at]}: tokens of another type are read in another way, which "
                "training does not. Drop the column if all of this is text"
            )
    if "seq_idx" in row and len(set(_integers(row["seq_idx"], f"{source}: seq_idx")[first:last].tolist())) > 1:
        raise DataError(f"{source}: seq_idx has several values: {packed}")
    if "seq_lengths" in row and len(np.atleast_1d(row["seq_lengths"])) > 1:
        raise DataError(f"{source}: seq_lengths has several values: {packed}")


def _check_loss(row: dict[str, Any], source: str, input_ids: np.ndarray, labels: np.ndarray, first: int) -> None:
    """Raise DataError if nothing is learned, or something that was not meant."""
    in_loss = labels != IGNORE
    if not in_loss[1:].any():
        raise DataError(f"{source}: no label after the first one counts, so there is nothing to learn. Drop the record")
    earlier = labels[:-1][in_loss[:-1]]
    if (
        len(earlier) > 1
        and (earlier == input_ids[1:][in_loss[:-1]]).all()
        and (earlier != input_ids[:-1][in_loss[:-1]]).any()
    ):
        raise DataError(
            f"{source}: the labels are the next tokens. Give labels that are not shifted: labels[i] is input_ids[i] "
            f"where it counts, and {IGNORE} elsewhere"
        )
    for name in LOSS_MASKS:
        if name in row:
            mask = _flags(row[name], f"{source}: {name}", _length(row))[first : first + len(labels)]
            beside = np.flatnonzero(in_loss & (mask == 0))
            if len(beside):
                at = first + int(beside[0])
                raise DataError(
                    f"{source}: labels[{at}] counts, but {name}[{at}] is 0. Labels alone decide here: set it to "
                    f"{IGNORE}, or drop {name}"
                )


def _length(row: dict[str, Any]) -> int:
    return len(row["input_ids"])


def _check_length(name: str, found: int, length: int, source: str) -> None:
    if found != length:
        raise DataError(f"{source}: there are {length} input_ids, but {found} {name}")


def _flags(values: Any, name: str, length: int) -> np.ndarray:
    """A list of zeros and ones, or of truth values, as (T,) int64."""
    if isinstance(values, list) and set(map(type, values)) == {bool}:
        values = list(map(int, values))
    flags = _integers(values, name)
    source, _, column = name.rpartition(": ")
    _check_length(column, len(flags), length, source)
    wrong = np.flatnonzero((flags != 0) & (flags != 1))
    if len(wrong):
        hint = ". A number for each packed sample? Give each one a record of its own" if flags.max() > 1 else ""
        raise DataError(f"{name}[{wrong[0]}] must be 0 or 1; got {flags[wrong[0]]}{hint}")
    return flags


def _integers(values: Any, name: str) -> np.ndarray:
    """A list of whole numbers as (T,) int64."""
    if not isinstance(values, list) or not values:
        raise DataError(f"{name} must be a non-empty list of integers; got {values!r:.80}")
    kinds = set(map(type, values))
    if kinds == {float} or kinds == {int, float}:  # as pandas and JavaScript write whole numbers
        values = [int(value) if type(value) is float and value.is_integer() else value for value in values]
        kinds = set(map(type, values))
    if kinds != {int}:
        position, value = next((i, value) for i, value in enumerate(values) if type(value) is not int)
        if isinstance(value, list):
            raise DataError(
                f"{name} must be one list of integers; its first element is a list. Give one sample a record"
            )
        raise DataError(f"{name}[{position}] must be an integer; got {value!r:.80}")
    try:
        return np.array(values, np.int64)
    except OverflowError:
        raise DataError(f"{name} has a number that no token can have; got {max(values, key=abs)}") from None
