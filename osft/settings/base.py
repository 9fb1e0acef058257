"""What all settings have in common: typed, frozen, documented by the strings behind their fields, refused by name."""

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from osft.process.errors import explained, one_line
from osft.storage.paths import expanded


class Settings(BaseModel):
    """Settings that a user gives, validated when they are made.

    Raises ValueError that names the field, what it may be and what was given. A wrong type, an unknown name and a
    missing one are ValueErrors too: the documented contract of `osft()` knows no other.
    """

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    kind: ClassVar[str] = "parameter"
    """What a message calls one of the names."""

    if not TYPE_CHECKING:  # to a type checker the fields are the parameters

        def __init__(self, **given: Any) -> None:
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise ValueError(_refusal(type(self), error, given)) from None

    def replace(self, **changes: Any) -> Self:
        """These settings with some changed, validated again."""
        return type(self)(**(dict(self) | changes))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, of which the class makes them again."""
        return self.model_dump()


def refuse_unknown(names: Iterable[str], known: Iterable[str], *, kind: str = "parameter") -> None:
    """Raise ValueError at the first name that is not known, with the nearest one that is; `kind` is what it names."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(known)}"
            raise ValueError(f"unknown {kind} {name!r}. {hint}")


def refuse_missing(names: Iterable[str]) -> None:
    """Raise ValueError that lists the names, if there are any."""
    if missing := ", ".join(names):
        raise ValueError(f"required parameters are missing: {missing}")


def _refusal(settings: type[Settings], error: ValidationError, given: Mapping[str, Any]) -> str:
    """The first problem in a line, in the words of a user: pydantic's own have several, and a link."""
    problems = error.errors(include_url=False)
    try:
        refuse_unknown(_at(problems, "extra_forbidden"), settings.model_fields, kind=settings.kind)
        refuse_missing(_at(problems, "missing"))
    except ValueError as refused:
        return str(refused)
    problem = problems[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "value_error":
        reason = str(problem["ctx"]["error"])
        return f"{name} {reason}" if reason.startswith("must ") else f"{name}: {reason}" if name else reason
    field, value = settings.model_fields[name], given[name]
    out_of_bounds = [p for p in problems if p["loc"][0] == name and p["type"] in _OF_BOUNDS]
    if out_of_bounds and (bounds := bounds_text(field)):
        return f"{name} must be {bounds}, got {out_of_bounds[0]['input']!r}"
    return f"{name} must be {type_text(field)}, got {value!r} ({type(value).__name__})"


def _at(problems: Iterable[Any], kind: str) -> list[str]:
    """The names of the fields with a problem of that kind."""
    return [str(problem["loc"][0]) for problem in problems if problem["type"] == kind and len(problem["loc"]) == 1]


_OF_BOUNDS = frozenset({"greater_than_equal", "less_than_equal", "finite_number"})


def type_text(field: FieldInfo) -> str:
    """A field's type as a user would write it: `int | None`, `list[str]`, `'auto' | 'off'`."""
    return _type_name(field.annotation)


def plain_type(wanted: Any) -> Any:
    """A type without what pydantic checks beyond it."""
    if get_origin(wanted) is Annotated:
        return plain_type(get_args(wanted)[0])
    if get_origin(wanted) in (Union, types.UnionType):
        return Union[tuple(plain_type(one) for one in get_args(wanted))]  # noqa: UP007 (of a list that is computed)
    if get_origin(wanted) in (list, dict):
        return get_origin(wanted)[tuple(plain_type(one) for one in get_args(wanted))]
    return wanted


def _type_name(wanted: Any) -> str:
    wanted = plain_type(wanted)
    origin, arguments = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return "Any"
    if wanted is type(None):
        return "None"
    if origin in (Union, types.UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin in (list, dict):
        return f"{origin.__name__}[{', '.join(map(_type_name, arguments))}]"
    if isinstance(wanted, type) and issubclass(wanted, Settings):
        return f"{{{', '.join(wanted.model_fields)}}}"
    return str(wanted.__name__)


def default(field: FieldInfo) -> Any:
    """A field's default; of one that is required nothing sensible."""
    return field.get_default(call_default_factory=True)


def default_text(field: FieldInfo) -> str:
    """The default as one would write it in Python, or "required"."""
    return "required" if field.is_required() else repr(default(field))


def bounds_text(field: FieldInfo) -> str:
    """The closed interval that a number must lie in; empty if it may be any."""
    limits = list(_limits(field))
    low = next((limit.ge for limit in limits if isinstance(limit, Ge)), None)
    high = next((limit.le for limit in limits if isinstance(limit, Le)), None)
    if high is not None:
        return f"between {low} and {high}"
    return "" if low is None else f"at least {low}"


def _limits(field: FieldInfo) -> Iterator[Any]:
    """Of the field, and of the parts of its type."""
    yield from field.metadata
    parts = [field.annotation]
    while parts:
        part = parts.pop()
        parts += get_args(part)
        for note in getattr(part, "__metadata__", ()):
            yield from note.metadata if isinstance(note, FieldInfo) else (note,)


def meaning(field: FieldInfo) -> str:
    """The documentation without the line breaks of the source, and with the bounds of a number."""
    text, bounds = " ".join((field.description or "").split()), bounds_text(field)
    return f"{text} ({bounds})" if bounds else text


def read_file(file: Path, kind: str) -> dict[str, Any]:
    """The settings of a YAML file, NAME: VALUE, unchecked. `kind` is what a message calls the file.

    Raises FileNotFoundError if there is no such file, ValueError if it does not hold settings.
    """
    file = Path(expanded(str(file)))
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {kind} file {file}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a YAML file: {one_line(error)}") from None
    except OSError as error:
        raise ValueError(f"{kind} file {explained(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold parameters, NAME: VALUE, each on a line")
    return {str(name): value for name, value in content.items()}
