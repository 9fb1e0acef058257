"""What a dataclass says of its fields, used three times: to check values, to refuse unknown names, to document.

A field's annotation is its type; `Annotated[int, Bounds(low=1)]` adds a range. The string literal behind a field is
its documentation, as in torchtitan's configs.
"""

import ast
import difflib
import inspect
import math
import numbers
import os
import textwrap
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """The closed interval that a number must lie in."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        return f"at least {self.low}" if self.high == math.inf else f"between {self.low} and {self.high}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One field of a settings dataclass."""

    name: str
    type: Any
    """The annotation without its bounds."""
    bounds: Bounds | None
    default: Any
    """`dataclasses.MISSING` if the field is required."""
    doc: str

    @property
    def required(self) -> bool:
        """True if there is no default."""
        return self.default is MISSING

    @property
    def type_name(self) -> str:
        """The type as one would write it: `int | None`."""
        return type_name(self.type)


_KNOWN: dict[type, dict[str, Parameter]] = {}


def parameters(settings: type) -> dict[str, Parameter]:
    """The fields of a dataclass in their order, with type, bounds, default and documentation."""
    if settings not in _KNOWN:
        _KNOWN[settings] = _read(settings)
    return _KNOWN[settings]


def _read(settings: type) -> dict[str, Parameter]:
    docs: dict[str, str] = {}
    for owner in reversed(settings.__mro__[:-1]):
        docs |= _field_docs(owner)
    hints = get_type_hints(settings, include_extras=True)
    found = {}
    for field in fields(settings):
        hint, bounds = hints[field.name], None
        if get_origin(hint) is Annotated:
            hint, bounds = get_args(hint)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        found[field.name] = Parameter(
            name=field.name, type=hint, bounds=bounds, default=default, doc=docs.get(field.name, "")
        )
    return found


def _field_docs(owner: type) -> dict[str, str]:
    """Field name -> the string literal that follows it in the class's source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, literal in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(literal, ast.Expr) and isinstance(field.target, ast.Name):
            assert isinstance(literal.value, ast.Constant)
            assert isinstance(literal.value.value, str)
            docs[field.target.id] = inspect.cleandoc(literal.value.value)
    return docs


def check_fields(instance: Any) -> None:
    """Check every field of a settings dataclass against its annotation and put plain values in their place.

    A path becomes a string, a NumPy integer an int, an int where a float is wanted a float. What forms and YAML make of
    numbers and of true and false is read as such (`number`, `boolean`). Raises ValueError that names the field, what it
    may be and what was given (a wrong type too: the documented contract knows only that).
    """
    for parameter in parameters(type(instance)).values():
        setattr(instance, parameter.name, _checked(parameter, getattr(instance, parameter.name)))


def _checked(parameter: Parameter, value: Any) -> Any:
    fits, plain = _fit(value, parameter.type)
    if not fits:  # only then: "7" is a name where names are allowed
        fits, plain = _fit(_as_meant(value, parameter.type), parameter.type)
    if not fits:
        wanted = type_name(parameter.type)
        raise ValueError(f"{parameter.name} must be {wanted}, got {value!r} ({type(value).__name__})")
    bounds = parameter.bounds
    if bounds and isinstance(plain, int | float) and not bounds.low <= plain <= bounds.high:
        raise ValueError(f"{parameter.name} must be {bounds}, got {value!r}")
    return plain


def number(value: Any, *, whole: bool) -> int | float | None:
    """The finite number that `value` is or spells; None if it is none, or not a `whole` one where that is wanted.

    A form of Kubeflow Pipelines sends 3 as 3.0, and YAML 1.1 reads 1e-5 as a string. True and False are no numbers.
    """
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


def _as_meant(value: Any, wanted: Any) -> Any:
    """`value` as the number or truth value that one of the types `wanted` allows; itself if there is none."""
    kinds = [wanted, *(get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else ())]
    for kind in kinds:
        if kind in (int, float):
            found = number(value, whole=kind is int)
        elif kind is bool:
            found = boolean(value)
        else:
            found = None
        if found is not None:
            return found
    return value


def _fit(value: Any, wanted: Any) -> tuple[bool, Any]:
    """Whether `value` is of the type `wanted`, and the value as plain Python."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return True, value
    if origin in (Union, types.UnionType):
        for one in arguments:
            fits, plain = _fit(value, one)
            if fits:
                return True, plain
        return False, value
    if origin is Literal:
        return value in arguments and type(value) in {type(a) for a in arguments}, value
    if origin is list:
        items = [_fit(item, arguments[0]) for item in value] if isinstance(value, list | tuple) else None
        return items is not None and all(fits for fits, _ in items), [plain for _, plain in items or []]
    if origin is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value), value
    if wanted is type(None):
        return value is None, value
    if isinstance(value, bool) or wanted is bool:  # True is an int to Python, but not to a user
        return wanted is bool and isinstance(value, bool), value
    if wanted is int and isinstance(value, numbers.Integral):
        return True, int(value)
    if wanted is float and isinstance(value, numbers.Real):
        return True, float(value)
    if wanted is str and isinstance(value, str | os.PathLike):
        return True, os.fspath(value)
    return False, value


def refuse_unknown(names: Iterable[str], known: Iterable[str], *, kind: str = "parameter") -> None:
    """Raise ValueError at the first name that is not known, with the nearest one that is; `kind` is what it names."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(known)}"
            raise ValueError(f"unknown {kind} {name!r}. {hint}")


def read_file(file: Path, kind: str) -> dict[str, Any]:
    """The parameters of a YAML file, NAME: VALUE, unchecked. `kind` is what a message calls the file.

    Raises FileNotFoundError if there is no such file, ValueError if it does not hold parameters.
    """
    import yaml

    from osft.process.errors import explained, one_line
    from osft.storage.paths import expanded

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


def type_name(wanted: Any) -> str:
    """A type as a user would write it: `int | None`, `list[str]`, `'auto' | 'off'`."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return "Any"
    if wanted is type(None):
        return "None"
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(one) for one in arguments)
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin in (list, dict):
        return f"{origin.__name__}[{', '.join(type_name(one) for one in arguments)}]"
    return str(wanted.__name__)
