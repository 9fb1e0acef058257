"""Every bad record is refused with its file and line."""

import pytest

from osft.data.records import DataError, check_names, data_name, parse_record, read_records
from tests.conftest import write_jsonl

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"messages": [', "not valid JSON"),
        ("[1, 2]", "must be a JSON object, this is a list"),
        ('{"prompt": "a"}', "needs a non-empty list 'messages'.*this one has 'prompt'"),
        ('{"messages": []}', "needs a non-empty list 'messages'"),
        ('{"messages": ["hello"]}', r"messages\[0\] needs a role"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "role out of system, user, assistant, tool; got 'bot'"),
        ('{"messages": [{"role": "user", "content": 3}]}', r"messages\[0\] needs a string 'content'; got 3"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant message with text"),
        ('{"messages": [{"role": "assistant", "content": "  "}]}', "no assistant message with text"),
        (CHAT[:-1] + ', "choices": "b"}', "'choices' must be a list"),
        (CHAT[:-1] + ', "choices": ["x", "y"]}', "must be the assistant's and one of the choices"),
    ],
)
def test_bad_line_is_refused_with_its_place(tmp_path, line, problem):
    file = tmp_path / "data.jsonl"
    file.write_text(f"{CHAT}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"data\.jsonl:3: .*{problem}"):
        list(read_records(str(file)))


def test_empty_file_is_refused(tmp_path):
    for name, content in (("empty.jsonl", ""), ("blank.jsonl", "\n \n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name} holds no record"):
            list(read_records(str(tmp_path / name)))


def test_binary_file_is_refused(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="data.jsonl is not UTF-8"):
        list(read_records(str(tmp_path / "data.jsonl")))


def test_file_folder_and_glob_give_the_same_records(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "1"}]}])
    write_jsonl(tmp_path / "b.jsonl", [{"messages": [{"role": "assistant", "content": "2"}]}])
    in_folder = [record.content_hash for record in read_records(str(tmp_path))]
    assert len(in_folder) == 2
    assert in_folder == [record.content_hash for record in read_records(str(tmp_path / "*.jsonl"))]
    assert in_folder[:1] == [record.content_hash for record in read_records(str(tmp_path / "a.jsonl"))]


@pytest.mark.parametrize("uri", ["missing.jsonl", "missing/*.jsonl", "."])
def test_missing_data_is_refused(tmp_path, uri):
    with pytest.raises(FileNotFoundError, match="does not exist|holds no .jsonl file"):
        list(read_records(str(tmp_path / uri)))


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("in/news.jsonl", "news"),
        ("in/week-47/*.jsonl", "week-47"),
        ("in/week-47", "week-47"),
        ("example:web-text", "web-text"),
    ],
)
def test_data_is_named_after_its_file_or_folder(uri, name):
    assert data_name(uri) == name


def test_two_sets_of_one_name_are_refused():
    check_names(["a/x.jsonl", "b/y.jsonl"])
    with pytest.raises(DataError, match=r"called 'x' \(a/x.jsonl, b/x.jsonl\)"):
        check_names(["a/x.jsonl", "b/x.jsonl"])


def test_plain_text_is_for_evaluation_only():
    assert parse_record('{"text": "hello"}', "f:1", allow_text=True).text == "hello"
    with pytest.raises(DataError, match="needs a non-empty list 'messages'"):
        parse_record('{"text": "hello"}', "f:1")
    with pytest.raises(DataError, match="or a non-empty 'text'"):
        parse_record('{"text": " "}', "f:1", allow_text=True)
