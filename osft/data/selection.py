"""Training samples that are held out to choose by: how far the finished update should go (`fit_step`).

What chooses between models must be used for nothing else: not trained on, and neither the validation nor the
evaluation, which measure what was chosen.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from osft.data.chat import IGNORE
from osft.data.samples import Samples

LEAST = 16
"""Samples; fewer tell steps of different sizes apart by chance only."""
LARGEST_SHARE = 0.1
"""Of the training samples, if that is not less than LEAST."""


def selection_size(num_samples: int, wanted: int) -> int:
    """How many of the training samples are held out. Raises ValueError if they are too few for that."""
    if num_samples < 2 * LEAST:
        raise ValueError(
            f"fit_step=True holds out at least {LEAST} of the training samples, and there are {num_samples}. Give at "
            f"least {2 * LEAST}, or fit_step=False"
        )
    return min(wanted, max(LEAST, int(LARGEST_SHARE * num_samples)))


def select(samples: Samples, wanted: int, *, others: Samples | None = None) -> list[int]:
    """The indices of the samples that are held out, ascending.

    Those of the prompts with the smallest hashes, whatever their order, until there are `selection_size` of them: of
    one prompt, all or none, and none of a prompt of `others`, which train, too. A prompt is what stands before the
    first token that counts; of a text that counts from its beginning, the text. Raises ValueError as `selection_size`,
    and where too few prompts are left or one has too many of the samples.
    """
    num_samples = len(samples.lengths)
    size = selection_size(num_samples, wanted)
    trained = set(_prompts(others)) if others else set()
    by_prompt: dict[bytes, list[int]] = {}
    for index, prompt in enumerate(_prompts(samples)):
        if prompt not in trained:
            by_prompt.setdefault(prompt, []).append(index)
    chosen: list[int] = []
    for prompt in sorted(by_prompt):
        if len(chosen) >= size:
            break
        chosen += by_prompt[prompt]
    if len(chosen) < size or 2 * len(chosen) > num_samples:
        raise ValueError(
            f"fit_step=True holds out {size} of the {num_samples} training samples by whole prompts, and the "
            f"{len(by_prompt)} different prompts that are not replayed, too, give {len(chosen)}. Give more prompts, or "
            "fit_step=False"
        )
    return sorted(chosen)


def _prompts(samples: Samples) -> Iterator[bytes]:
    """The hash of each sample's prompt."""
    for index in range(len(samples.lengths)):
        sample = samples[index]
        yield _prompt_sha256(sample.input_ids, sample.labels)


def _prompt_sha256(input_ids: Sequence[int], labels: Sequence[int]) -> bytes:
    first = int((np.asarray(labels) != IGNORE).argmax())
    tokens = input_ids[:first] if first > 1 else input_ids
    return hashlib.sha256(np.asarray(tokens, np.int64).tobytes()).digest()
