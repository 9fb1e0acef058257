"""Tokenized samples as training and evaluation read them: on disk, in memory, or some of those."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from osft.data.chat import Sample


class Samples(Protocol):
    """Samples by their number, and their lengths without reading them."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each sample."""

    @property
    def num_loss_tokens(self) -> Sequence[int]:
        """Of these, the tokens that count in the loss."""

    def __getitem__(self, index: int) -> Sample: ...


class SampleList:
    """Samples in memory."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = list(samples)
        self.lengths = [len(sample.input_ids) for sample in self._samples]
        self.num_loss_tokens = [sample.num_loss_tokens for sample in self._samples]

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


class JoinedSamples:
    """Samples of several sources one after another."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self._parts = parts
        self._first = list(accumulate((len(part.lengths) for part in parts), initial=0))
        self.lengths = [length for part in parts for length in part.lengths]
        self.num_loss_tokens = [count for part in parts for count in part.num_loss_tokens]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"sample {index} of {len(self.lengths)}")
        part = bisect_right(self._first, index) - 1
        return self._parts[part][index - self._first[part]]


class SubsetOfSamples:
    """Some samples of others, in a given order; they are read when they are asked for."""

    def __init__(self, samples: Samples, indices: Sequence[int]) -> None:
        self._samples, self._indices = samples, list(indices)
        self.lengths = [samples.lengths[i] for i in self._indices]
        self.num_loss_tokens = [samples.num_loss_tokens[i] for i in self._indices]

    def __getitem__(self, index: int) -> Sample:
        return self._samples[self._indices[index]]
