"""The values of settings, as forms, YAML files and environment variables spell them.

A form of Kubeflow Pipelines sends 3 as 3.0, YAML 1.1 reads 1e-5 as a string, and NumPy has integers of its own: all
are read as what was meant. True is no number, and "yes" no truth value.
"""

import math
import numbers
import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from osft.storage.paths import expanded


def number(value: Any, *, whole: bool) -> int | float | None:
    """The finite number that `value` is or spells; None if it is none, or not a `whole` one where that is wanted."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    if isinstance(value, numbers.Integral) and whole:
        return int(value)
    try:
        nearest = float(value)
    except OverflowError:
        return None
    if not math.isfinite(nearest) or (whole and not nearest.is_integer()):
        return None
    return int(nearest) if whole else nearest


def boolean(value: Any) -> bool | None:
    """True or False, or the one that a string spells, in any case; None for everything else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def whole_numbers(value: Any) -> Any:
    """`value` with every float in its lists and mappings that is whole as an int: a pod's spec has no others."""
    if isinstance(value, Mapping):
        return {key: whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [whole_numbers(item) for item in value]
    whole = number(value, whole=True) if isinstance(value, float) else None
    return value if whole is None else whole


def _or_itself(read: Any) -> Any:
    """A function that gives what `read` does, or the value as it came where that is None: pydantic then refuses it."""

    def as_meant(value: Any) -> Any:
        found = read(value)
        return value if found is None else found

    return as_meant


def _not_empty(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


Integer = Annotated[int, BeforeValidator(_or_itself(lambda value: number(value, whole=True)))]
Number = Annotated[float, BeforeValidator(_or_itself(lambda value: number(value, whole=False)))]
Boolean = Annotated[bool, BeforeValidator(_or_itself(boolean))]
Text = Annotated[str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]
Location = Annotated[Text, AfterValidator(expanded)]
"""A path, in which `~` is expanded, or a URI, which must not hold credentials: it is logged and written down."""
GivenLocation = Annotated[Location, AfterValidator(_not_empty)]
_listed = BeforeValidator(lambda value: list(value) if isinstance(value, tuple) else value)
Texts = Annotated[list[Text], _listed]
Locations = Annotated[list[Location], _listed]
Numbers = Annotated[list[Number], _listed]
WholeNumbers = AfterValidator(whole_numbers)
