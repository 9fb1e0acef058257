"""Calls in the words of RBAC, and what a Role allows."""

from typing import Any, NamedTuple


class Call(NamedTuple):
    """What a request does: `resource` carries its subresource after a slash (`pods/log`)."""

    verb: str
    group: str
    resource: str


def verb_of(method: str, name: str | None, watch: bool) -> str:
    """The verb that a real API server derives from a request."""
    if method == "GET" and watch:
        return "watch"
    if method == "GET":
        return "get" if name else "list"
    if method == "DELETE":
        return "delete" if name else "deletecollection"
    return {"POST": "create", "PUT": "update", "PATCH": "patch"}.get(method, method.lower())


def allows(role: dict[str, Any], call: Call, name: str | None) -> bool:
    """Whether a rule of the Role (the dict of its manifest) covers the call on the object of that name."""
    return any(
        matches(rule.get("verbs"), call.verb)
        and matches(rule.get("apiGroups"), call.group)
        and matches(rule.get("resources"), call.resource, f"*/{call.resource.partition('/')[2]}")
        and (not rule.get("resourceNames") or name in rule["resourceNames"])
        for rule in role.get("rules") or []
    )


def matches(granted: list[str] | None, *wanted: str) -> bool:
    return any(word in (granted or []) for word in ("*", *wanted))
