"""Every bad record is refused with its file and line."""

import json

import pytest

from osft.data.records import DataError, parse_record, read_records
from tests.conftest import write_jsonl

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"messages": [', "not valid JSON"),
        ("[1, 2]", "must be a JSON object, this is a list"),
        ('{"prompt": "a"}', "needs a non-empty list 'messages'.*this one has 'prompt'"),
        ('{"messages": []}', "needs a non-empty list 'messages'"),
        ('{"messages": ["hello"]}', r"messages\[0\] must be an object with a role"),
        ('{"messages": [{"role": 7, "content": "a"}]}', "role out of system, developer, user, .*; got 7"),
        ('{"messages": [{"role": "user", "content": 3}]}', r"messages\[0\] needs a string 'content'; got 3"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant message with text"),
        ('{"messages": [{"role": "assistant", "content": "  "}]}', "no assistant message with text"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "needs a string 'content'; got None"),
        (
            '{"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}',
            "'tool_calls', but its role",
        ),
        (
            '{"messages": [{"role": "user", "content": "a", "reasoning_content": "b"}]}',
            r"messages\[0\] has 'reasoning_content', but its role is 'user'",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a", "reasoning_content": 1}]}',
            r"messages\[0\]: 'reasoning_content' must be a string; got 1",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": {"name": "f"}}]}',
            "'tool_calls' must be a list",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}',
            "a 'function' that has a name",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]}',
            "arguments of a tool call must be an object or a JSON text",
        ),
        (
            '{"messages": [{"role": "tool", "content": "a", "name": 1}]}',
            "'name' must be a string; got 1",
        ),
        (CHAT[:-1] + ', "tools": "f"}', "'tools' must be a list of JSON schemas"),
        (CHAT[:-1] + ', "tools": [{"type": "function"}]}', "'tools' must be a list of JSON schemas"),
        (CHAT[:-1] + ', "unmask": "yes"}', "'unmask' must be true or false; got 'yes'"),
        (CHAT[:-4] + '\\ud800"}]}', "an escape .* stands alone"),
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
    with pytest.raises(FileNotFoundError, match="does not exist|holds no data file"):
        list(read_records(str(tmp_path / uri)))


def test_plain_text_is_for_evaluation_only():
    assert parse_record('{"text": "hello"}', "f:1", allow_text=True).text == "hello"
    with pytest.raises(DataError, match="needs a non-empty list 'messages'"):
        parse_record('{"text": "hello"}', "f:1")
    with pytest.raises(DataError, match="or a non-empty 'text'"):
        parse_record('{"text": " "}', "f:1", allow_text=True)


def test_hashes_of_plain_chats_are_those_of_the_first_release():
    chat = (
        CHAT[:-1]
        .replace('"a"', '"2+2?"')
        .replace('"b"', '"4 é"')
        .replace("[{", '[{"role": "system", "content": "Be brief."}, {')
    )
    record = parse_record(chat + ', "choices": ["4 é", "5"], "unmask": false, "tools": [], "id": 7}', "f:1")
    assert record.content_hash == "ad732232c1bf26109000640e14c286f89f1187dcbb13c5a41f6c5db18739631d"
    assert record.prompt_hash == "8ea49d0a6b470a9aac27b32e4573ffb5b8089d8c233d0c8f778668abf55509c4"
    plain = parse_record(CHAT, "f:1").content_hash
    assert plain == "d8abc7071a7882ade3acb987e3714d70637fbffaf3775d3411db89f0cbd12b76"
    assert parse_record(CHAT[:-1] + ', "unmask": true}', "f:1").content_hash != plain
    assert parse_record(CHAT[:-1] + ', "tools": [{"name": "f"}]}', "f:1").content_hash != plain


@pytest.mark.parametrize("content", ['"content": null, ', '"content": "", ', ""])
def test_calls_tools_and_reasoning_come_back_as_they_were_written(content):
    call = '{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}'
    line = (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", '
        + content
        + f'"reasoning_content": "r", "tool_calls": [{call}]}}, '
        '{"role": "tool", "content": "2", "tool_call_id": "1", "name": "f"}, {"role": "assistant", "content": "b"}], '
        '"tools": [{"type": "function", "function": {"name": "f"}}], "unmask": true}'
    )
    record = parse_record(line, "f:1")
    assert record.messages[1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "r",
        "tool_calls": [json.loads(call)],
    }
    assert record.messages[2] == {"role": "tool", "content": "2", "tool_call_id": "1", "name": "f"}
    assert record.to_dict().keys() == {"messages", "tools", "unmask"}
    assert parse_record(json.dumps(record.to_dict()), "f:1") == record
