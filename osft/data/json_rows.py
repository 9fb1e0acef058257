"""JSON objects of a file, one by one: lines, an array, or objects over several lines; memory holds one of them."""

import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from osft.data.files import DataError

Row = dict[str, Any]
_HEAD = 1 << 12
"""Bytes that tell an array from lines."""
_CHARACTERS = 1 << 16
"""Read together of an array."""


def json_rows(content: io.BufferedReader, name: str) -> Iterator[tuple[str, Row]]:
    """`file:line` and object of each record. Raises DataError at the first that is none."""
    if content.peek(_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _values(_JsonStream("", 1, content, name))
        return
    for number, raw in enumerate(content, start=1):
        first = _text(raw, name, number)
        if first.strip():
            break
    else:
        return
    source = f"{name}:{number}"
    try:
        value = _decode(first, source)
    except json.JSONDecodeError as error:
        if not (first.lstrip().startswith("{") and _is_incomplete(error, len(first.strip()))):
            raise _not_json(source, error, first) from None
        yield from _values(_JsonStream(first, number, content, name))  # an object over several lines
        return
    yield source, value
    yield from _lines(content, name, number)


def _is_incomplete(error: json.JSONDecodeError, length: int) -> bool:
    """Whether a text of so many characters may be the beginning of valid JSON."""
    return error.msg.startswith("Unterminated") or error.pos > length - 8


def _text(raw: bytes, name: str, number: int) -> str:
    try:
        return raw.decode("utf-8").lstrip("\ufeff")  # also where files with a mark were joined
    except UnicodeDecodeError as error:
        raise not_utf8(name, f":{number}", error) from None


def _lines(content: IO[bytes], name: str, number: int) -> Iterator[tuple[str, Row]]:
    for line_number, raw in enumerate(content, start=number + 1):
        line = _text(raw, name, line_number)
        if line.strip():
            source = f"{name}:{line_number}"
            try:
                yield source, _decode(line, source)
            except json.JSONDecodeError as error:
                raise _not_json(source, error, line) from None


def parse_line(line: str, source: str) -> Row:
    """The object of a JSON line. Raises DataError that names `source`."""
    try:
        return _decode(line, source)
    except json.JSONDecodeError as error:
        raise _not_json(source, error, line) from None


def _decode(text: str, source: str) -> Row:
    try:
        value = DECODER.decode(text.strip())
    except _Duplicate as error:
        raise DataError(f"{source}: {error}") from None
    except RecursionError:
        raise DataError(f"{source}: the JSON is nested too deeply. Drop the line") from None
    return _checked(value, text, source)


def _checked(value: Any, text: str, source: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{source}: a record must be a JSON object, this is a {type(value).__name__}")
    if "\\ud" in text.lower() and re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
        raise DataError(f"{source}: an escape \\ud800 … \\udfff stands alone, which is no character. Repair the text")
    return value


def _not_json(source: str, error: json.JSONDecodeError, text: str) -> DataError:
    problem = f"not valid JSON ({error.msg} at column {error.colno}): {text.strip()[:80]!r}"
    return DataError(f"{source}: {problem}")


class _Duplicate(ValueError):
    pass


def _distinct(pairs: list[tuple[str, Any]]) -> Row:
    """An object; JSON would let the last of two equal keys win in silence."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Duplicate(f"the key {twice!r} stands twice in an object. Remove one of them")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


class _JsonStream:
    """JSON values one after another, read piece by piece."""

    def __init__(self, first: str, line: int, content: IO[bytes], name: str) -> None:
        self.name, self.line = name, line
        self._rest = io.TextIOWrapper(content, encoding="utf-8-sig" if not first else "utf-8")
        self._buffer, self._at = first, 0

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            rest = self._buffer[self._at :]
            found = rest.lstrip(" \t\r\n\ufeff")
            self.skip(len(rest) - len(found))
            if found:
                return found[0]
            if not self._fill(_CHARACTERS):
                return ""

    def skip(self, count: int) -> None:
        """Pass over so many characters."""
        self.line += self._buffer.count("\n", self._at, self._at + count)
        self._at += count

    def value(self, source: str) -> Row:
        """The object that begins here. Raises DataError that names `source`."""
        while True:
            try:
                value, end = DECODER.raw_decode(self._buffer, self._at)
                break
            except _Duplicate as error:
                raise DataError(f"{source}: {error}") from None
            except json.JSONDecodeError as error:
                if not (_is_incomplete(error, len(self._buffer)) and self._fill(max(_CHARACTERS, len(self._buffer)))):
                    shown = self._buffer[self._at : self._at + 80]
                    within = json.JSONDecodeError(error.msg, self._buffer[self._at :], error.pos - self._at)
                    where = f"{source}: not valid JSON ({within.msg} in line {self.line + within.lineno - 1}"
                    raise DataError(f"{where}, column {within.colno}): {shown!r}") from None
        row = _checked(value, self._buffer[self._at : end], source)
        self.skip(end - self._at)
        return row

    def _fill(self, count: int) -> bool:
        try:
            more = self._rest.read(count)
        except UnicodeDecodeError as error:
            raise not_utf8(self.name, f", after line {self.line},", error) from None
        self._buffer, self._at = self._buffer[self._at :] + more, 0
        return bool(more)


def _values(stream: _JsonStream) -> Iterator[tuple[str, Row]]:
    """The objects of an array, or those that stand one after another."""
    in_array = stream.peek() == "["
    if in_array:
        stream.skip(1)
    while (begin := stream.peek()) and not (in_array and begin == "]"):
        source = f"{stream.name}:{stream.line}"
        yield source, stream.value(source)
        if not in_array:
            continue
        if stream.peek() not in (",", "]"):
            raise DataError(f"{stream.name}:{stream.line}: a comma or the end of the array is missing. It may be cut")
        if stream.peek() == ",":
            stream.skip(1)
            if stream.peek() == "]":
                raise DataError(f"{stream.name}:{stream.line}: a comma stands before the end of the array. Remove it")
    if in_array:
        if not begin:
            raise DataError(f"{stream.name}:{stream.line}: the array has no end. The file is cut; fetch it again")
        stream.skip(1)
        if stream.peek():
            raise DataError(f"{stream.name}:{stream.line}: there is more after the end of the array. Give one array")


def not_utf8(name: str, place: str, error: UnicodeDecodeError) -> DataError:
    """What to raise for a text in another encoding."""
    return DataError(
        f"{name}{place} is not UTF-8 text: {error.reason} at byte {error.start}. Convert the file, if it is Latin-1 "
        f"with: iconv -f ISO-8859-1 -t UTF-8 {name} > converted"
    )
