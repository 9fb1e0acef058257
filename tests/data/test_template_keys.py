"""What a template reads of a record, whatever way it is written."""

import pytest

from osft.data.records import DataError, Record
from osft.data.template_keys import check_read, knows_role, template_reads, unread_keys, with_known_roles
from tests.conftest import CHATML
from tests.data.templates import SHAPES

ASKS = {"role": "user", "content": "a"}


def answers(**keys: object) -> dict:
    return {"role": "assistant", "content": "b", **keys}


def chat(*messages: dict, **fields: object) -> Record:
    return Record(source="f:1", messages=messages or (ASKS, answers()), **fields)


READERS = {
    "attribute": "{% for m in messages %}{{ m.thinking }}{% endfor %}",
    "item": "{% for m in messages %}{{ m['thinking'] }}{% endfor %}",
    "get": "{% for m in messages %}{{ m.get('thinking', '') }}{% endfor %}",
    "slice": "{% for m in messages[1:] %}{{ m.thinking }}{% endfor %}",
    "index": "{{ messages[0].thinking }}",
    "computed index": "{% for m in messages %}{{ messages[loop.index0 + 1].thinking }}{% endfor %}",
    "assigned": "{% set rest = messages[1:] %}{% for m in rest %}{% set x = m %}{{ x.thinking }}{% endfor %}",
    "either": "{% set rest = messages[1:] if a else messages %}{% for m in rest %}{{ m.thinking }}{% endfor %}",
    "namespace": "{% set ns = namespace(at=none) %}{% for m in messages %}{% set ns.at = m %}{% endfor %}"
    "{{ ns.at.thinking }}",
    "macro": "{% macro turn(m) %}{{ m.thinking }}{% endmacro %}{% for x in messages %}{{ turn(x) }}{% endfor %}",
    "macro by name": "{% macro turn(a, m) %}{{ m.thinking }}{% endmacro %}"
    "{% for x in messages %}{{ turn(1, m=x) }}{% endfor %}",
    "filtered": "{% for m in messages | selectattr('role', 'equalto', 'user') | list %}{{ m.thinking }}{% endfor %}",
    "filter by it": "{{ messages | selectattr('thinking') | list | length }}",
    "mapped": "{{ messages | map(attribute='thinking') | join }}",
    "last": "{{ (messages | last).thinking }}",
    "neighbour": "{% for m in messages %}{{ loop.previtem.thinking }}{% endfor %}",
    "reversed": "{% for m in messages[::-1] %}{{ m.thinking }}{% endfor %}",
    "marked": "{% for m in messages %}{% generation %}{{ m.thinking }}{% endgeneration %}{% endfor %}",
    "whole": "{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "whole list": "{{ messages | tojson }}",
    "items": "{% for m in messages %}{% for k, v in m.items() %}{{ v }}{% endfor %}{% endfor %}",
    "computed key": "{% for m in messages %}{{ m[field] }}{% endfor %}",
    "copied": "{% for m in messages %}{% set n = dict(m, content='') %}{{ n.thinking }}{% endfor %}",
    "under another name": "{% for m in messages %}{{ m.reasoning_content }}{% endfor %}",
    "loop control": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.thinking }}{% endfor %}",
}

NOT_READERS = {
    "other object": "{% for m in messages %}{% for c in m.tool_calls %}{{ c.thinking }}{% endfor %}{% endfor %}",
    "text": "{% for m in messages %}{{ m.content }} thinking{% endfor %}",
    "comment": "{# messages[0].thinking #}{{ messages[0].content }}",
    "variable": "{{ thinking }}{{ messages[0].content }}",
    "part of a name": "{% for m in messages %}{{ m.thinking_budget }}{% endfor %}",
    "chatml": CHATML,
}


@pytest.mark.parametrize("way", READERS)
def test_a_key_is_found_whatever_way_it_is_read(way):
    assert unread_keys(READERS[way], chat(ASKS, answers(thinking="t"))) == []


@pytest.mark.parametrize("way", NOT_READERS)
def test_a_key_that_only_looks_read_is_not(way):
    assert unread_keys(NOT_READERS[way], chat(ASKS, answers(thinking="t"))) == ["messages[1].thinking"]


def test_reasoning_counts_under_each_name_that_transformers_gives_it():
    for name in ("reasoning", "thinking", "reasoning_content"):
        assert unread_keys(READERS["under another name"], chat(ASKS, answers(**{name: "t"}))) == []


def test_variables_are_read_or_not():
    extra = {"enable_thinking": False, "documents": [{"title": "t", "text": "d"}], "mood": "good"}
    template = "{% if enable_thinking %}a{% endif %}{% for d in documents %}{{ d.text }}{% endfor %}"
    assert unread_keys(template, chat(extra=extra)) == ["mood"]
    assert unread_keys("{% set mood = 1 %}{{ mood }}", chat(extra=extra)) == list(extra)


def test_tools_must_be_read():
    assert unread_keys(CHATML, chat(tools=({"name": "f"},))) == ["tools"]
    assert unread_keys("{{ tools | tojson }}", chat(tools=({"name": "f"},))) == []


def test_names_of_what_a_result_answers_need_not_be_rendered():
    result = {"role": "tool", "content": "1", "tool_call_id": "x", "name": "f"}
    for template, *_ in SHAPES.values():
        assert unread_keys(template, chat(ASKS, result, answers())) == []
    assert unread_keys(CHATML, chat(ASKS | {"name": "Ann"}, answers())) == ["messages[0].name"]


@pytest.mark.parametrize(
    ("shape", "reads"),
    [
        ("llama3", {"role", "content", "tool_calls"}),
        ("qwen3", {"role", "content", "tool_calls", "reasoning_content"}),
        ("mistral", {"role", "content", "tool_calls"}),
        ("gemma", {"role", "content"}),
        ("llama2", {"role", "content"}),
        ("deepseek", {"role", "content"}),
    ],
)
def test_keys_of_messages_in_the_shapes_that_models_have(shape, reads):
    found = template_reads(SHAPES[shape][0])
    assert (found.message_keys, found.whole_messages) == (reads, False)


def test_a_key_that_would_be_dropped_is_refused_with_its_place():
    problem = r"f:1: the model's chat template does not read messages\[1\].mood, style, so it would be dropped. Remove"
    with pytest.raises(DataError, match=problem.replace("mood, style", "mood") + "|style, messages"):
        check_read(CHATML, chat(ASKS, answers(mood="m"), extra={"style": "s"}))
    check_read(CHATML, chat())


def test_roles_that_the_template_names_stay_and_others_are_replaced():
    roles = ("developer", "user", "function", "assistant")
    record = chat(*({"role": role, "content": role} for role in roles))
    assert [m["role"] for m in with_known_roles(CHATML, record).messages] == ["system", "user", "tool", "assistant"]
    names = "{% if messages[0].role == 'developer' or messages[0]['role'] in ['function'] %}{% endif %}"
    assert with_known_roles(names, record) is record
    assert knows_role(names, "function")


ROLE_TESTS = {
    "compared": "{% for m in messages %}{% if m.role == 'critic' %}{% endif %}{% endfor %}",
    "in a list": "{% for m in messages %}{% if m['role'] in ['user', 'critic'] %}{% endif %}{% endfor %}",
    "unequal": "{% if messages[0].role != 'critic' %}{% endif %}",
    "by a variable": "{% for m in messages %}{% set r = m.role %}{% if r == 'critic' %}{% endif %}{% endfor %}",
    "in small letters": "{% for m in messages %}{% if m.role.lower() == 'critic' %}{% endif %}{% endfor %}",
    "looked up": "{% for m in messages %}{{ {'user': 'U', 'critic': 'C'}[m.role] }}{% endfor %}",
    "looked up in a table": "{% set t = {'critic': 'C'} %}{% for m in messages %}{{ t[m.role] }}{% endfor %}",
    "filtered": "{{ messages | selectattr('role', 'in', ['critic', 'user']) | list | length }}",
}


@pytest.mark.parametrize("way", ROLE_TESTS)
def test_a_role_is_known_whatever_way_it_is_told_apart(way):
    assert knows_role(ROLE_TESTS[way], "critic")


def test_a_text_that_is_no_role_is_none():
    other = (
        "{% for m in messages %}{% for c in m.tool_calls %}{% if c.type == 'function' %}{{ c['function'] }}{% endif %}"
    )
    assert not knows_role(other + "{% endfor %}{{ m.role + 'function' }}{% endfor %}", "function")


def test_a_role_that_no_template_names_is_refused():
    record = chat(ASKS, {"role": "critic", "content": "c"}, answers())
    with pytest.raises(DataError, match=r"f:1: messages\[1\] has the role 'critic', which .* Use one of system, user"):
        check_read(CHATML, record)
    check_read("{{ messages[0].content if messages[0].role != 'critic' }}", record)
