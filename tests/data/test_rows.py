"""Rows come out of every format as they were put in, one by one; what cannot be read is refused by name."""

import bz2
import gzip
import json
import lzma
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, List

from osft.data.files import DataError
from osft.data.rows import read_rows

ROWS = [{"a": 1, "b": 'x, "y"\n é'}, {"b": "🙂", "c": [{"d": None}]}, {"a": 2.5}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
PRETTY = "\n".join(json.dumps(row, indent=2) for row in ROWS)
BOM = "\ufeff"

TEXTS = {
    "lines": LINES,
    "lines with a byte order mark": BOM + LINES,
    "files with a mark, joined": BOM + LINES.replace("\n", "\n" + BOM, 1),
    "lines of Windows": LINES.replace("\n", "\r\n"),
    "blank lines": "\n \n" + LINES.replace("\n", "\n\n"),
    "no end of line": LINES.rstrip("\n"),
    "raw characters": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "array": json.dumps(ROWS),
    "array over lines": json.dumps(ROWS, indent=2),
    "array with a byte order mark": BOM + json.dumps(ROWS, indent=1),
    "array after white space": "\n\n  " + json.dumps(ROWS) + "\n\n",
    "array of one object a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]",
    "objects over lines": PRETTY,
    "objects over lines after a blank one": BOM + "\n" + PRETTY.replace("\n", "\r\n"),
}


def values(path) -> list[dict]:
    return [row for _, row in read_rows(str(path))]


def sources(path) -> list[str]:
    return [source.removeprefix(str(path)) for source, _ in read_rows(str(path))]


@pytest.mark.parametrize("form", TEXTS)
def test_json_in_every_layout(tmp_path, form):
    (tmp_path / "a.json").write_bytes(TEXTS[form].encode())
    assert values(tmp_path / "a.json") == ROWS


@pytest.mark.parametrize("form", ["lines", "array with a byte order mark"])
@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst", "lz4", "two gz"])
def test_every_compression_of_every_layout_whatever_its_name(tmp_path, form, kind):
    content = TEXTS[form].encode()
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    if kind == "two gz":  # as `cat a.gz b.gz` makes it
        packed = gzip.compress(content[:9]) + gzip.compress(content[9:])
    elif kind in compress:
        packed = compress[kind](content)
    else:
        codec = {"zst": "zstd", "lz4": "lz4"}[kind]
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as out:
            out.write(content)
        packed = sink.getvalue().to_pybytes()
    for name in (f"a.jsonl.{kind}", "a.jsonl"):
        (tmp_path / name).write_bytes(packed)
        assert values(tmp_path / name) == ROWS


def test_sources_are_the_lines_on_which_records_begin(tmp_path):
    (tmp_path / "a").write_text("\n" + LINES.replace("\n", "\n\n", 1))
    assert sources(tmp_path / "a") == [":2", ":4", ":5"]
    (tmp_path / "a").write_text(json.dumps(ROWS, indent=2))
    lines = json.dumps(ROWS, indent=2).splitlines()
    assert sources(tmp_path / "a") == [f":{number}" for number, line in enumerate(lines, 1) if line == "  {"]
    (tmp_path / "a").write_text("\n" + PRETTY)
    lines = ["", *PRETTY.splitlines()]
    assert sources(tmp_path / "a") == [f":{number}" for number, line in enumerate(lines, 1) if line == "{"]


def test_a_long_array_in_one_line_is_read_piece_by_piece(tmp_path):
    rows = [{"text": "é" * (37 * i % 9000), "n": i} for i in range(1200)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    size = (tmp_path / "a.json").stat().st_size
    assert values(tmp_path / "a.json") == rows
    tracemalloc.start()
    for _ in read_rows(str(tmp_path / "a.json")):
        pass
    assert tracemalloc.get_traced_memory()[1] < size / 3
    tracemalloc.stop()


TABLE = [{"messages": '[{"role": "user"}]', "id": "007"}, {"messages": 'two\nlines, "quoted"'}, {"id": "NA"}]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "semicolon.csv", "mark.csv", "windows.csv"])
def test_cells_stay_texts_and_empty_ones_are_not_there(tmp_path, suffix):
    comma = {"tsv": "\t", "semicolon.csv": ";"}.get(suffix, ",")

    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [comma.join(("messages", "id"))]
    lines += [comma.join(cell(row[key]) if key in row else "" for key in ("messages", "id")) for row in TABLE]
    text = ("\r\n" if suffix == "windows.csv" else "\n").join(lines) + "\n\n"
    (tmp_path / f"a.{suffix}").write_bytes(((BOM if suffix == "mark.csv" else "") + text).encode())
    assert values(tmp_path / f"a.{suffix}") == TABLE, "no number, no NaN"
    assert sources(tmp_path / f"a.{suffix}") == [":2", ":3", ":5"]


NESTED = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "weight": 0}], "id": 1},
    {"messages": [{"role": "user", "calls": [{"arguments": {"x": 1}}, {"arguments": {"y": "z"}}]}]},
]


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream", "datasets", "dataset dict"])
def test_keys_that_arrow_adds_are_not_there(tmp_path, kind):
    dataset = Dataset.from_list(NESTED)
    path = tmp_path / "a"
    table = dataset.data.table
    if kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "datasets":
        dataset.save_to_disk(path, num_shards=2)
    elif kind == "dataset dict":
        from datasets import DatasetDict

        DatasetDict({"anything": dataset}).save_to_disk(path)
    else:
        writer = pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream
        with writer(str(path), table.schema) as out:
            out.write_table(table)
    assert dataset[1]["messages"][0]["content"] is None, "Arrow adds it"
    assert values(path) == NESTED


def test_rows_of_arrow_files_are_counted(tmp_path):
    Dataset.from_list([{"n": n} for n in range(600)]).to_parquet(tmp_path / "a.parquet")
    read = list(read_rows(str(tmp_path / "a.parquet")))
    assert [row["n"] for _, row in read] == list(range(600))
    assert (read[0][0], read[-1][0]) == (f"{tmp_path}/a.parquet: row 1", f"{tmp_path}/a.parquet: row 600")


def test_json_columns_keep_what_each_row_has(tmp_path):
    rows = [{"tools": [{"a": None, "b": 1}]}, {"tools": [{"c": "x"}, {"d": [1, "2"]}]}]
    dataset = Dataset.from_dict({"tools": [row["tools"] for row in rows]}, features=Features({"tools": List(Json())}))
    dataset.save_to_disk(tmp_path / "a")
    dataset.to_parquet(tmp_path / "b.parquet")
    assert values(tmp_path / "a") == rows
    assert values(tmp_path / "b.parquet") == rows


REFUSED = {
    "utf-16": (LINES.encode("utf-16"), "is not UTF-8 text, but UTF-16. Convert it: iconv -f UTF-16"),
    "utf-16 without a mark": (LINES.encode("utf-16-le"), "is not UTF-8 text, but UTF-16"),
    "utf-32": (LINES.encode("utf-32"), "is not UTF-8 text, but UTF-32. Convert it: iconv -f UTF-32"),
    "latin-1": (LINES.encode() + '{"a": "é"}\n'.encode("latin-1"), r":4 is not UTF-8 text: .* iconv -f ISO-8859-1"),
    "latin-1 array": ('[{"a": "é"}]'.encode("latin-1"), "is not UTF-8 text"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer.*`git lfs pull`"),
    "zip": (b"PK\x03\x04" + b"\x00" * 99, "is a zip archive"),
    "tar": (b"a.jsonl".ljust(257, b"\x00") + b"ustar".ljust(300, b"\x00"), "is a tar archive. Unpack it: tar xf"),
    "tar.gz": (gzip.compress(b"a".ljust(257, b"\x00") + b"ustar".ljust(300, b"\x00")), "is a tar archive"),
    "binary": (bytes(range(200)), "is not UTF-8 text, nor another format"),
    "cut gzip": (gzip.compress(LINES.encode() * 99)[:-20], "cannot be decompressed: .* cut or damaged"),
    "cut xz": (lzma.compress(LINES.encode() * 99)[:-20], "cannot be decompressed"),
    "damaged bzip2": (bz2.compress(LINES.encode() * 99)[:40] + b"\x00" * 60, "cannot be decompressed"),
    "cut parquet": (b"PAR1" + b"\x00" * 50, "is not a whole Parquet file: .* Fetch it again"),
    "cut arrow": (b"ARROW1\x00\x00" + b"\x07" * 50, "is not a whole Arrow file"),
    "compressed parquet": (gzip.compress(b"PAR1" + b"\x00" * 50), "is a compressed Parquet or Arrow file"),
    "empty": (b"", "holds no record: it is empty"),
    "blank": (b" \n\n ", "holds no record"),
    "only a mark": (BOM.encode(), "holds no record"),
    "empty array": (b"[]", "holds no record"),
    "cut line": (LINES.encode() + b'{"a": ', r":4: not valid JSON \(Expecting value at column 6\): '\{\"a\":'"),
    "text": (b"hello\n", r":1: not valid JSON \(Expecting value at column 1\): 'hello'"),
    "html": (b"<!DOCTYPE html>\n<html>", ":1: not valid JSON"),
    "python": (b"{'a': 1}\n", ":1: not valid JSON"),
    "line of an array": (LINES.encode() + b"[1]\n", ":4: a record must be a JSON object, this is a list"),
    "array of numbers": (b"[1, 2]", ":1: a record must be a JSON object, this is a int"),
    "cut array": (b'[{"a": 1},\n{"a": 2}', ":2: a comma or the end of the array is missing. It may be cut"),
    "cut in an object": (b'[{"a": 1},\n{"a": ', r":2: not valid JSON \(Expecting value in line 2"),
    "cut in a text": (b'[{"a": 1},\n{"a": "bc', r":2: not valid JSON \(Unterminated string"),
    "cut after a comma": (b'[{"a": 1},', "the array has no end. The file is cut"),
    "bad object of an array": (b'[{"a": 1},\n{"a": 2,\n b: 3}]', r":2: not valid JSON \(.* in line 3"),
    "comma at the end": (b'[{"a": 1},]', "a comma stands before the end of the array"),
    "two arrays": (b'[{"a": 1}]\n[{"a": 2}]', ":2: there is more after the end of the array"),
    "one key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}\n', ":1: the key 'c' stands twice in an object"),
    "one key twice in an array": (b'[{"a": 1, "a": 2}]', ":1: the key 'a' stands twice in an object"),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"\n", ":1: the JSON is nested too deeply"),
    "surrogate": (b'{"a": "\\ud800"}\n', ":1: an escape .* stands alone"),
    "surrogate in an array": (b'[{"a": "\\udc00"}]', ":1: an escape .* stands alone"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, what):
    content, problem = REFUSED[what]
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.jsonl.*" + problem):
        values(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("a,b\n1,2\n1\n", ":3: 1 cells, but the header has 2"),
        ("a,b\n1,2,3\n", ":2: 3 cells, but the header has 2. Quote the text"),
        ("a,a\n1,2\n", ":1: the header has two columns 'a'"),
        ('a,b\n1,"2\n', ":[23]: not valid CSV"),
        ('a,b\n1,"2"3\n', ":2: not valid CSV"),
        ("a,b\n", "holds no record"),
        ("", "holds no record"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_with_its_line(tmp_path, table, problem):
    (tmp_path / "bad.csv").write_text(table)
    with pytest.raises(DataError, match=r"bad\.csv" + problem if problem[0] == ":" else problem):
        values(tmp_path / "bad.csv")


def test_a_cut_zstd_file_is_refused(tmp_path):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(LINES.encode() * 999)
    (tmp_path / "a.jsonl.zst").write_bytes(sink.getvalue().to_pybytes()[:-9])
    with pytest.raises(DataError, match=r"a.jsonl.zst cannot be decompressed"):
        values(tmp_path / "a.jsonl.zst")


def packed(kind: str, path) -> bytes:
    rows = [{"text": f"é{number}" * 5, "n": number} for number in range(60)]
    text = json.dumps(rows, ensure_ascii=False).encode()
    if kind in ("zstd", "lz4"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, kind) as out:
            out.write(text)
        return sink.getvalue().to_pybytes()
    table = Dataset.from_list(rows).data.table
    if kind == "parquet":
        pq.write_table(table, path)
        return path.read_bytes()
    if kind.startswith("arrow"):
        with (pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream)(str(path), table.schema) as out:
            out.write_table(table)
        return path.read_bytes()
    return {"array": bytes, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}[kind](text)


@pytest.mark.parametrize(
    "kind", ["array", "gzip", "bzip2", "xz", "zstd", "lz4", "parquet", "arrow file", "arrow stream"]
)
def test_a_file_that_is_cut_or_damaged_anywhere_is_refused_and_never_read_short(tmp_path, kind):
    whole, numbers = packed(kind, tmp_path / "whole"), random.Random(0)
    for number in range(40):
        at = numbers.randrange(1, len(whole) - 8)
        damaged = bytearray(whole)
        damaged[at] = (damaged[at] + 1) % 256
        (tmp_path / "a").write_bytes(whole[:at] if number % 2 else damaged)
        try:
            read = len(values(tmp_path / "a"))
        except DataError:
            continue
        assert number % 2 == 0, f"cut after {at} of {len(whole)} bytes"
        assert read == 60
