"""A message that the template leaves out is refused, not dropped."""

import pytest

from osft.data.chat import tokenize
from osft.data.records import DataError, Record
from tests.conftest import byte_tokenizer

ASK, TELL = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}"
ASKING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def tokenizer(condition: str):
    made = byte_tokenizer()
    made.chat_template = "{% for m in messages %}{% if " + condition + " %}" + TURN + "{% endif %}{% endfor %}" + ASKING
    return made


def chat(*messages: dict) -> Record:
    return Record(source="f:1", messages=messages)


@pytest.mark.parametrize(
    ("condition", "messages", "position"),
    [
        ("m.role in ['user', 'assistant']", [{"role": "system", "content": "s"}, ASK, TELL], 0),
        ("m.role in ['user', 'assistant']", [ASK, TELL, {"role": "tool", "content": "a"}, TELL], 2),
        ("m.role != 'tool'", [ASK, TELL, {"role": "function", "content": "a"}, TELL], 2),
        ("m.role != 'system' or loop.first", [ASK, {"role": "system", "content": "s"}, TELL], 1),
        ("loop.revindex < 3", [ASK, TELL, ASK | {"content": "c"}, TELL], 0),
    ],
)
def test_a_message_that_is_not_rendered_is_refused(condition, messages, position):
    with pytest.raises(DataError, match=rf"f:1: .* template leaves messages\[{position}\] out, whose role is"):
        tokenize(chat(*messages), tokenizer(condition))
    tokenize(chat(*messages), tokenizer("true"))


def test_an_empty_message_may_be_left_out():
    tokenize(chat({"role": "system", "content": " "}, ASK, TELL), tokenizer("m.role != 'system'"))
