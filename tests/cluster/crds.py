"""What a real API server refuses of Kubeflow Trainer's objects: the schemas and the CEL rules of the real CRDs.

crds/ holds them without descriptions: TrainJob and TrainingRuntime of kubeflow/trainer v2.3.0, JobSet of
kubernetes-sigs/jobset v0.12.0 (both Apache-2.0). Rules that compare with an earlier state of the object are left out:
nothing is updated here.
"""

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celpy
import jsonschema

FOLDER = Path(__file__).parent / "crds"
PLURALS = tuple(sorted(file.stem for file in FOLDER.glob("*.json")))


@functools.cache
def schema(plural: str) -> dict[str, Any]:
    """The structural schema; what has to be in the metadata is not in it."""
    (version,) = json.loads((FOLDER / f"{plural}.json").read_text())["spec"]["versions"]
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    found["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return found


def unknown_fields(found: Any, known: dict[str, Any], path: str = "") -> Iterator[str]:
    """The paths of fields that the schema does not have. A server drops them unless it is asked to be strict."""
    if isinstance(found, list):
        for position, item in enumerate(found):
            yield from unknown_fields(item, known.get("items", {}), f"{path}[{position}]")
    elif isinstance(found, dict) and "properties" in known and not known.get("x-kubernetes-preserve-unknown-fields"):
        for name, value in found.items():
            where = f"{path}.{name}".lstrip(".")
            if name in known["properties"]:
                yield from unknown_fields(value, known["properties"][name], where)
            else:
                yield where


def problems(plural: str, found: dict[str, Any]) -> list[str]:
    """A line for each field whose value is refused."""
    told = [
        f"{'.'.join(map(str, error.path)) or 'the object'}: {error.message[:300]}"
        for error in _validator(plural).iter_errors(found)
    ]
    return told or list(_broken_rules(found, schema(plural)))


@functools.cache
def _validator(plural: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_plain(copy.deepcopy(schema(plural))))


def _plain(part: Any) -> Any:
    """The schema in the words of JSON Schema: a field that may be a number or a text has another type there."""
    if isinstance(part, dict):
        if part.get("x-kubernetes-int-or-string"):
            part.pop("type", None)
        for value in part.values():
            _plain(value)
    elif isinstance(part, list):
        for value in part:
            _plain(value)
    return part


def _broken_rules(found: Any, known: dict[str, Any], path: str = "") -> Iterator[str]:
    for rule in known.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and not _program(rule["rule"]).evaluate({"self": celpy.json_to_cel(found)}):
            yield f"{path or 'the object'}: {rule.get('message', rule['rule'])}"
    if isinstance(found, list):
        for position, item in enumerate(found):
            yield from _broken_rules(item, known.get("items", {}), f"{path}[{position}]")
    elif isinstance(found, dict):
        for name, value in found.items():
            yield from _broken_rules(value, known.get("properties", {}).get(name, {}), f"{path}.{name}".lstrip("."))


@functools.cache
def _program(rule: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))
