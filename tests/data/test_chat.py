"""The loss mask covers exactly what the assistant would have generated."""

import pytest

from osft.data.chat import IGNORE, tokenize
from osft.data.records import DataError, Record
from tests.conftest import byte_tokenizer

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def chat(*turns: tuple[str, str]) -> Record:
    return Record(source="f:1", messages=tuple({"role": role, "content": content} for role, content in turns))


def learned(record: Record, tokenizer) -> str:
    sample = tokenize(record, tokenizer)
    assert all(label in (IGNORE, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))
    return tokenizer.decode([label for label in sample.labels if label != IGNORE])


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (chat(("user", "hi"), ("assistant", "hello")), "hello<|im_end|>"),
        (chat(("user", "yes or no?"), ("assistant", "no")), "no<|im_end|>"),
        (chat(("user", "say assistant"), ("assistant", "assistant")), "assistant<|im_end|>"),
        (chat(("user", "1"), ("assistant", "a"), ("user", "a"), ("assistant", "b")), "a<|im_end|>b<|im_end|>"),
        (chat(("system", "be brief"), ("user", "ü€"), ("assistant", "日本 é")), "日本 é<|im_end|>"),
        (chat(("user", "x"), ("assistant", "line one\nline two")), "line one\nline two<|im_end|>"),
    ],
)
def test_assistant_tokens_and_nothing_else_count(record, expected, tokenizer):
    assert learned(record, tokenizer) == expected
    marked = byte_tokenizer()
    marked.chat_template = MARKED
    assert learned(record, marked) == expected, "the template's own markers say the same"


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


def test_template_that_rewrites_turns_is_refused_rather_than_masked_wrongly():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] | upper }}{% endfor %}"
    with pytest.raises(DataError, match=r"messages\[1\] cannot be located"):
        tokenize(chat(("user", "a"), ("assistant", "b")), tokenizer)
