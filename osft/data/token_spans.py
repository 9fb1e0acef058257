"""Which tokens of a text lie in given spans of its characters."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character and the one after the last, in a text."""

TokenRange = tuple[int, int]
"""First token and the one after the last."""


class TokenizerMismatchError(ValueError):
    """A span of the text cannot be found among its tokens."""


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> "list[EncodedText]":
    """The tokens of each text, none of which depends on the others. No special token is added."""
    options = {"add_special_tokens": False, "return_offsets_mapping": tokenizer.is_fast, "verbose": False}
    if not (tokenizer.is_fast and texts):  # one that is written in Python gains nothing by many
        return [EncodedText(tokenizer, text, tokenizer(text, **options)["input_ids"], ()) for text in texts]
    encoded = tokenizer(list(texts), return_attention_mask=False, **options)
    parts = zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [EncodedText(tokenizer, *part) for part in parts]


class EncodedText:
    """A text and its tokens.

    The tokenizer says where a token lies in the text, where it can. One that cannot (those written in Python), or that
    says so wrongly, is asked for the tokens of the text up to a span's border: as far as these are those of the whole
    text, they lie before it. Either way what is found is decoded and compared with the text; what a tokenizer's
    normalization changes (case, accents, white space, compatibility forms) does not count as a difference.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text: str, input_ids: list[int], offsets: Sequence[Span]
    ) -> None:
        self.input_ids = input_ids
        self._token_array = np.array(input_ids, dtype=np.int64)  # decodes faster than a list
        self._tokenizer = tokenizer
        self._text = text
        self._starts, self._ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T

    def in_spans(self, spans: Sequence[Span]) -> np.ndarray:
        """(T,) bool: whether each token has a character in one of `spans`.

        Raises TokenizerMismatchError where a span cannot be found, or a token holds letters of it and others beside.
        """
        found = np.zeros(len(self.input_ids), dtype=bool)
        for first, last in spans:
            if first < last:
                found[slice(*self.range_of(first, last))] = True
        return found

    def range_of(self, first: int, last: int) -> TokenRange:
        """The tokens of `text[first:last]`. Raises TokenizerMismatchError."""
        (overlapping,) = np.nonzero((self._starts < last) & (self._ends > first))
        if len(overlapping):
            found = int(overlapping[0]), int(overlapping[-1]) + 1
            if self._problem(found, first, last) is None:
                return found
        found = self._range_by_prefixes(first, last)
        if problem := self._problem(found, first, last):
            raise TokenizerMismatchError(problem)
        return found

    def _range_by_prefixes(self, first: int, last: int) -> TokenRange:
        (start, start_is_clean), (end, end_is_clean) = self._border(first), self._border(last)
        end = max(start, end)
        wanted = _letters(self._text[first:last])
        if not end_is_clean:  # a token reaches over the border: it is the first with which nothing is missing
            while end < len(self.input_ids) and wanted not in _letters(self._decode(start, end)):
                end += 1
        if not start_is_clean:  # several tokens may differ although they lie before the border
            while start + 1 < end and wanted in _letters(self._decode(start + 1, end)):
                start += 1
        return start, end

    def _border(self, position: int) -> tuple[int, bool]:
        """How many tokens `text[:position]` has in common with the text, and whether these are all that it has."""
        prefix = self._tokenizer(self._text[:position], add_special_tokens=False, verbose=False)["input_ids"]
        differing = (i for i, (one, other) in enumerate(zip(prefix, self.input_ids, strict=False)) if one != other)
        common = next(differing, min(len(prefix), len(self.input_ids)))
        return common, common == len(prefix)

    def _problem(self, found: TokenRange, first: int, last: int) -> str | None:
        """Why the tokens are not those of `text[first:last]`; None if they are."""
        wanted, decoded = self._text[first:last], self._decode(*found)
        if decoded == wanted:
            return None
        if self._tokenizer.unk_token_id in self.input_ids[slice(*found)]:
            return None if self._has_pieces(decoded, wanted) else self._differs(decoded, wanted)
        before, is_there, after = _letters(decoded).partition(_letters(wanted))
        if _letters(wanted) and not is_there:
            return self._differs(decoded, wanted)
        if any(character.isalnum() for character in before + after):
            return (
                f"a token joins letters of {wanted[:40]!r} and of the text beside it ({decoded[:60]!r}). Put a special "
                "token or a line break between them into the chat template"
            )
        return None

    def _differs(self, decoded: str, wanted: str) -> str:
        kind = "" if self._tokenizer.is_fast else ", and does not say where tokens lie in a text"
        return (
            f"the tokenizer ({type(self._tokenizer).__name__}) makes {decoded[:60]!r} of {wanted[:60]!r}{kind}, so "
            "what the assistant says cannot be told from the rest. Use the model's fast tokenizer (its tokenizer.json)"
        )

    def _has_pieces(self, decoded: str, wanted: str) -> bool:
        """Whether the decoded text has the wanted one's order, with unknown tokens for what is missing."""
        rest = _letters(wanted)
        for piece in decoded.split(str(self._tokenizer.unk_token)):
            _, is_there, rest = rest.partition(_letters(piece))
            if _letters(piece) and not is_there:
                return False
        return True

    def _decode(self, start: int, end: int) -> str:
        decoded: Any = self._tokenizer.decode(self._token_array[start:end], clean_up_tokenization_spaces=False)
        return str(decoded)


def _letters(text: str) -> str:
    """The text without what tokenizers change: case, accents, compatibility forms, white space, control characters."""
    decomposed = unicodedata.normalize("NFKD", text.casefold()).replace("\u2581", "")
    return "".join(c for c in decomposed if c.isalnum() or unicodedata.category(c)[0] not in "ZCM")
