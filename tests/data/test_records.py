"""Every bad record is refused with its file and line."""

import json

import pytest

from osft.data.records import DataError, parse_record, read_records

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"messages": []}', "needs a non-empty list 'messages'"),
        ('{"messages": ["hello"]}', r"messages\[0\] must be an object with a role"),
        ('{"messages": [{"role": 7, "content": "a"}]}', "role out of system, developer, user, .*; got 7"),
        ('{"messages": [{"role": "user", "content": 3}]}', r"messages\[0\] needs a string 'content'; got 3"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant message with text"),
        ('{"messages": [{"role": "assistant", "content": "  "}]}', "no assistant message with text"),
        (
            '{"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}',
            "'tool_calls', but its role",
        ),
        (
            '{"messages": [{"role": "user", "content": "a", "reasoning_content": "b"}]}',
            r"messages\[0\] has 'reasoning_content', but its role is 'user'",
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
        (CHAT[:-1] + ', "choices": "b"}', "'choices' must be a list"),
        (CHAT[:-1] + ', "choices": ["x", "y"]}', "must be the assistant's and one of the choices"),
    ],
)
def test_bad_line_is_refused_with_its_place(tmp_path, line, problem):
    file = tmp_path / "data.jsonl"
    file.write_text(f"{CHAT}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"data\.jsonl:3: .*{problem}"):
        list(read_records(str(file)))


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
