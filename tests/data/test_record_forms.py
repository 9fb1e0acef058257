"""Every form of a chat becomes the same messages, or is refused with its place and the remedy."""

import json
import random

import pytest
from datasets import Dataset

from osft.data.records import DataError, Record, parse_record, read_records
from tests.conftest import write_jsonl


def read(value: dict) -> Record:
    return parse_record(json.dumps(value), "f:1")


def said(record: Record) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in record.messages]


ASK, TELL = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
PLAIN = [("user", "hi"), ("assistant", "yo")]
WITH_SYSTEM = [("system", "s"), *PLAIN]
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}
CHAT = "<|user|>\nhi\n<|assistant|>\nyo<|endoftext|>"

FORMS = {
    "openai": ({"messages": [ASK, TELL]}, PLAIN),
    "parts": ({"messages": [ASK | {"content": [{"type": "text", "text": "hi"}]}, TELL]}, PLAIN),
    "several parts": (
        {"messages": [ASK | {"content": [{"type": "input_text", "text": "a"}, "b"]}, TELL]},
        [("user", "a\nb"), ("assistant", "yo")],
    ),
    "refusal part": ({"messages": [ASK, TELL | {"content": [{"type": "refusal", "refusal": "yo"}]}]}, PLAIN),
    "padded part": (
        {"messages": [ASK | {"content": [{"type": "text", "text": "hi", "image_url": None, "annotations": []}]}, TELL]},
        PLAIN,
    ),
    "one part": ({"messages": [ASK | {"content": {"type": "text", "text": "hi"}}, TELL]}, PLAIN),
    "nulls of a client": (
        {"messages": [ASK, TELL | {"refusal": None, "tool_calls": None, "function_call": None, "annotations": []}]},
        PLAIN,
    ),
    "null beside": (
        {"messages": [ASK, TELL], "choices": None, "tools": None, "functions": None, "unmask": None},
        PLAIN,
    ),
    "json text": ({"messages": json.dumps([ASK, TELL])}, PLAIN),
    "texts of json": ({"messages": [json.dumps(ASK), json.dumps(TELL)]}, PLAIN),
    "human and gpt": ({"messages": [ASK | {"role": "human"}, TELL | {"role": "gpt"}]}, PLAIN),
    "from in messages": ({"messages": [HUMAN, GPT]}, PLAIN),
    "developer": ({"messages": [{"role": "developer", "content": "s"}, ASK, TELL]}, [("developer", "s"), *PLAIN]),
    "system beside": ({"system": "s", "messages": [ASK, TELL]}, WITH_SYSTEM),
    "system beside an equal one": (
        {"system": "s", "messages": [{"role": "system", "content": "s"}, ASK, TELL]},
        WITH_SYSTEM,
    ),
    "empty system beside": ({"system": "", "messages": [ASK, TELL]}, PLAIN),
    "ultrachat": ({"prompt": "hi", "prompt_id": "x", "messages": [ASK, TELL]}, PLAIN),
    "sharegpt": ({"conversations": [HUMAN, GPT]}, PLAIN),
    "sharegpt with system": ({"conversations": [HUMAN, GPT], "system": "s"}, WITH_SYSTEM),
    "sharegpt as text": ({"conversations": json.dumps([HUMAN, GPT])}, PLAIN),
    "sharegpt with roles": ({"conversations": [ASK, TELL]}, PLAIN),
    "sharegpt, padded": ({"conversations": [HUMAN | {"role": None, "weight": None}, GPT]}, PLAIN),
    "sharegpt, names of services": ({"conversations": [HUMAN | {"from": "user"}, GPT | {"from": "chatgpt"}]}, PLAIN),
    "sharegpt with a tool": (
        {"conversations": [HUMAN, GPT, {"from": "observation", "value": "o"}, GPT]},
        [*PLAIN, ("tool", "o"), PLAIN[1]],
    ),
    "sharegpt, one conversation": ({"conversation": [HUMAN, GPT]}, PLAIN),
    "capybara": (
        {"conversation": [{"input": "hi", "output": "yo"}, {"input": "a", "output": "b"}]},
        [*PLAIN, ("user", "a"), ("assistant", "b")],
    ),
    "prompt and completion": ({"prompt": "hi", "completion": "yo"}, PLAIN),
    "prompt and completion of trl": ({"prompt": [ASK], "completion": [TELL]}, PLAIN),
    "prompt and response": ({"prompt": "hi", "response": "yo", "system_prompt": "s"}, WITH_SYSTEM),
    "question and answer": ({"question": "hi", "answer": "yo"}, PLAIN),
    "query and response with history": (
        {"query": "hi", "response": "yo", "history": [["a", "b"]], "system": "s"},
        [("system", "s"), ("user", "a"), ("assistant", "b"), *PLAIN],
    ),
    "query and response": ({"query": "hi", "response": "yo"}, PLAIN),
    "problem and solution": ({"problem": "hi", "solution": "yo"}, PLAIN),
    "input and output": ({"input": "hi", "output": "yo"}, PLAIN),
    "alpaca": ({"instruction": "hi", "input": "", "output": "yo"}, PLAIN),
    "alpaca without input": ({"instruction": "hi", "output": "yo", "input": None}, PLAIN),
    "alpaca with input": ({"instruction": "hi", "input": "i", "output": "yo"}, [("user", "hi\ni"), PLAIN[1]]),
    "alpaca with its whole text": (
        {
            "instruction": "hi",
            "input": "",
            "output": "yo",
            "text": "Below is…\n### Instruction:\nhi\n### Response:\nyo",
        },
        PLAIN,
    ),
    "alpaca with history": (
        {"instruction": "hi", "output": "yo", "history": [["a", "b"]], "system": "s"},
        [("system", "s"), ("user", "a"), ("assistant", "b"), *PLAIN],
    ),
    "dolly": ({"instruction": "hi", "context": "i", "response": "yo", "category": "qa"}, [("user", "hi\ni"), PLAIN[1]]),
    "pretraining of granite 7b": ({"messages": [{"role": "pretraining", "content": CHAT}]}, PLAIN),
    "pretraining with system": (
        {"messages": [{"role": "pretraining", "content": "<|system|>\ns\n" + CHAT}], "metadata": "{}", "id": "x"},
        WITH_SYSTEM,
    ),
    "pretraining of granite 3": (
        {
            "messages": [
                {
                    "role": "pretraining",
                    "content": "<|start_of_role|>user<|end_of_role|>hi<|end_of_text|>\n"
                    "<|start_of_role|>assistant<|end_of_role|>yo<|end_of_text|>",
                }
            ]
        },
        PLAIN,
    ),
    "pretraining text": ({"messages": [{"role": "pretraining", "content": "a < b"}]}, [("pretraining", "a < b")]),
    "pretraining of mini-trainer": ({"messages": [{"role": "pretrain", "content": "x"}]}, [("pretraining", "x")]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form):
    value, expected = FORMS[form]
    record = read(value)
    assert said(record) == expected
    assert record.extra == {}
    assert read(record.to_dict()) == record


@pytest.mark.parametrize("form", [name for name, (_, expected) in FORMS.items() if expected == PLAIN])
def test_a_converted_record_is_known_by_what_it_says(form):
    if "pretraining" not in form:  # which has a loss on all of it
        assert read(FORMS[form][0]).content_hash == read({"messages": [ASK, TELL]}).content_hash


@pytest.mark.parametrize("form", [name for name in FORMS if "pretraining of granite" in name or "with system" in name])
def test_chats_of_pretraining_have_a_loss_on_all(form):
    assert read(FORMS[form][0]).unmask == ("pretraining" in form)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
ARGUMENTS = json.dumps(CALL["function"]["arguments"])

CALLS = {
    "objects": {"tool_calls": [CALL]},
    "the wire": {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}]},
    "padded": {"tool_calls": [CALL | {"custom": None, "index": None}], "function_call": None},
    "former form": {"function_call": {"name": "f", "arguments": ARGUMENTS}},
    "call as text": {"tool_calls": [json.dumps(CALL)]},
}


@pytest.mark.parametrize("form", CALLS)
@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_calls_reach_the_template_as_objects(form, content):
    record = read({"messages": [ASK, {"role": "assistant", **content, **CALLS[form]}]})
    assert record.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("", {}), ("{}", {}), (None, {}), (' {"a": "\\"é\\""} ', {"a": '"é"'}), ({"a": []}, {"a": []})],
)
def test_arguments_are_decoded_once(arguments, expected):
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    message = read({"messages": [ASK, {"role": "assistant", "tool_calls": [call]}]}).messages[1]
    assert message["tool_calls"] == [{"id": "1", "function": {"name": "f", "arguments": expected}}]


def test_calls_of_sharegpt():
    one, two = {"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": "{}"}
    for value in (json.dumps(one), [one], json.dumps([one])):
        turns = [HUMAN, {"from": "function_call", "value": value}, {"from": "observation", "value": "o"}, GPT]
        record = read({"conversations": turns, "tools": json.dumps([{"name": "f", "parameters": {}}])})
        assert record.messages[1]["tool_calls"] == [{"type": "function", "function": one}]
        assert record.tools == ({"name": "f", "parameters": {}},)
    swift = [ASK, {"role": "tool_call", "content": json.dumps(one)}, {"role": "tool_response", "content": "o"}, TELL]
    assert read({"messages": swift}).messages[1]["tool_calls"] == [{"type": "function", "function": one}]
    both = read({"conversations": [HUMAN, {"from": "function_call", "value": [one, two]}]}).messages[1]
    assert [call["function"]["name"] for call in both["tool_calls"]] == ["f", "g"]


def test_functions_are_the_former_name_of_tools():
    record = read({"messages": [ASK, TELL], "functions": [{"name": "f"}]})
    assert record.tools == ({"type": "function", "function": {"name": "f"}},)


def test_nulls_that_arrow_adds_to_arguments_and_schemas_are_not_learned(tmp_path):
    calls = [{"function": {"name": "f", "arguments": {"x": 1}}}, {"function": {"name": "g", "arguments": {"y": "z"}}}]
    tools = [
        {"name": "f", "parameters": {"x": {"type": "integer"}}},
        {"name": "g", "parameters": {"y": {"enum": ["z"]}}},
    ]
    rows = [{"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": calls}], "tools": tools}]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "a")
    write_jsonl(tmp_path / "a.jsonl", rows)
    hashes = {
        record.content_hash for name in ("a.parquet", "a", "a.jsonl") for record in read_records(str(tmp_path / name))
    }
    assert len(hashes) == 1


def test_nulls_that_arrow_wrote_into_json_are_not_learned(tmp_path):
    one = {"type": "object", "properties": {"x": {"type": ["integer", "null"], "default": None}}}
    two = {"type": "object", "properties": {"y": {"type": "string", "enum": ["z"]}}}
    tools = [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in (("f", one), ("g", two))]
    calls = [
        {"function": {"name": "f", "arguments": {"x": None}}},
        {"function": {"name": "g", "arguments": {"y": "z"}}},
    ]
    row = {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": calls}], "tools": tools}
    padded = json.loads(json.dumps(row))
    padded["messages"][0] |= {"tool_calls": None}
    padded["messages"][1]["tool_calls"][0]["function"]["arguments"] |= {"y": None}
    padded["messages"][1]["tool_calls"][1]["function"]["arguments"] |= {"x": None}
    padded["tools"][0]["function"]["parameters"]["properties"] |= {"y": None}
    padded["tools"][1]["function"]["parameters"]["properties"] |= {"x": None}
    padded["tools"][1]["function"]["parameters"]["properties"]["y"] |= {"items": None}
    assert read(padded) == read(row)
    assert read(row).to_dict() == row, "a null that a schema allows stays"


def test_nulls_that_json_has_in_arguments_are_learned():
    record = read({"messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}]})
    assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "y": None}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_tables_hold_texts_and_json(tmp_path, name):
    comma = "\t" if name == "a.tsv" else ","
    cells = [json.dumps([ASK, TELL]), '["yo", "no"]', "True", "7"]
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
    lines = [comma.join(("messages", "choices", "unmask", "id")), comma.join(quoted)]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    (record,) = read_records(str(tmp_path / name))
    assert (said(record), record.choices, record.unmask) == (PLAIN, ("yo", "no"), True)
    (tmp_path / name).write_text(comma.join(("prompt", "completion")) + "\n" + comma.join(("007", "NA")) + "\n")
    (record,) = read_records(str(tmp_path / name))
    assert said(record) == [("user", "007"), ("assistant", "NA")]


LOSSES = {
    "openai": (({}, {"weight": 0}, {}, {"weight": 1}), (None, False, None, None)),
    "numbers of arrow": (({}, {"weight": 0.0}, {"weight": None}, {"weight": 1.0}), (None, False, None, None)),
    "axolotl": (({}, {"train": False}, {}, {"train": True}), (None, False, None, None)),
    "a question": (({"train": True}, {}, {"train": False}, {}), (True, None, False, None)),
    "both": (({}, {"weight": 0, "train": False}, {}, {"weight": 1, "train": True}), (None, False, None, None)),
    "of a question": (({"weight": 0}, {}, {}, {}), (False, None, None, None)),
    "none": (({}, {"weight": 1}, {}, {"train": None}), ()),
}


@pytest.mark.parametrize("way", LOSSES)
def test_what_a_message_says_of_its_loss(way):
    keys, expected = LOSSES[way]
    messages = [message | key for message, key in zip([ASK, TELL, ASK, TELL], keys, strict=True)]
    record = read({"messages": messages})
    assert record.learn == expected
    assert said(record) == PLAIN * 2
    assert all(message.keys() == {"role", "content"} for message in record.messages)
    assert read(record.to_dict()) == record
    turns = [{"from": m["role"], "value": m["content"]} | key for m, key in zip(messages, keys, strict=True)]
    assert read({"conversations": turns}) == record
    plain = read({"messages": [ASK, TELL, ASK, TELL]}).content_hash
    assert (record.content_hash == plain) == (expected == ())


def test_other_keys_are_kept_for_the_template():
    record = read(
        {
            "messages": [ASK | {"name": "Ann"}, TELL | {"thinking": "t", "mood": "good", "prefix": False, "empty": ""}],
            "documents": [{"title": "t", "text": "d"}],
            "chat_template_kwargs": {"enable_thinking": False, "nothing": None},
            "style": "short",
            "id": 7,
        }
    )
    assert record.messages[0] == ASK | {"name": "Ann"}
    assert record.messages[1] == TELL | {"thinking": "t", "mood": "good", "prefix": False}
    assert record.extra == {"documents": [{"title": "t", "text": "d"}], "enable_thinking": False, "style": "short"}
    assert read(record.to_dict()) == record
    assert (
        read({"messages": [ASK, TELL], "style": "short"}).content_hash != read({"messages": [ASK, TELL]}).content_hash
    )


def test_reasoning_of_a_one_question_form_is_the_answers():
    record = read({"question": "hi", "reasoning": "because", "answer": "yo"})
    assert record.messages[1] == TELL | {"reasoning": "because"}


def two(**second: object) -> dict:
    return {"messages": [ASK, TELL | second]}


REFUSED = {
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "is a preference, not a chat. Rename 'chosen'"),
    "preference of OpenAI": ({"input": {}, "preferred_output": []}, "is a preference, not a chat"),
    "object of a tool": (
        {"messages": [ASK, TELL, {"role": "tool", "content": {"x": 1}}, TELL]},
        r"messages\[2\].* Write an object as its JSON text",
    ),
    "tokens": ({"input_ids": [1], "labels": [1]}, "holds tokens. Set use_processed_dataset=True"),
    "text": ({"text": "a"}, "this one has 'text'. Plain text is for is_pretraining=True"),
    "message": (ASK, "is a single message"),
    "turn": (HUMAN, "is a single message"),
    "wrapped": ({"data": [{"messages": [ASK, TELL]}]}, r"this one has 'data', a list. Run jq -c '.data\[\]' FILE"),
    "only a prompt": ({"prompt": "a"}, "a record needs a non-empty list 'messages'"),
    "both": ({"messages": [ASK, TELL], "conversations": [HUMAN, GPT]}, "has 'messages' and 'conversations'. Keep one"),
    "two questions": ({"prompt": "a", "question": "b", "answer": "c"}, "has 'prompt', 'answer' and also 'question'"),
    "two answers": ({"prompt": "a", "completion": "b", "response": "c"}, "and also 'response'"),
    "another prompt": (
        {"prompt": "x", "messages": [ASK, TELL]},
        "'prompt' stands beside 'messages' and is none of its",
    ),
    "empty answer": ({"instruction": "a", "output": ""}, "'output' must be a non-empty text; got ''"),
    "number": ({"prompt": "a", "completion": 3}, "'completion' must be a non-empty text; got 3"),
    "context and input": (
        {"instruction": "a", "input": "b", "context": "c", "output": "d"},
        "both 'input' and 'context'",
    ),
    "history": ({"instruction": "a", "output": "b", "history": ["c"]}, "'history' must be a list of pairs"),
    "system": ({"messages": [{"role": "system", "content": "a"}, ASK, TELL], "system": "b"}, "say different things"),
    "no list": ({"conversations": "hello"}, "'conversations' must be a non-empty list"),
    "mixed turn": (
        {"conversations": [HUMAN | {"role": "user"}, GPT]},
        r"conversations\[0\] has both 'from' and 'role'",
    ),
    "turn without from": ({"conversations": [{"value": "a"}, GPT]}, r"messages\[0\] needs a role"),
    "no call": ({"conversations": [HUMAN, {"from": "function_call", "value": "f(1)"}]}, "must be the JSON of a call"),
    "image": (
        {"messages": [ASK | {"content": [{"type": "image_url", "image_url": {"url": "u"}}]}, TELL]},
        r"messages\[0\].content\[0\] is a part of the type 'image_url' without text",
    ),
    "audio": ({"messages": [ASK | {"content": [{"type": "input_audio", "text": "a"}]}, TELL]}, "type 'input_audio'"),
    "key of a part": (
        {"messages": [ASK | {"content": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]}, TELL]},
        "has 'cache_control', which would be dropped",
    ),
    "no parts": ({"messages": [ASK | {"content": []}, TELL]}, r"needs a string 'content'; got \[\]"),
    "null": (two(content=None), "Null is for an assistant's message that only calls tools"),
    "typing error": (two(role="asistant"), "got 'asistant'. Write 'assistant'"),
    "capital": ({"messages": [ASK | {"role": "User"}, TELL]}, "got 'User'. Write 'user'"),
    "weight": (two(weight=0.5), r"messages\[1\]: 'weight' must be 0 or 1.*; got 0.5"),
    "weight text": (two(weight="0"), "'weight' must be 0 or 1"),
    "weight of a question": ({"messages": [ASK | {"weight": 1}, TELL]}, "'weight' 1 is for the assistant's messages"),
    "train": (two(train=1), "'train' must be true or false; got 1"),
    "weight and train": (two(weight=0, train=True), "'weight' is 0, but 'train' is True"),
    "all off": (two(weight=0), "turns the loss of every assistant's message off"),
    "reasoning twice": (two(thinking="a", reasoning_content="b"), "are one to a template, but differ"),
    "reasoning number": (two(reasoning=3), "'reasoning' must be a string; got 3"),
    "two kinds of calls": (
        two(tool_calls=[CALL], function_call={"name": "f"}),
        "has both 'tool_calls' and 'function_call'",
    ),
    "bad arguments": (
        two(tool_calls=[{"function": {"name": "f", "arguments": "{x: 1}"}}]),
        r"messages\[1\]: tool_calls\[0\]: the arguments are a text that is not JSON .* Write an object; got '\{x: 1\}'",
    ),
    "arguments twice encoded": (
        two(tool_calls=[{"function": {"name": "f", "arguments": json.dumps(ARGUMENTS)}}]),
        "the arguments of a tool call must be an object",
    ),
    "one argument twice": (
        two(tool_calls=[{"function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}}]),
        "the key 'x' stands twice",
    ),
    "parameters of a call": (
        two(tool_calls=[{"function": {"name": "f", "parameters": {}}}]),
        "has 'parameters', which is no part of a call. Rename it to 'arguments'",
    ),
    "key of a call": (
        two(tool_calls=[{"function": {"name": "f"}, "why": "x"}]),
        "has 'why', which is no part of a call",
    ),
    "custom tool": (two(tool_calls=[{"type": "custom", "name": "f"}]), "the type 'custom'; only calls of functions"),
    "tools text": ({"messages": [ASK, TELL], "tools": "[]x"}, "'tools' is a text that is not JSON"),
    "python text": ({"messages": str([ASK, TELL])}, "'messages' is a text that is not JSON. Write it with json.dumps"),
    "pretraining beside": ({"messages": [{"role": "pretraining", "content": "x"}, TELL]}, "must be the only one"),
    "pretraining in front": (
        {"messages": [{"role": "pretraining", "content": "x" + CHAT}]},
        "has text before its first turn, 'x'",
    ),
    "template": ({"messages": [ASK, TELL], "chat_template": "{{ x }}"}, "'chat_template' is no variable"),
    "token": ({"messages": [ASK, TELL], "eos_token": "x"}, "'eos_token' is no variable"),
    "option": ({"messages": [ASK, TELL], "chat_template_kwargs": {"tokenize": True}}, "'tokenize' is no variable"),
    "options": ({"messages": [ASK, TELL], "chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object"),
    "two options": (
        {"messages": [ASK, TELL], "chat_template_kwargs": {"a": 1}, "a": 2},
        "'a' and chat_template_kwargs.a differ",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_understood_is_refused_with_its_place_and_a_remedy(what):
    value, problem = REFUSED[what]
    with pytest.raises(DataError, match="^f:1: .*" + problem):
        read(value)


def test_a_text_with_a_key_that_is_not_understood_is_refused():
    assert parse_record('{"text": "a", "id": 7, "metadata": {"x": 1}}', "f:1", allow_text=True).text == "a"
    with pytest.raises(DataError, match="this one has 'text', 'mood'"):
        parse_record('{"text": "a", "mood": "good"}', "f:1", allow_text=True)


def mutated(value: object, numbers: random.Random) -> object:
    """The value with some part of it replaced by something else."""
    if numbers.random() < 0.15:
        return numbers.choice(
            [None, 0, 1.5, True, "", "a", " ", [], {}, [1], {"a": 1}, [None], [{}], "[]", "{", ["a"], [[]]]
        )
    if isinstance(value, dict):
        return {key: mutated(part, numbers) for key, part in value.items() if numbers.random() > 0.05}
    if isinstance(value, list):
        return [mutated(part, numbers) for part in value for _ in range(numbers.choice([1, 1, 1, 1, 0, 2]))]
    return value


def test_whatever_json_there_is_becomes_a_record_or_is_refused_by_name():
    numbers = random.Random(0)
    rich = {
        "tools": [{"function": {"name": "f", "parameters": {"properties": {"x": {}}}}}],
        "choices": ["yo"],
        "unmask": True,
    }
    rows = [value for value, _ in FORMS.values()] + [two(**keys) | rich for keys in CALLS.values()]
    rows += [
        two(weight=1, train=True, thinking="t"),
        {"conversations": [HUMAN, {"from": "function_call", "value": [CALL]}]},
    ]
    kept = 0
    for _ in range(4000):
        value = mutated(numbers.choice(rows), numbers)
        try:
            record = parse_record(json.dumps(value), "f:1", allow_text=True)
        except DataError:
            continue
        kept += 1
        assert parse_record(json.dumps(record.to_dict()), "f:1", allow_text=True) == record
    assert 200 < kept < 3800
