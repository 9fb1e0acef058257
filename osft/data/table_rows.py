"""Rows of CSV, Parquet and Arrow files, one by one; memory holds one row, or one batch of an Arrow file."""

import csv
import io
import sys
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import IO, Any

from osft.data.files import DataError
from osft.data.json_rows import DECODER, not_utf8

Row = dict[str, Any]
ARROW = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
"""What Parquet files, Arrow files and Arrow streams begin with."""
_BATCH = 256
"""Rows of an Arrow file that are in memory together."""


def csv_rows(content: IO[bytes], name: str, *, tab: bool) -> Iterator[tuple[str, Row]]:
    """`file:line` and cells by the header's names; an empty cell is left out. Raises DataError for a bad table."""
    csv.field_size_limit(sys.maxsize)
    lines = _CsvLines(io.TextIOWrapper(content, encoding="utf-8-sig", newline=""))
    header: list[str] | None = None
    try:
        comma = "\t" if tab else ";" if ";" in lines.first and "," not in lines.first else ","
        for cells in csv.reader(lines, delimiter=comma, strict=True):
            source = f"{name}:{lines.start_of_row()}"
            if not any(cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if twice := [cell for cell in header if header.count(cell) > 1]:
                    raise DataError(f"{source}: the header has two columns {twice[0]!r}. Rename one of them")
                continue
            if len(cells) != len(header):
                raise DataError(f"{source}: {len(cells)} cells, but the header has {len(header)}. Quote the text")
            yield source, {column: cell for column, cell in zip(header, cells, strict=True) if cell}
    except UnicodeDecodeError as error:
        raise not_utf8(name, f", after line {lines.count},", error) from None
    except csv.Error as error:
        raise DataError(f"{name}:{lines.count}: not valid CSV: {error}. Put double quotes around the text") from None


class _CsvLines:
    """The lines of a table, counted."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.count, self._begun = 0, 1

    @cached_property
    def first(self) -> str:
        """The first line, which is read whatever comes first."""
        return self._text.readline()

    def __iter__(self) -> Iterator[str]:
        for line in chain([self.first], self._text):
            self.count += 1
            yield line

    def start_of_row(self) -> int:
        """The line that the row begins on whose last line was read."""
        begun, self._begun = self._begun, self.count + 1
        return begun


def arrow_rows(file: Path, name: str, head: bytes, columns: Collection[str] | None) -> Iterator[tuple[str, Row]]:
    """`file: row n` and values of a file that begins with `head`, only of `columns` if any of them is there.

    A null is left out, at every depth. Raises DataError for a damaged file.
    """
    import pyarrow as pa

    number = 0
    try:
        for batch in _batches(file, head, columns):
            types = {field.name: field.type for field in batch.schema}
            for row in batch.to_pylist():
                number += 1
                source = f"{name}: row {number}"
                yield (
                    source,
                    {key: _plain(value, types[key], source) for key, value in row.items() if value is not None},
                )
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        what = "Parquet" if head.startswith(b"PAR1") else "Arrow"
        raise DataError(f"{name} is not a whole {what} file: {error}. Fetch it again") from None


def _batches(file: Path, head: bytes, columns: Collection[str] | None) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if head.startswith(b"PAR1"):
        with pq.ParquetFile(file) as parquet:
            yield from parquet.iter_batches(batch_size=_BATCH, columns=_present(parquet.schema_arrow, columns))
        return
    with pa.memory_map(str(file)) as mapped:
        if head.startswith(b"ARROW1"):
            reader = pa.ipc.open_file(mapped)
            batches: Iterable[Any] = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(mapped)
        kept = _present(reader.schema, columns)
        for batch in batches:
            batch.validate(full=True)  # a damaged file would end the process
            chosen = batch.select(kept) if kept else batch
            for start in range(0, chosen.num_rows, _BATCH):
                yield chosen.slice(start, _BATCH)


def _present(schema: Any, columns: Collection[str] | None) -> list[str] | None:
    """Those of `columns` that are there; None, which is all, if none is."""
    return [name for name in schema.names if name in (columns or ())] or None


def _plain(value: Any, kind: Any, source: str) -> Any:
    """A value of an Arrow column without the keys that Arrow adds to nested records, and with its JSON decoded."""
    import pyarrow as pa

    if value is None:
        return None
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return {key: _plain(part, fields[key], source) for key, part in value.items() if part is not None}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        if pa.types.is_primitive(kind.value_type):  # token ids: nothing in them to take away
            return value
        return [_plain(part, kind.value_type, source) for part in value]
    if pa.types.is_map(kind):
        return {key: _plain(part, kind.item_type, source) for key, part in value if part is not None}
    if isinstance(kind, pa.JsonType):
        try:
            return DECODER.decode(value)
        except ValueError as error:
            raise DataError(f"{source}: not valid JSON ({error}): {value[:80]!r}") from None
    return value
