"""A file that holds its own hash is what was written, or is named."""

import json

import pytest

from osft.storage.sealed import DamagedFile, read_sealed, sealed, unsealed, write_sealed

VALUE = {"steps": 12, "loss": 0.1 + 0.2, "none": None, "nested": {"ä": [1, 2.5, "x"]}, "path": "/a"}


def test_what_was_written_is_read(tmp_path):
    write_sealed(tmp_path / "file.json", VALUE)
    assert read_sealed(tmp_path / "file.json", "") == VALUE
    assert read_sealed(tmp_path / "file.json", "") == VALUE, "reading changes nothing"


def test_file_of_an_older_release_is_read():
    assert unsealed(json.dumps(VALUE).encode(), "file", "") == VALUE
    assert unsealed(b"{}", "file", "") == {}


def test_no_cut_and_no_flipped_bit_gives_another_value():
    content = (json.dumps(sealed(VALUE), indent=2) + "\n").encode()
    damaged = [content[:length] for length in range(len(content) - 1)]
    damaged += [
        content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
        for at in range(len(content))
        for bit in (1, 2, 4, 8, 16, 32, 64, 128)
    ]
    read = []
    for text in damaged:
        try:
            read.append(unsealed(text, "file", ""))
        except DamagedFile:
            continue
    assert all(value == VALUE for value in read), "but for white space"
    assert len(read) < 0.05 * len(damaged)


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"[]", b"null", b"\xff\xfe", b'{"a": 1', b"<html>"])
def test_what_is_no_object_is_named_with_the_remedy(content, tmp_path):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(DamagedFile, match=rf"{tmp_path}/state.json is damaged: .* Remove it"):
        read_sealed(tmp_path / "state.json", "Remove it")
