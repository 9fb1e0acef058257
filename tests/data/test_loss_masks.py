"""Whatever the template: every token in the loss is the assistant's, and all that the assistant says is in it."""

import pytest
from tokenizers.processors import TemplateProcessing

from osft.data.chat import IGNORE, tokenize
from osft.data.records import DataError, Record
from osft.data.rendered_chat import RenderedChat
from tests.conftest import byte_tokenizer
from tests.data.templates import SHAPES, shaped_tokenizer

SYSTEM = {"role": "system", "content": "SYSTEM"}
LEFT_OPEN = {"words", "glm4", "nemotron"}
"""Shapes in which nothing closes a turn."""


def asks(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str, **keys: object) -> dict:
    return {"role": "assistant", "content": text, **keys}


CHATS = {
    "one turn": [asks("QUESTION-1"), says("ANSWER-1")],
    "system": [SYSTEM, asks("QUESTION-1"), says("ANSWER-1"), asks("QUESTION-2"), says("ANSWER-2")],
    "white space": [asks("QUESTION-1\n"), says(" \nANSWER-1\n\nmore\n"), asks(" QUESTION-2"), says("ANSWER-2 ")],
    "names of roles": [asks("assistant"), says("user\nmodel"), asks("<|assistant|>"), says("assistant\nASSISTANT:")],
    "the same again": [asks("same"), says("same"), asks("same"), says("same")],
    "a chat in a question": [asks("x<|im_end|>\n<|im_start|>assistant\nWRONG</s>"), says("ANSWER-1")],
    "a sign": [asks("?"), says("!"), asks("é"), says("日本 ﬁ")],
}


def pieces(record: Record, tokenizer, **options) -> list[str]:
    """The stretches of tokens in the loss, decoded."""
    sample, found, before = tokenize(record, tokenizer, **options), [], IGNORE
    for label in sample.labels:
        if label != IGNORE:
            found = [*found, []] if before == IGNORE else found
            found[-1].append(label)
        before = label
    return [tokenizer.decode(tokens) for tokens in found]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chat", CHATS)
def test_the_loss_is_on_each_answer_and_on_nothing_else(shape, chat):
    messages = CHATS[chat]
    if shape in ("gemma", "deepseek"):  # without a system's turn
        messages = [message for message in messages if message is not SYSTEM]
    tokenizer = shaped_tokenizer(shape)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    found = pieces(Record(source="f:1", messages=tuple(messages)), tokenizer)
    assert len(found) == len(answers)
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    for piece, answer in zip(found, answers, strict=True):
        before, said, after = piece.partition(answer.strip())
        assert said, piece
        assert after.strip() in (special if shape not in LEFT_OPEN else [""]), piece
        rendered = before.replace("<think>", "").replace("</think>", "").replace("<|channel|>final<|message|>", "")
        assert not rendered.strip(), piece


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chat", ["white space", "the same again", "a chat in a question"])
def test_answers_that_are_found_together_are_found_where_each_is_alone(shape, chat, monkeypatch):
    messages = tuple(message for message in CHATS[chat] if message is not SYSTEM)
    tokenizer, record = shaped_tokenizer(shape), Record(source="f:1", messages=messages)
    together = tokenize(record, tokenizer)
    monkeypatch.setattr(RenderedChat, "_contents", {})
    assert tokenize(record, tokenizer) == together


def test_renderings_do_not_grow_with_the_turns(monkeypatch):
    counted, render = [], RenderedChat._render
    monkeypatch.setattr(RenderedChat, "_render", lambda self, *a, **k: counted.append(1) or render(self, *a, **k))
    turns = [message for i in range(20) for message in (asks(f"q{i}"), says(f"a{i}"))]
    assert len(pieces(Record(source="f:1", messages=tuple(turns)), shaped_tokenizer("llama3"))) == 20
    assert len(counted) == 2


def marked(turn: str, prompt: str = "<|im_start|>assistant\\n") -> object:
    """A tokenizer whose template renders every message as `turn`."""
    tokenizer = byte_tokenizer()
    asking = "{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}" + asking
    return tokenizer


ROLE, END = "{{ '<|im_start|>' + m.role + '\n' }}", "{{ '<|im_end|>\n' }}"
ON, OFF = "{% generation %}", "{% endgeneration %}"
SAID, LENGTH = "{{ m.content }}", "{{ m.content | length }}"


def on(body: str) -> str:
    """Marked as generated."""
    return ON + body + OFF


def either(answer: str, other: str = SAID) -> str:
    """One thing for an assistant's message and another for the rest."""
    return "{% if m.role == 'assistant' %}" + answer + "{% else %}" + other + "{% endif %}"


ANSWERS = (asks("q1"), says("a1"), asks("q2"), says("a2"))

MARKERS = {
    "all that is generated": ROLE + either(on(SAID + "{{ '<|im_end|>' }}") + "{{ '\n' }}", SAID + END),
    "the header, too": either(on(ROLE + SAID + END), ROLE + SAID + END),
    "every turn": on(ROLE + SAID + END),
    "every content": ROLE + on(SAID) + END,
    "the content alone": ROLE + either(on(SAID)) + END,
    "half a header": "{{ '<|im_start|>' }}" + on("{{ m.role + '\n' + m.content }}") + END,
    "a letter at a time": ROLE + either("{% for c in m.content %}" + on("{{ c }}") + "{% endfor %}") + END,
}


@pytest.mark.parametrize("way", MARKERS)
def test_markers_that_enclose_too_much_or_not_the_end_are_mended(way):
    record = Record(source="f:1", messages=(SYSTEM, *ANSWERS))
    assert pieces(record, marked(MARKERS[way])) == ["a1<|im_end|>", "a2<|im_end|>"]


def test_markers_around_the_whole_chat_enclose_the_answers_only():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = on(tokenizer.chat_template)
    assert pieces(Record(source="f:1", messages=ANSWERS), tokenizer) == ["a1<|im_end|>", "a2<|im_end|>"]


@pytest.mark.parametrize(
    "turn",
    [
        ROLE + either(SAID, on(SAID)) + END,
        ROLE + "{% if loop.last %}" + on(SAID) + "{% else %}" + SAID + "{% endif %}" + END,
        ROLE + either("{{ m.content[0] }}" + on("{{ m.content[1:] }}")) + END,
        ROLE + either(on("{{ m.content[:-1] }}") + "{{ m.content[-1:] }}") + END,
        "{% macro turn(m) %}" + ROLE + on(SAID) + END + "{% endmacro %}{{ turn(m) }}",
    ],
    ids=["the question", "the last answer", "all but its first letter", "all but its last", "within a macro"],
)
def test_markers_that_leave_out_what_is_said_are_refused_by_message(turn):
    with pytest.raises(DataError, match=r"f:1: the .* markers of .* leave out messages\[1\] or a part of it.*weight"):
        tokenize(Record(source="f:1", messages=ANSWERS), marked(turn))


def test_what_the_markers_leave_out_may_be_left_out_by_the_record():
    turn = ROLE + "{% if loop.last %}" + on(SAID) + "{% else %}" + SAID + "{% endif %}" + END
    record = Record(source="f:1", messages=ANSWERS, learn=(None, False, None, None))
    assert pieces(record, marked(turn)) == ["a2<|im_end|>"]


def test_reasoning_and_text_beside_calls_must_be_enclosed():
    calls = "{% for c in m.tool_calls or [] %}" + on("{{ c.function.name }}") + "{% endfor %}"
    turn = ROLE + either("{{ m.reasoning_content or '' }}" + on(SAID) + calls) + END
    call = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    assert pieces(Record(source="f:1", messages=(asks("q"), says("so ", **call))), marked(turn)) == ["so f<|im_end|>"]
    with pytest.raises(DataError, match="leave out"):
        tokenize(Record(source="f:1", messages=(asks("q"), says("a", reasoning_content="because"))), marked(turn))


def test_markers_tell_where_an_answer_is_that_cannot_be_located_otherwise():
    record = Record(source="f:1", messages=ANSWERS)
    assert pieces(record, marked(ROLE + either(on(LENGTH)) + END)) == ["2", "2"]
    assert pieces(record, marked(either(on(ROLE + LENGTH + END), ROLE + SAID + END))) == ["2<|im_end|>", "2<|im_end|>"]


def test_markers_that_enclose_a_question_beside_such_an_answer_are_refused():
    turn = ROLE + on(either(LENGTH)) + END
    with pytest.raises(DataError, match=r"messages\[1\] cannot be located.*move the template's"):
        tokenize(Record(source="f:1", messages=ANSWERS), marked(turn))


def test_a_header_that_nothing_asks_for_has_no_loss():
    tokenizer = marked(ROLE + SAID + END, prompt="")
    assert pieces(Record(source="f:1", messages=ANSWERS), tokenizer) == ["a1<|im_end|>", "a2<|im_end|>"]


def calls(*names: str, **keys: object) -> dict:
    functions = [{"type": "function", "function": {"name": name, "arguments": {"x": 1}}} for name in names]
    return says("", tool_calls=functions, **keys)


RESULT = {"role": "tool", "content": "RESULT"}
DEEPSEEK_CALL = '<|call|>function<|sep|>{}\n{{"x": 1}}<|call_end|>'


@pytest.mark.parametrize(
    ("shape", "messages", "expected"),
    [
        ("phi3", [calls("f")], ['<|call|>f{"x": 1}<|end|>']),  # what ends the chat does not end the call
        ("phi3", [calls("f"), RESULT, says("a")], ['<|call|>f{"x": 1}<|end|>', "a<|end|>"]),
        (
            "phi3",
            [calls("f", "g"), RESULT, calls("f")],
            ['<|call|>f{"x": 1}<|call|>g{"x": 1}<|end|>', '<|call|>f{"x": 1}<|end|>'],
        ),
        (
            "harmony",  # which repeats the name of the function in the turn of the tool
            [calls("f"), RESULT, calls("f"), RESULT, says("a")],
            ['<|channel|>commentary to=functions.f json<|message|>{"x": 1}<|call|>'] * 2
            + ["<|channel|>final<|message|>a<|return|>"],
        ),
        (
            "harmony",
            [calls("f", thinking="r"), RESULT, says("a", thinking="s")],
            [
                "<|channel|>analysis<|message|>r<|end|><|start|>assistant<|channel|>commentary to=functions.f json"
                '<|message|>{"x": 1}<|call|>',
                "<|channel|>analysis<|message|>s<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>",
            ],
        ),
        (
            "deepseek3",
            [calls("f", "g"), RESULT, RESULT, says("a"), asks("q"), says("b")],
            [
                f"<|calls|>{DEEPSEEK_CALL.format('f')}{DEEPSEEK_CALL.format('g')}<|calls_end|><|end|>",
                "a<|end|>",
                "b<|end|>",
            ],
        ),
    ],
)
def test_calls_of_functions_count_whole_and_their_results_do_not(shape, messages, expected):
    record = Record(source="f:1", messages=(asks("q"), *messages))
    assert pieces(record, shaped_tokenizer(shape)) == expected


@pytest.mark.parametrize(
    ("learn", "unmask", "expected"),
    [
        ((None, False, None, None), False, ["a2<|im_end|>"]),
        ((None, False, None, True), False, ["a2<|im_end|>"]),
        ((True, None, None, False), False, ["q1<|im_end|>", "a1<|im_end|>"]),
        ((None, None, False, None), True, ["q1<|im_end|>", "a1<|im_end|>", "a2<|im_end|>"]),
        ((False, False, None, True), True, ["q2<|im_end|>", "a2<|im_end|>"]),
        ((), True, ["q1<|im_end|>", "a1<|im_end|>", "q2<|im_end|>", "a2<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("way", ["no markers", "all that is generated", "the header, too"])
def test_what_a_record_says_of_its_messages_goes_before_all_else(learn, unmask, expected, way):
    tokenizer = byte_tokenizer() if way == "no markers" else marked(MARKERS[way])
    assert pieces(Record(source="f:1", messages=ANSWERS, learn=learn), tokenizer, unmask_messages=unmask) == expected


def test_record_of_which_nothing_is_learned_is_refused():
    with pytest.raises(DataError, match="f:1: .*no token to learn"):
        tokenize(Record(source="f:1", messages=ANSWERS, learn=(None, False, None, False)), byte_tokenizer())


def test_a_key_that_the_template_does_not_read_is_refused_and_one_that_it_reads_is_learned():
    record = Record(source="f:1", messages=(asks("q"), says("a", thinking="because")))
    with pytest.raises(DataError, match=r"f:1: .* does not read messages\[1\]\.thinking"):
        tokenize(record, byte_tokenizer())
    reads = ROLE + "{{ '[' + m.thinking + ']' if m.thinking else '' }}" + SAID + END
    assert pieces(record, marked(reads)) == ["[because]a<|im_end|>"]


def test_variables_of_a_record_reach_the_template():
    turn = ROLE + either("{{ '<think>' if enable_thinking else '' }}" + SAID) + END
    record = Record(source="f:1", messages=ANSWERS[:2], extra={"enable_thinking": True})
    assert pieces(record, marked(turn)) == ["<think>a1<|im_end|>"]
    record = Record(source="f:1", messages=ANSWERS[:2], extra={"enable_thinking": False})
    assert pieces(record, marked(turn)) == ["a1<|im_end|>"]


PRETRAINING = Record(source="f:1", messages=({"role": "pretraining", "content": "some text"},))


def test_text_of_the_role_pretraining_counts_whole():
    assert pieces(PRETRAINING, shaped_tokenizer("instructlab")) == ["some text<|endoftext|>"]
    sample = tokenize(PRETRAINING, shaped_tokenizer("instructlab"))
    assert shaped_tokenizer("instructlab").decode(sample.input_ids) == "<|pretrain|>some text<|endoftext|><|/pretrain|>"


@pytest.mark.parametrize("shape", ["llama3", "qwen3", None])
def test_text_of_the_role_pretraining_is_a_document_where_the_template_has_no_form_for_it(shape):
    tokenizer = shaped_tokenizer(shape) if shape else byte_tokenizer()
    if not shape:
        tokenizer.chat_template = None
    assert pieces(PRETRAINING, tokenizer) == ["some text" + tokenizer.eos_token]
    assert tokenize(PRETRAINING, tokenizer).num_loss_tokens == len("some text")


def test_a_developers_message_is_the_systems_where_the_template_has_none():
    record = Record(source="f:1", messages=({"role": "developer", "content": "d"}, *ANSWERS[:2]))
    sample = tokenize(record, shaped_tokenizer("qwen3"), unmask_messages=True)
    assert "<|im_start|>system\nd<|im_end|>" in shaped_tokenizer("qwen3").decode(sample.input_ids)
    assert pieces(record, shaped_tokenizer("qwen3"), unmask_messages=True)[0] == "q1<|im_end|>", (
        "as the system's: masked"
    )


def test_a_tokenizer_that_adds_tokens_cuts_or_pads_leaves_the_rendered_chat_as_it_is():
    tokenizer, record = shaped_tokenizer("llama3"), Record(source="f:1", messages=ANSWERS)
    usual = tokenize(record, tokenizer)
    backend = tokenizer.backend_tokenizer
    added = [("<|begin|>", tokenizer.bos_token_id), ("<|end_of_text|>", tokenizer.eos_token_id)]
    backend.post_processor = TemplateProcessing(single="<|begin|> $A <|end_of_text|>", special_tokens=added)
    backend.enable_truncation(7)
    backend.enable_padding(length=400)
    assert tokenize(record, tokenizer) == usual
    assert usual.input_ids.count(tokenizer.bos_token_id) == 1, "the template's own"


def test_a_template_that_is_no_jinja_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }"
    with pytest.raises(DataError, match=r"chat template is no valid Jinja: .* \(line 1\)\. Repair it"):
        tokenize(Record(source="f:1", messages=ANSWERS), tokenizer)
