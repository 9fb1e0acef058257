"""Nulls that Arrow wrote into calls and schemas: it gives each the keys of all others, and JSON lines keep them."""

from collections.abc import Mapping, Sequence
from typing import Any

_MAY_BE_NULL = frozenset({"default", "const", "example"})
"""Keywords of a JSON schema that null is a value of."""


def without_padding(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON schemas of functions without the keys whose value is null, except those that say so of a parameter."""
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
        message | {"tool_calls": [_call(call, schemas) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _call(call: dict[str, Any], schemas: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    function = call.get("function", call)
    parameters = schemas.get(function["name"], {}).get("parameters")
    known = parameters.get("properties") if isinstance(parameters, dict) else None
    if not isinstance(known, dict) or not isinstance(function.get("arguments"), dict):
        return call
    arguments = {key: value for key, value in function["arguments"].items() if value is not None or key in known}
    stripped = function | {"arguments": arguments}
    return call | {"function": stripped} if "function" in call else stripped
