"""Texts that benchmarks train and measure on."""

import pytest
import torch

from benchmarks.texts import blocks_of_tokens, manual_pages, plain, scattered_blocks


def test_manual_page_becomes_plain_text():
    page = '.\\" comment\n.TH LS 1\n.SH BEZEICHNUNG\nls \\- Ordner\\-Inhalt\n.PP\n\\fB\\-a\\fR, \\f(CWx\\fP\n'
    assert plain(page) == "BEZEICHNUNG\nls - Ordner-Inhalt\n-a, x"


class Letters:
    """A tokenizer of one token a letter."""

    eos_token_id = 0

    def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_blocks_are_of_one_stream_with_ends_of_text():
    blocks = blocks_of_tokens(Letters(), ["ab", "cde", "fgh"], 2, 3)
    assert blocks.tolist() == [[ord("a"), ord("b"), 0], [ord("c"), ord("d"), ord("e")]]
    with pytest.raises(ValueError, match="3 tokens of text are too few for 2 samples of 3"):
        blocks_of_tokens(Letters(), ["ab"], 2, 3)


def test_scattered_blocks_are_different_ones_of_a_longer_stream():
    stream = blocks_of_tokens(Letters(), ["abcdefghijkl"], 6, 2)
    found = scattered_blocks(Letters(), ["abcdefghijkl"], 2, 2, out_of=3)
    rows = {tuple(row) for row in stream.tolist()}
    assert len({tuple(row) for row in found.tolist()} & rows) == 2
    assert not torch.equal(found, stream[:2])


def test_package_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="manpages-xx: there is no apt-get here. .* package manpages-xx to .*"):
        manual_pages("manpages-xx", tmp_path)
    assert not (tmp_path / "manpages-xx").exists()
