"""The rows of data files, one by one, whatever format they have: what a file is, its first bytes say.

    JSON lines; a JSON array or objects over several lines, also without line breaks     `file:line`
    CSV and TSV with a header; an empty cell is not there                               `file:line`
    Parquet, Arrow (`datasets` folders have it); a null in it is not there              `file: row n`
    any text format compressed with gzip, bzip2, xz, zstd or lz4

JSON is read as it is written, not through Arrow: Arrow gives all rows the same nested keys, refuses a key that is a
text here and an object there, and would make numbers and missing values of the cells of a CSV file. Memory holds one
row, or one batch of an Arrow file.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from osft import storage
from osft.data.files import DataError, data_files, suffixes
from osft.data.json_rows import json_rows
from osft.data.table_rows import ARROW, arrow_rows, csv_rows

Row = dict[str, Any]
_HEAD = 1 << 12
"""Bytes that tell what a file is."""

_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_ARROW_CODECS = {b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
_REFUSED = {
    b"version https://git-lfs": "is a Git LFS pointer, not the data. Run `git lfs pull` where it was cloned",
    b"PK\x03\x04": "is a zip archive or an Excel workbook. Unpack it, or save the table as CSV",
    b"SQLite format 3": "is an SQLite database. Export the table as CSV",
    b"ORC": "is an ORC file. Convert it to Parquet",
    b"\x89HDF": "is an HDF5 file. Convert it to Parquet",
    b"7z\xbc\xaf": "is a 7z archive. Unpack it",
    b"Rar!": "is a RAR archive. Unpack it",
}


def read_rows(uri: str, columns: Collection[str] | None = None) -> Iterator[tuple[str, Row]]:
    """Source and row of every file of a data path, in the files' order (`osft.data.files.data_files`).

    Of Parquet and Arrow files only `columns` are read, if any of them is there.

    Raises FileNotFoundError for a missing path, and DataError at the first bad row or for a file without one.
    """
    for file in data_files(uri):
        yield from read_file(file, columns)


def read_file(file: Path, columns: Collection[str] | None = None) -> Iterator[tuple[str, Row]]:
    """As `read_rows`, of one file."""
    name, found = storage.name_of(file), False
    for source, row in _rows(file, name, columns):
        found = True
        yield source, row
    if not found:
        raise DataError(f"{name} holds no record: it is empty. Give at least one")


def _rows(file: Path, name: str, columns: Collection[str] | None) -> Iterator[tuple[str, Row]]:
    with _decompressed(file, name) as content:
        head = content.peek(_HEAD)[:_HEAD]  # of a file that is longer, at least a buffer
        _check_head(head, name)
        if head.startswith(ARROW):
            if not isinstance(content.raw, io.FileIO):
                raise DataError(f"{name} is a compressed Parquet or Arrow file. Decompress it first")
            yield from arrow_rows(file, name, head, columns)
        elif suffixes(file) in (".csv", ".tsv"):
            yield from csv_rows(content, name, tab=suffixes(file) == ".tsv")
        else:
            yield from json_rows(content, name)


@contextmanager
def _decompressed(file: Path, name: str) -> Iterator[io.BufferedReader]:
    with file.open("rb") as raw:
        magic = raw.peek(8)[:8]
        opener = next((opener for start, opener in _OPENERS.items() if magic.startswith(start)), None)
        codec = next((codec for start, codec in _ARROW_CODECS.items() if magic.startswith(start)), None)
        if not opener and not codec:
            yield raw
            return
        try:
            if opener:
                with opener(raw, "rb") as content, io.BufferedReader(content) as buffered:
                    yield buffered
            else:
                import pyarrow as pa

                with pa.input_stream(raw, compression=codec) as content, io.BufferedReader(content) as buffered:
                    yield buffered
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise DataError(f"{name} cannot be decompressed: {error}. It is cut or damaged; fetch it again") from None


def _check_head(head: bytes, name: str) -> None:
    """Raise DataError for what is no data, by its first bytes."""
    for start, problem in _REFUSED.items():
        if head.startswith(start):
            raise DataError(f"{name} {problem}")
    if head[257:262] == b"ustar":
        raise DataError(f"{name} is a tar archive. Unpack it: tar xf {name}")
    wide = b"\x00" in head[:64] and not head.startswith(ARROW)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (wide and head.count(b"\x00") * 3 > len(head)):
        encoding = "UTF-32" if head.count(b"\x00") * 3 > 2 * len(head) else "UTF-16"
        raise DataError(
            f"{name} is not UTF-8 text, but {encoding}. Convert it: iconv -f {encoding} -t UTF-8 {name} > converted"
        )
    if wide:
        raise DataError(f"{name} is not UTF-8 text, nor another format that can be read. Give JSON lines")
