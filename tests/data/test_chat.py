"""The loss mask covers exactly what the assistant would have generated."""

import json

import pytest

from osft.data.chat import IGNORE, tokenize
from osft.data.records import DataError, Record, parse_record
from tests.conftest import byte_tokenizer
from tests.data.templates import shaped_tokenizer

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def chat(*turns: tuple[str, str]) -> Record:
    return Record(source="f:1", messages=tuple({"role": role, "content": content} for role, content in turns))


def learned(record: Record, tokenizer, **options) -> str:
    sample = tokenize(record, tokenizer, **options)
    assert all(label in (IGNORE, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))
    return tokenizer.decode([label for label in sample.labels if label != IGNORE])


def test_plain_text_counts_whole_and_is_cut(tokenizer):
    sample = tokenize(Record(source="f:1", text="x" * 100), tokenizer, max_text_tokens=10)
    assert sample.input_ids == sample.labels
    assert len(sample.input_ids) == 10
    assert sample.num_loss_tokens == 9, "nothing predicts the first token"


def test_tokenizer_without_chat_template_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="f:1: the model's tokenizer has no chat template"):
        tokenize(chat(("user", "a"), ("assistant", "b")), tokenizer)


def test_text_that_the_template_changes_counts_as_rendered(tokenizer):
    shouting = byte_tokenizer()
    shouting.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | upper | trim")
    record = chat(("user", " say no"), ("assistant", " no\n"), ("user", "again"), ("assistant", "No."))
    assert learned(record, shouting) == "NO<|im_end|>NO.<|im_end|>"
    assert learned(record, shouting, unmask_messages=True) == (
        "SAY NO<|im_end|>NO<|im_end|>AGAIN<|im_end|>NO.<|im_end|>"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] if m['role'] == 'user' }}{% endfor %}",
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['role'] + ':' }}"
        "{{ m['content'] if m['role'] == 'user' else m['content'] | length | string }}{% endfor %}",
    ],
    ids=["left out", "repeated", "summarized"],
)
def test_message_that_cannot_be_located_is_refused_rather_than_masked_wrongly(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"f:1: messages\[1\] cannot be located"):
        tokenize(chat(("user", "a"), ("assistant", "b")), tokenizer)


def test_chat_that_the_template_refuses_is_named():
    with pytest.raises(DataError, match="f:1: the model's chat template refuses this chat: System role not supported"):
        tokenize(chat(("system", "a"), ("user", "a"), ("assistant", "b")), shaped_tokenizer("gemma"))


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str | None, reasoning: str = "") -> dict:
    return {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {})


def calls(*names: str, text: str | None = None, reasoning: str = "") -> dict:
    functions = [{"type": "function", "function": {"name": name, "arguments": {"x": "é"}}} for name in names]
    return says(text, reasoning) | {"tool_calls": functions}


def result(text: str) -> dict:
    return {"role": "tool", "content": text}


SYSTEM = {"role": "system", "content": "be brief"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
TWO_TURNS = [SYSTEM, user("hi "), says("hello"), user("hi"), says(" hi\n")]
USES_TOOL = [user("q1"), calls("f", reasoning="r1"), result("r"), says("a1", "r2")]
CALLS_TOOL = [user("q1"), calls("f"), result("r"), says("a1")]  # for templates that do not read reasoning
THEN_ASKS = [*USES_TOOL, user("q2"), says("a2", "r3")]
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>'
MISTRAL_CALL = '{"name": "f", "arguments": {"x": "é"}}'


@pytest.mark.parametrize(
    ("shape", "messages", "expected", "unmasked"),
    [
        (
            "chatml",
            TWO_TURNS,
            "hello<|im_end|> hi\n<|im_end|>",
            "hi <|im_end|>hello<|im_end|>hi<|im_end|> hi\n<|im_end|>",
        ),
        ("chatml", [says("a"), user("b"), says("a")], "a<|im_end|>a<|im_end|>", "a<|im_end|>b<|im_end|>a<|im_end|>"),
        (
            "llama3",
            TWO_TURNS,
            "hello<|eot_id|>hi<|eot_id|>",
            "hi<|eot_id|>hello<|eot_id|>hi<|eot_id|>hi<|eot_id|>",
        ),
        (
            "llama3",
            CALLS_TOOL,
            '{"name": "f", "parameters": {"x": "é"}}<|eot_id|>a1<|eot_id|>',
            'q1<|eot_id|>{"name": "f", "parameters": {"x": "é"}}<|eot_id|>r<|eot_id|>a1<|eot_id|>',
        ),
        (
            "qwen3",
            TWO_TURNS,
            "hello<|im_end|><think>\n\n</think>\n\n hi\n<|im_end|>",
            "hi <|im_end|>hello<|im_end|>hi<|im_end|><think>\n\n</think>\n\n hi\n<|im_end|>",
        ),
        (
            "qwen3",
            USES_TOOL,
            f"<think>\nr1\n</think>\n\n{CALL}<|im_end|><think>\nr2\n</think>\n\na1<|im_end|>",
            f"q1<|im_end|><think>\nr1\n</think>\n\n{CALL}<|im_end|>r<think>\nr2\n</think>\n\na1<|im_end|>",
        ),
        (  # the reasoning of the first turn is dropped, so the prompts of its second answer and its call are rewritten
            "qwen3",
            THEN_ASKS,
            f"{CALL}<|im_end|>a1<|im_end|><think>\nr3\n</think>\n\na2<|im_end|>",
            f"q1<|im_end|>{CALL}<|im_end|>ra1<|im_end|>q2<|im_end|><think>\nr3\n</think>\n\na2<|im_end|>",
        ),
        (  # reasoning written into the content
            "qwen3",
            [user("a"), says("<think>r</think>b"), user("c"), says("<think>s</think>d")],
            "b<|im_end|><think>\ns\n</think>\n\nd<|im_end|>",
            "a<|im_end|>b<|im_end|>c<|im_end|><think>\ns\n</think>\n\nd<|im_end|>",
        ),
        (
            "qwen3",
            [user("a"), calls("f", "f", text="so"), result("1"), result("2"), says("b", "r")],
            f"so\n{CALL}\n{CALL}<|im_end|><think>\nr\n</think>\n\nb<|im_end|>",
            f"a<|im_end|>so\n{CALL}\n{CALL}<|im_end|>12<think>\nr\n</think>\n\nb<|im_end|>",
        ),
        (  # a question of this form does not end the reasoning; the sentinel in its place would
            "qwen3",
            [user("a"), says("b", "r"), user("<tool_response>c</tool_response>"), says("d", "s")],
            "<think>\nr\n</think>\n\nb<|im_end|><think>\ns\n</think>\n\nd<|im_end|>",
            "a<|im_end|><think>\nr\n</think>\n\nb<|im_end|><tool_response>c</tool_response><|im_end|>"
            "<think>\ns\n</think>\n\nd<|im_end|>",
        ),
        ("mistral", TWO_TURNS, " hello</s> hi</s>", "hi [/INST] hello</s>hi[/INST] hi</s>"),
        (
            "mistral",
            CALLS_TOOL,
            f"[TOOL_CALLS][{MISTRAL_CALL}]</s> a1</s>",
            f"q1[/INST][TOOL_CALLS][{MISTRAL_CALL}]</s>r a1</s>",
        ),
        (  # the tools move to the last question, so no prompt of the first turn is a prefix
            "mistral",
            [user("q1"), calls("f", "f"), result('"r"'), says("a1"), user("q2"), says("a2")],
            f"[TOOL_CALLS][{MISTRAL_CALL}, {MISTRAL_CALL}]</s> a1</s> a2</s>",
            f"q1[/INST][TOOL_CALLS][{MISTRAL_CALL}, {MISTRAL_CALL}]</s>"
            r"\"r\""
            " a1</s>q2[/INST] a2</s>",
        ),
        (
            "gemma",
            TWO_TURNS[1:],
            "hello<end_of_turn>hi<end_of_turn>",
            "hi<end_of_turn>hello<end_of_turn>hi<end_of_turn>hi<end_of_turn>",
        ),
        ("llama2", TWO_TURNS, " hello </s> hi </s>", "hi hello </s>hi hi </s>"),
        (
            "deepseek",
            [user("a"), says("<think>r</think>b"), user("c"), says("<think>s</think>d")],
            "b<|end|>d<|end|>",
            "ab<|end|>cd<|end|>",
        ),
    ],
)
def test_what_models_templates_render_counts_exactly(shape, messages, expected, unmasked):
    tokenizer = byte_tokenizer() if shape == "chatml" else shaped_tokenizer(shape)
    reads_tools = shape in ("qwen3", "mistral") and any("tool_calls" in m for m in messages)
    value = {"messages": messages} | ({"tools": TOOLS} if reads_tools else {})
    record = parse_record(json.dumps(value), "f:1")
    assert learned(record, tokenizer) == expected
    assert learned(record, tokenizer, unmask_messages=True) == unmasked


@pytest.mark.parametrize("marked", [True, False])
def test_unmask_in_the_record_is_unmask_of_all(marked):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = MARKED if marked else tokenizer.chat_template
    plain = json.dumps({"messages": TWO_TURNS})
    of_record = tokenize(parse_record(plain[:-1] + ', "unmask": true}', "f:1"), tokenizer)
    assert of_record == tokenize(parse_record(plain, "f:1"), tokenizer, unmask_messages=True)
    assert of_record != tokenize(parse_record(plain, "f:1"), tokenizer)
    assert of_record == tokenize(parse_record(plain[:-1] + ', "unmask": true}', "f:1"), byte_tokenizer())


def test_tools_are_rendered_and_have_no_loss():
    tokenizer = shaped_tokenizer("qwen3")
    value = {"messages": [user("a"), says("b")], "tools": TOOLS}
    sample = tokenize(parse_record(json.dumps(value), "f:1"), tokenizer, unmask_messages=True)
    assert f"<tools>\n{json.dumps(TOOLS[0])}\n</tools>" in tokenizer.decode(sample.input_ids)
    assert "tools" not in tokenizer.decode([label for label in sample.labels if label != IGNORE])


def in_shape(turn: str, prompt: str = ""):
    """A tokenizer whose template renders every message as `turn`, a body of a Jinja loop over `m`."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|call|>", "<|last|>"]})
    asking = "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}" + asking
    return tokenizer


def learned_in(tokenizer, *messages: dict) -> str:
    return learned(parse_record(json.dumps({"messages": list(messages)}), "f:1"), tokenizer)


def test_turn_begins_at_its_prompt_although_the_last_turn_is_rendered_otherwise():
    turn = "{{ '[' + m.content + ']' if m.role == 'user' else ('<>' if loop.last else ' ') + m.content + eos_token }}"
    told = learned_in(in_shape(turn), user("a"), says("b"), user("c"), says("d"))
    assert told == " b<|im_end|><>d<|im_end|>"


def test_call_whose_reasoning_is_dropped_begins_after_its_header():
    tokenizer = shaped_tokenizer("qwen3")
    turns = [user("q"), calls("f", reasoning="r"), result("1"), calls("f", reasoning="s"), result("2"), says("a")]
    assert learned_in(tokenizer, *turns, user("q"), says("b", "t")) == (
        f"{CALL}<|im_end|>{CALL}<|im_end|>a<|im_end|><think>\nt\n</think>\n\nb<|im_end|>"
    )


def test_header_of_an_earlier_turn_is_not_taken_for_a_later_one():
    tokenizer = in_shape(
        "{% if m.role == 'assistant' %}"
        "{{ '<|im_start|>' if messages[loop.index0 - 1].role == 'user' }}"  # an answer to a tool has no header
        "{{ m.reasoning_content if loop.last }}{{ m.content + '<|im_end|>' }}"
        "{% else %}{{ m.role + ':' + m.content + (messages | length | string) }}{% endif %}",
        "{{ '<|im_start|>' }}",
    )
    told = learned_in(tokenizer, user("q"), says("a"), result("r"), says("b", "s"), user("x"), says("c"))
    assert told == "a<|im_end|>b<|im_end|>c<|im_end|>"


def test_last_turn_may_be_closed_by_another_token():
    turn = (
        "{{ m.role + ':' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name + '<|call|>' + call.function.arguments | tojson }}"
        "{% endfor %}{{ '<|last|>' if loop.last else '<|im_end|>' }}"
    )
    tokenizer = in_shape(turn, "assistant:")
    assert learned_in(tokenizer, user("a"), says("b"), user("c"), says("d")) == "b<|im_end|>d<|last|>"
    assert learned_in(tokenizer, user("a"), calls("f")) == 'f<|call|>{"x": "é"}<|last|>'
    told = learned_in(tokenizer, user("a"), calls("f"), result("r"), says("d"))
    assert told == 'f<|call|>{"x": "é"}<|im_end|>d<|last|>'


def test_call_whose_end_cannot_be_located_is_refused():
    turn = "{% if m.tool_calls %}{{ m.tool_calls[0].function.name + loop.revindex | string + eos_token }}"
    tokenizer = in_shape(turn + "{% else %}{{ m.role + ':' + m.content + eos_token }}{% endif %}")
    assert learned_in(tokenizer, user("a"), calls("f")) == "f1<|im_end|>"
    with pytest.raises(DataError, match=r"messages\[1\] cannot be located"):
        learned_in(tokenizer, user("a"), calls("f"), result("r"))
