"""The values of a compiled pipeline's parameters: from a YAML file and NAME=VALUE, checked before anything is sent."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from osft.evaluation.gate import GateRules
from osft.settings.base import read_file, refuse_unknown
from osft.settings.values import boolean, number
from osft.tracking.addresses import check_model_name

_TYPES: dict[str, type] = {
    "STRING": str,
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": float,
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
}
_WANTED = {
    "STRING": "a text",
    "NUMBER_INTEGER": "an integer",
    "NUMBER_DOUBLE": "a number",
    "BOOLEAN": "true or false",
    "LIST": "a list (JSON)",
    "STRUCT": "a mapping (JSON)",
}


def pipeline_arguments(
    known: Mapping[str, Mapping[str, Any]], file: Path | None = None, settings: list[str] | None = None
) -> dict[str, Any]:
    """What is given of a pipeline's parameters: those of the YAML `file`, and over them `settings`, NAME=VALUE.

    `known` describes the parameters as the compiled YAML does: name -> {"parameterType": …, …}. Defaults are left to
    the pipeline.

    Raises FileNotFoundError if there is no such file; ValueError for text that is not YAML, an unknown name, a value of
    another type, and settings that no job or gate can have, which would be noticed only when the round runs.
    """
    given = read_file(file, "parameter") if file else {}
    refuse_unknown(given, known)
    arguments = {name: _checked(name, value, known[name]["parameterType"]) for name, value in given.items()}
    for setting in settings or []:
        name, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting}: expected NAME=VALUE")
        refuse_unknown([name], known)
        arguments[name] = _parsed(name, text, known[name]["parameterType"])
    _check_training_job(arguments)
    if "model_name" in known and "model_name" in arguments:
        check_model_name(arguments["model_name"])
    if "gate" in arguments:
        arguments["gate"] = GateRules.from_parameters(arguments["gate"]).to_parameters()
    return arguments


def _check_training_job(arguments: Mapping[str, Any]) -> None:
    from osft.kubernetes.settings import JobSettings, check_launcher, job_parameters

    launcher = arguments.get("launcher", "local")
    check_launcher(launcher)
    given = job_parameters(arguments.get("job"), arguments.get("pytorchjob"))
    try:
        JobSettings.from_parameters(given).check_possible(launcher)
    except ValueError as error:
        raise ValueError(f"job: {str(error).removeprefix('job ')}") from None


def refuse_missing(known: Mapping[str, Mapping[str, Any]], arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for parameters that have no default and are not given."""
    missing = [
        name
        for name, described in known.items()
        if name not in arguments and "defaultValue" not in described and not described.get("isOptional")
    ]
    if missing:
        raise ValueError(f"the pipeline needs a value for {', '.join(missing)}: give it with --set or in the file")


def _parsed(name: str, text: str, kind: str) -> Any:
    """The value of a text, as JSON unless the parameter is a string."""
    if kind == "STRING":
        return text
    try:
        value = json.loads(text.lower() if kind == "BOOLEAN" else text)
    except json.JSONDecodeError:
        value = text
    return _checked(name, value, kind)


def _checked(name: str, value: Any, kind: str) -> Any:
    given = value
    if kind in ("NUMBER_INTEGER", "NUMBER_DOUBLE"):
        value = number(value, whole=kind == "NUMBER_INTEGER")
    elif kind == "BOOLEAN":
        value = boolean(value)
    if kind in _TYPES and not isinstance(value, _TYPES[kind]):
        raise ValueError(f"{name} must be {_WANTED[kind]}, got {given!r}")
    return value
