"""The messages of a chat: validated, and brought into the one form that chat templates read.

    role            system, developer, user, assistant, tool, function, or one that the model's template names;
                    human and gpt and the like are user and assistant
    content         a text, or a list of parts with text, which a line break joins; null beside calls
    tool_calls      of the assistant: [{type, function: {name, arguments}}]; arguments are an object, a JSON text of one
                    is decoded; `function_call` is its older form
    reasoning_content, reasoning, thinking      of the assistant; they are the same to a template
    tool_call_id, name                          of a tool
    weight (0 or 1), train (true or false)      whether the message has a loss; see `learns`

Another key is kept for the chat template, unless it is null or empty, and refused where the template does not read it
(`osft.data.template_keys`).
"""

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from osft.data.files import DataError
from osft.data.json_rows import DECODER

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "pretraining")
ROLE_ALIASES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "chatbot", "ai", "model"), "assistant"),
    "pretrain": "pretraining",
    "tool_call": "function_call",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of parts that are text, and the key that holds it."""
_CALL_KEYS = frozenset({"id", "type", "index", "function", "name", "arguments"})
_MAY_BE_NULL = frozenset({"default", "const", "example"})
"""Keywords of a JSON schema that null is a value of."""
_MARKERS = (
    (r"<\|(system|user|assistant)\|>\n?", "<|endoftext|>"),
    (r"<\|start_of_role\|>(system|user|assistant)<\|end_of_role\|>\n?", "<|end_of_text|>"),
)
"""What InstructLab's pretraining messages of chats are written in: the turns of Granite 7B, and those of Granite 3."""


def read_message(message: Any, place: str, counts: Counter[str]) -> tuple[dict[str, Any], bool | None]:
    """The message for the chat template, and whether it has a loss, None if it does not say.

    `place` begins the errors (DataError), `counts` is added what was converted.
    """
    if not isinstance(message, dict):
        raise DataError(f"{place} must be an object with a role and a content; got {message!r:.80}")
    role, content = message.get("role"), message.get("content")
    if len(message) == 2 and role in ROLES and isinstance(content, str):
        return message, None  # as nearly all are: this takes a third of the time
    given = {key: value for key, value in message.items() if value is not None}
    role = _role(given.pop("role", None), place, counts)
    learn = learns(given.pop("weight", None), given.pop("train", None), role, place)
    if role == "function_call":
        role, given = "assistant", _call_turn(given, place)
        counts["'function_call' taken as 'tool_calls'"] += 1
    for key in (*_REASONING, "tool_calls", "function_call"):
        if given.get(key) and role != "assistant":
            raise DataError(f"{place} has {key!r}, but its role is {role!r}. Only an assistant's message may have it")
    calls = _tool_calls(given, place, counts)
    content = given.pop("content", None)
    if content is None and calls:
        content = ""
    kept: dict[str, Any] = {"role": role, "content": _text(content, place, counts)}
    kept |= _reasoning(given, place)
    for key in ("tool_call_id", "name"):
        if key in given and not isinstance(given[key], str):
            raise DataError(f"{place}: {key!r} must be a string; got {given[key]!r:.200}")
    kept |= {key: value for key, value in given.items() if value not in ("", [], {})}  # which say nothing
    return kept | {"tool_calls": calls} if calls else kept, learn


def learns(weight: Any, train: Any, role: str, place: str) -> bool | None:
    """Whether a message has a loss; None where the rule for its role holds.

    A `weight` as in OpenAI's format: 0 turns the loss of an assistant's message off, 1 leaves it on. `train` as in
    axolotl's: false turns the loss of any message off, true turns it on, also of a user's.
    """
    if weight is not None and (isinstance(weight, str | list | dict) or weight not in (0, 1)):
        raise DataError(f"{place}: 'weight' must be 0 or 1, or use 'train': true or false; got {weight!r:.80}")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{place}: 'train' must be true or false; got {train!r:.80}")
    if weight == 1 and role != "assistant":
        raise DataError(
            f"{place}: 'weight' 1 is for the assistant's messages, and its role is {role!r}. For a loss on it, say "
            "'train': true; else drop the weight"
        )
    if weight is not None and train is not None and bool(weight) != train:
        raise DataError(f"{place}: 'weight' is {weight!r}, but 'train' is {train!r}. Keep one of them")
    learn = bool(weight) if train is None and weight is not None else train
    return None if learn and role == "assistant" else learn


def unrolled(messages: list[dict[str, Any]], source: str) -> tuple[list[dict[str, Any]], bool]:
    """The messages with the chats that InstructLab's pretraining messages hold in their place, and whether any does.

    A message of the role `pretraining` that is no chat is the record's only one: a text with a loss on all of it.
    """
    if not any(message["role"] == "pretraining" for message in messages):
        return messages, False
    found: list[dict[str, Any]] = []
    for message in messages:
        found += _turns(message["content"], source) if message["role"] == "pretraining" else [message]
    if len(found) > 1 and any(message["role"] == "pretraining" for message in found):
        raise DataError(
            f"{source}: a message of the role 'pretraining' that is plain text must be the only one of its record. "
            "Give it a record of its own"
        )
    return found, found != messages


def function_name(schema: dict[str, Any]) -> str:
    """The name of a tool or of a call, `{"function": {"name": …}}` or `{"name": …}`; empty where there is none."""
    function = schema.get("function", schema)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def without_nulls(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON schemas of functions without the keys whose value is null, except those that say so of a parameter.

    Arrow wrote them: it gives each schema and call the keys of all others, and JSON lines keep them.
    """
    return [_pruned(tool) for tool in tools]


def _pruned(value: Any) -> Any:
    if isinstance(value, list):
        return [_pruned(part) for part in value]
    if isinstance(value, dict):
        return {key: _pruned(part) for key, part in value.items() if part is not None or key in _MAY_BE_NULL}
    return value


def without_foreign_nulls(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose calls have no null for a parameter that their function, one of `tools`, does not have.

    Where the function's parameters are not given, a null stays: it may be meant.
    """
    schemas = {schema["name"]: schema for tool in tools for schema in [tool.get("function", tool)]}
    return [
        message | {"tool_calls": [_without_foreign_nulls(call, schemas) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _without_foreign_nulls(call: dict[str, Any], schemas: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    function = call.get("function", call)
    parameters = schemas.get(function["name"], {}).get("parameters")
    known = parameters.get("properties") if isinstance(parameters, dict) else None
    if not isinstance(known, dict) or not isinstance(function.get("arguments"), dict):
        return call
    arguments = {key: value for key, value in function["arguments"].items() if value is not None or key in known}
    stripped = function | {"arguments": arguments}
    return call | {"function": stripped} if "function" in call else stripped


def _role(role: Any, place: str, counts: Counter[str]) -> str:
    if not isinstance(role, str) or not re.fullmatch(r"[A-Za-z][\w .-]*", role):
        raise DataError(f"{place} needs a role out of {', '.join(ROLES)}; got {role!r:.80}")
    if role in ROLE_ALIASES:
        counts[f"role {role!r} taken as {ROLE_ALIASES[role]!r}"] += 1
        return ROLE_ALIASES[role]
    meant = [] if role in ROLES else difflib.get_close_matches(role.lower(), ROLES, n=1, cutoff=0.85)
    if meant:
        raise DataError(f"{place} needs a role out of {', '.join(ROLES)}; got {role!r}. Write {meant[0]!r}")
    return role


def _text(content: Any, place: str, counts: Counter[str]) -> str:
    """The text of a message's content."""
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list) and content:
        counts["content joined from parts"] += 1
        return "\n".join(_part(part, f"{place}.content[{position}]") for position, part in enumerate(content))
    if not isinstance(content, str):
        null = ". Null is for an assistant's message that only calls tools" if content is None else ""
        raise DataError(f"{place} needs a string 'content'; got {content!r:.80}{null}")
    return content


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    given = {key: value for key, value in part.items() if value not in (None, [], {})} if isinstance(part, dict) else {}
    kind = given.pop("type", "text")
    text = given.pop(_TEXT_PARTS[kind], None) if isinstance(kind, str) and kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        what = "a part" if not isinstance(part, dict) else f"a part of the type {kind!r}"
        remedy = "Move it to 'reasoning_content'" if kind in ("thinking", "reasoning") else "Drop the record"
        if isinstance(part, dict) and not {"type", "text"} & part.keys():
            remedy = "Write an object as its JSON text"
        raise DataError(f"{place} is {what} without text, and only text is trained. {remedy}; got {part!r:.80}")
    if given:
        raise DataError(f"{place} has {next(iter(given))!r}, which would be dropped. Remove it")
    return text


def _reasoning(given: dict[str, Any], place: str) -> dict[str, Any]:
    """The reasoning, under the name that it has; taken out of `given`."""
    found = {key: given.pop(key) for key in _REASONING if key in given}
    for key, text in found.items():
        if not isinstance(text, str):
            raise DataError(f"{place}: {key!r} must be a string; got {text!r:.200}")
    texts = {key: text for key, text in found.items() if text}
    if len(set(texts.values())) > 1:
        raise DataError(
            f"{place}: {' and '.join(map(repr, texts))} are one to a template, but differ. Keep one of them"
        )
    return dict(list(texts.items())[:1])


def _tool_calls(given: dict[str, Any], place: str, counts: Counter[str]) -> list[dict[str, Any]]:
    """The calls of a message with their arguments as objects; taken out of `given`."""
    calls = given.pop("tool_calls", None) or []
    legacy = given.pop("function_call", None)
    if legacy:
        if calls:
            raise DataError(f"{place} has both 'tool_calls' and 'function_call'. Keep 'tool_calls'")
        calls = [{"type": "function", "function": legacy}]
        counts["'function_call' taken as 'tool_calls'"] += 1
    if isinstance(calls, list):
        calls = [_json(call) if isinstance(call, str) else call for call in calls]
    if not isinstance(calls, list) or not all(isinstance(call, dict) and function_name(call) for call in calls):
        problem = "'tool_calls' must be a list of objects with a 'function' that has a name"
        raise DataError(f"{place}: {problem}; got {calls!r:.200}")
    return [_call(call, f"{place}: tool_calls[{number}]", counts) for number, call in enumerate(calls)]


def _call(call: dict[str, Any], place: str, counts: Counter[str]) -> dict[str, Any]:
    call = {key: value for key, value in call.items() if value is not None}
    function = call.get("function")
    named = call if function is None else {key: value for key, value in function.items() if value is not None}
    unknown = [key for key in (*call, *named) if key not in _CALL_KEYS]
    if unknown or (function is not None and len(named.keys() - {"name", "arguments"})):
        key = unknown[0] if unknown else next(iter(named.keys() - {"name", "arguments"}))
        meant = ". Rename it to 'arguments'" if key in ("parameters", "args", "input") else ". Remove it"
        raise DataError(f"{place} has {key!r}, which is no part of a call{meant}")
    if call.get("type", "function") != "function":
        raise DataError(f"{place} has the type {call['type']!r}; only calls of functions are trained. Drop the record")
    arguments = (call if function is None else function).get("arguments", {})
    if "arguments" in (call if function is None else function):
        named = named | {"arguments": _arguments(arguments, place, counts)}
    return named if function is None else call | {"function": named}


def _arguments(arguments: Any, place: str, counts: Counter[str]) -> dict[str, Any]:
    if arguments is None:
        return {}
    if isinstance(arguments, str):
        counts["arguments of calls read from JSON texts"] += 1
        try:
            arguments = DECODER.decode(arguments.strip()) if arguments.strip() else {}
        except ValueError as error:
            problem = f"the arguments are a text that is not JSON ({error}). Write an object"
            raise DataError(f"{place}: {problem}; got {arguments!r:.200}") from None
    if not isinstance(arguments, dict):
        raise DataError(
            f"{place}: the arguments of a tool call must be an object or a JSON text of one; got {arguments!r:.200}"
        )
    return arguments


def _call_turn(given: dict[str, Any], place: str) -> dict[str, Any]:
    """A turn of ShareGPT that is a call, or a list of calls, as a message with `tool_calls`."""
    content = given.pop("content", None)
    calls = _json(content) if isinstance(content, str) else content
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and function_name(call) for call in calls):
        problem = 'must be the JSON of a call, {"name": …, "arguments": {…}}, or of a list of them'
        raise DataError(f"{place}: a turn of 'function_call' {problem}; got {content!r:.200}")
    if "tool_calls" in given:
        raise DataError(f"{place} is a call and has 'tool_calls'. Keep one of them")
    whole = [call if "function" in call else {"type": "function", "function": call} for call in calls]
    return given | {"tool_calls": whole}


def _json(text: str) -> Any:
    try:
        return DECODER.decode(text.strip())
    except ValueError:
        return text


def _turns(text: str, source: str) -> list[dict[str, Any]]:
    """The turns of a pretraining message that is written as a chat of Granite; else the message itself."""
    for pattern, end in _MARKERS:
        before, *parts = re.split(pattern, text)
        if not parts:
            continue
        if before.strip():
            raise DataError(f"{source}: a pretraining message has text before its first turn, {before.strip()[:80]!r}")
        turns = zip(parts[::2], parts[1::2], strict=True)
        return [{"role": role, "content": content.replace(end, "").strip("\n")} for role, content in turns]
    return [{"role": "pretraining", "content": text}]
