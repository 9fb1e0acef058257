"""Which samples train and which are held out to measure the result."""

import numpy as np

from osft.data.record_spool import DIGEST, Digests
from osft.data.records import DataError


def check_validation(validation_fraction: float, validation_data: str | None) -> None:
    """Raise ValueError unless at most one of the two is asked for and the fraction is in [0, 1)."""
    number = isinstance(validation_fraction, int | float) and not isinstance(validation_fraction, bool)
    if not number or not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction!r}")
    if validation_data is not None and validation_fraction > 0:
        raise ValueError(
            f"validation_data={validation_data!r} and validation_fraction={validation_fraction} exclude each other: "
            "set validation_fraction=0, or leave validation_data out"
        )


def is_held_out(content_hash: str, validation_fraction: float) -> bool:
    """Whether something is on the validation side: decided by its hash (hexadecimal) alone."""
    return int(content_hash[:8], 16) < validation_fraction * 2**32


def by_prompt(prompt_hashes: Digests, validation_fraction: float, *, at_least_one: bool = False) -> np.ndarray:
    """Of each record, given by its prompt's hash, whether it is held out, (n,) bool: each prompt by its own hash.

    If the hashes would leave one side empty, the prompt with the smallest hash is held out, or the one with the largest
    trains. With a fraction of 0 nothing is held out, unless `at_least_one` asks for it.
    """
    prompts, prompt_of = np.unique(prompt_hashes, return_inverse=True)
    leading = np.frombuffer(prompts.tobytes(), ">u4").reshape(-1, DIGEST.itemsize // 4)[:, 0]
    held_out: np.ndarray = leading < validation_fraction * 2**32  # as `is_held_out`
    if len(prompts) > 1 and (validation_fraction > 0 or at_least_one):
        if not held_out.any():
            held_out[0] = True
        elif held_out.all():
            held_out[-1] = False
    return held_out[prompt_of]


def check_sides(data_uri: str, unit: str, num_train: int, num_validation: int, validation_fraction: float) -> None:
    """Raise DataError if a split leaves one side empty; `unit` says what was split."""
    for side, found in (("training", num_train), ("validation", num_validation)):
        if not found and validation_fraction > 0:
            raise DataError(
                f"{data_uri}: the {num_train + num_validation} {unit} leave the {side} side of the split empty "
                f"(validation_fraction={validation_fraction}). Give more data or another fraction"
            )
