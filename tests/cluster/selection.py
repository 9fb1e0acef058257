"""Label and field selectors, as list and watch take them."""

import re
from collections.abc import Callable
from typing import Any

from tests.cluster.errors import ApiError

Selector = Callable[[dict[str, Any]], bool]

# What a real API server can select by; anything else is a 400 there too.
COMMON_FIELDS = {"metadata.name", "metadata.namespace"}
FIELDS = {
    "pods": COMMON_FIELDS
    | {"spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName"}
    | {"status.phase", "status.podIP", "status.nominatedNodeName"},
    "events": COMMON_FIELDS
    | {f"involvedObject.{key}" for key in ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion")}
    | {"involvedObject.fieldPath", "reason", "reportingComponent", "source", "type"},
}
SET_TERM = re.compile(r"^(?P<key>\S+)\s+(?P<operator>in|notin)\s+\((?P<values>[^)]*)\)$")
EQUALITY_TERM = re.compile(r"^(?P<key>[^=!\s]+)\s*(?P<operator>==|=|!=)\s*(?P<value>[^=!\s]*)$")


def by_labels(text: str | None) -> Selector:
    """Raises ApiError (400) if `text` is not a label selector."""
    terms = [label_term(term.strip()) for term in re.split(r",(?![^(]*\))", text)] if text else []
    return lambda found: all(term(found["metadata"].get("labels") or {}) for term in terms)


def label_term(term: str) -> Callable[[dict[str, str]], bool]:
    if match := SET_TERM.match(term):
        key, values = match["key"], {value.strip() for value in match["values"].split(",")}
        if match["operator"] == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    if match := EQUALITY_TERM.match(term):
        key, value = match["key"], match["value"]
        if match["operator"] == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if re.fullmatch(r"!\s*[\w./-]+", term):
        return lambda labels: term.lstrip("! ") not in labels
    if re.fullmatch(r"[\w./-]+", term):
        return lambda labels: term in labels
    raise ApiError(400, f"unable to parse requirement: {term!r} is not a label selector")


def by_fields(plural: str, text: str | None) -> Selector:
    """Raises ApiError (400) if `text` is not a field selector, or names a field that the resource cannot select by."""
    terms = []
    for term in text.split(",") if text else []:
        match = EQUALITY_TERM.match(term.strip())
        if match is None:
            raise ApiError(400, f"invalid selector: {term!r}; can't understand it")
        if match["key"] not in FIELDS.get(plural, COMMON_FIELDS):
            raise ApiError(400, f"field label not supported: {match['key']}")
        terms.append((match["key"].split("."), match["value"], match["operator"] == "!="))

    def matches(found: dict[str, Any]) -> bool:
        return all((field(found, path) == value) != negated for path, value, negated in terms)

    return matches


def field(found: Any, path: list[str]) -> str:
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return "" if found is None else str(found)
