"""The forms that chat records have, and how each becomes `messages`.

    form                       keys of a record
    messages                   messages: [{role, content, …}]
    ShareGPT                   conversations: [{from, value}]
    Capybara                   conversation: [{input, output}]
    prompt/completion          prompt, completion: two texts, or two lists of messages
    Alpaca                     instruction, output; also input
    Dolly                      instruction, response; also context
    question/answer            question, query, problem, prompt or input with answer, response, solution or output

Beside them may stand `system` or `system_prompt`, the text of a system message, and `functions`, the former name of
`tools`. In a form of one question, `history`, [[question, answer]], comes before it, and `reasoning`,
`reasoning_content` or `thinking` is the answer's.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from osft.data.files import DataError
from osft.data.json_rows import DECODER
from osft.data.messages import ROLE_ALIASES

Row = dict[str, Any]

_TURNS = {
    **ROLE_ALIASES,
    **dict.fromkeys(("observation", "function_response", "function-response", "tool_response", "tool_result"), "tool"),
    "function-call": "function_call",
}
"""What ShareGPT calls its turns."""

_PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input")
_ANSWERS = ("completion", "output", "response", "answer", "solution")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_STRUCTURED = frozenset(
    {
        *("messages", "conversations", "conversation", "history", "tools", "functions", "choices", "unmask"),
        *("documents", "chat_template_kwargs"),
    }
)
"""Keys whose values CSV and some Parquet files hold as JSON."""

_NO_CHATS = (
    ({"chosen", "rejected"}, "is a preference, not a chat. Rename 'chosen' to 'messages' and drop 'rejected'"),
    ({"preferred_output"}, "is a preference, not a chat. Give the messages with the preferred output as 'messages'"),
    ({"input_ids"}, "holds tokens. Set use_processed_dataset=True, or give the text"),
    ({"role", "content"}, 'is a single message. Put the messages of a chat into one record: {"messages": [...]}'),
    ({"from", "value"}, 'is a single message. Put the messages of a chat into one record: {"conversations": [...]}'),
)


def decoded(row: Row, source: str, counts: Counter[str]) -> Row:
    """The row with its nulls left out and what is JSON in a text decoded. Raises DataError for broken JSON."""
    found: Row = {}
    for key, value in row.items():
        if value is None:
            continue
        if key in _STRUCTURED and isinstance(value, str):
            if not value.strip():
                continue
            text, value = value, _from_text(value)
            if value is text and text.lstrip().startswith(("[", "{")):
                problem = f"{key!r} is a text that is not JSON. Write it with json.dumps, not with str"
                raise DataError(f"{source}: {problem}; got {text!r:.80}")
            if value is not text:
                counts[f"'{key}' read from a JSON text"] += 1
        if key in _STRUCTURED and isinstance(value, list):
            value = [_from_text(part) if isinstance(part, str) and key != "choices" else part for part in value]
        found[key] = value
    return found


def _from_text(text: str) -> Any:
    """What a JSON text says; the text itself if it is none, for the error that names it."""
    try:
        return DECODER.decode({"True": "true", "False": "false"}.get(text.strip(), text.strip()))
    except ValueError:
        return text


def to_messages(row: Row, source: str, counts: Counter[str]) -> Row:
    """A row with `messages`, whatever its form was. Raises DataError if it has none or two."""
    named = [key for key in ("messages", "conversations", "conversation") if key in row]
    asks, answers = ([key for key in keys if key in row] for keys in (_PROMPTS, _ANSWERS))
    if not named and not (asks and answers):
        raise _no_form(row, source)
    if len(named) > 1:
        raise DataError(f"{source}: a record has {' and '.join(map(repr, named))}. Keep one of them")
    rest, messages = dict(row), row.get(named[0]) if named else None
    if named:
        del rest[named[0]]
        messages, form = _LISTS[named[0]](messages, source)
        for key in [key for key in (*asks, *answers) if key in rest]:  # UltraChat's prompt, for example
            contents = [message.get("content") for message in messages if isinstance(message, dict)]
            if rest.pop(key) not in contents:
                raise DataError(f"{source}: {key!r} stands beside {named[0]!r} and is none of its messages. Drop it")
    else:
        messages, form = _one_answer(rest, source)
    if form:
        counts[f"converted from {form}"] += 1
    if isinstance(rest.get("functions"), list) and "tools" not in rest:
        rest["tools"] = [{"type": "function", "function": function} for function in rest.pop("functions")]
        counts["'functions' taken as 'tools'"] += 1
    return {"messages": _with_system(rest, messages, source), **rest}


def _no_form(row: Row, source: str) -> DataError:
    for keys, problem in _NO_CHATS:
        if keys <= row.keys():
            return DataError(f"{source}: this {problem}")
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value) and len(row) == 1:
            command = f"jq -c '.{key}[]' FILE > FILE.jsonl"
            return DataError(f"{source}: a record needs 'messages'; this one has {key!r}, a list. Run {command}")
    present = ", ".join(map(repr, row)) or "nothing"
    text = ". Plain text is for is_pretraining=True with document_column_name='text'" if "text" in row else ""
    forms = "'conversations', 'prompt' and 'completion', or 'instruction' and 'output'"
    return DataError(
        f"{source}: a record needs a non-empty list 'messages' of {{role, content}} (or {forms}); this one has "
        f"{present}{text}"
    )


def _messages(value: Any, source: str) -> tuple[list[Any], str]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{source}: a record needs a non-empty list 'messages' of {{role, content}}; got {value!r:.80}")
    if all(isinstance(message, dict) and "from" in message for message in value):
        return _turns(value, f"{source}: messages"), "ShareGPT"
    return value, ""


def _share_gpt(value: Any, source: str) -> tuple[list[Any], str]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{source}: 'conversations' must be a non-empty list of {{from, value}}; got {value!r:.80}")
    return _turns(value, f"{source}: conversations"), "ShareGPT"


def _turns(turns: list[Any], place: str) -> list[Any]:
    messages = []
    for position, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f"{place}[{position}] must be an object with 'from' and 'value'; got {turn!r:.80}")
        message = {key: part for key, part in turn.items() if part is not None}
        for old, new in (("from", "role"), ("value", "content")):
            if old in message and new in message:
                raise DataError(f"{place}[{position}] has both {old!r} and {new!r}. Keep one of them")
            if old in message:
                message[new] = message.pop(old)
        if isinstance(role := message.get("role"), str):
            message["role"] = _TURNS.get(role, role)
        messages.append(message)
    return messages


def _capybara(value: Any, source: str) -> tuple[list[Any], str]:
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        if all(set(turn) == {"input", "output"} for turn in value):
            pairs = [(turn["input"], turn["output"]) for turn in value]
            return [message for ask, answer in pairs for message in (_user(ask), _assistant(answer))], "Capybara"
        if not any({"input", "output"} & turn.keys() for turn in value):
            return _share_gpt(value, source)
    raise DataError(
        f"{source}: 'conversation' must be a list of {{input, output}} or {{from, value}}; got {value!r:.80}"
    )


_LISTS: dict[str, Callable[[Any, str], tuple[list[Any], str]]] = {
    "messages": _messages,
    "conversations": _share_gpt,
    "conversation": _capybara,
}


def _one_answer(row: Row, source: str) -> tuple[list[Any], str]:
    """The messages of a record with one question and one answer, whose keys are taken out of it; and its form."""
    ask = next(key for key in _PROMPTS if key in row)
    answer = next(key for key in _ANSWERS if key in row)
    asked, answered = row.pop(ask), row.pop(answer)
    form = {"completion": "prompt/completion", "output": "Alpaca"}.get(answer, "question/answer")
    if ask == "prompt" and isinstance(asked, list) and isinstance(answered, list):
        return [*asked, *answered], "prompt/completion"
    if ask == "instruction":
        form = "Dolly" if answer == "response" else "Alpaca"
        asked = _instruction(row, asked, answered, source)
    history = row.pop("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"{source}: 'history' must be a list of pairs of texts; got {history!r:.80}")
    messages = [message for pair in history for message in (_user(pair[0]), _assistant(pair[1]))]
    for key, value in ((ask, asked), (answer, answered)):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{source}: {key!r} must be a non-empty text; got {value!r:.80}")
    if left := [key for key in (*_PROMPTS, *_ANSWERS) if row.get(key) not in (None, "")]:
        problem = f"a record has {ask!r}, {answer!r} and also {left[0]!r}"
        raise DataError(f"{source}: {problem}. Keep one question and one answer")
    for key in (*_PROMPTS, *_ANSWERS):
        row.pop(key, None)
    reasoning = {key: row.pop(key) for key in _REASONING if isinstance(row.get(key), str)}
    return [*messages, _user(asked), _assistant(answered) | reasoning], form


def _instruction(row: Row, asked: Any, answered: Any, source: str) -> Any:
    """The instruction of an Alpaca or Dolly record with its input, which is taken out of the row."""
    texts = [asked, answered]
    given = [key for key in ("input", "context") if row.get(key)]
    if len(given) > 1:
        raise DataError(f"{source}: a record has both 'input' and 'context'. Keep one of them")
    for key in ("input", "context"):
        text = row.pop(key, None)
        if text and not isinstance(text, str):
            raise DataError(f"{source}: {key!r} must be a text; got {text!r:.80}")
        if text:
            texts.append(text)
            asked = f"{asked}\n{text}" if asked else text
    rendered = row.get("text")
    if isinstance(rendered, str) and all(isinstance(text, str) and text in rendered for text in texts):
        del row["text"]  # all of it once more, as Stanford's Alpaca has it
    return asked


def _user(content: Any) -> Row:
    return {"role": "user", "content": content}


def _assistant(content: Any) -> Row:
    return {"role": "assistant", "content": content}


def _with_system(row: Row, messages: list[Any], source: str) -> list[Any]:
    """The messages with the text of `system` in front; its key is taken out of the row."""
    for key in ("system", "system_prompt"):
        text = row.pop(key, None)
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise DataError(f"{source}: {key!r} must be a text; got {text!r:.80}")
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        if first.get("role") != "system":
            messages = [{"role": "system", "content": text}, *messages]
        elif first.get("content") != text:
            raise DataError(f"{source}: {key!r} and the system's message say different things. Keep one of them")
    return messages
