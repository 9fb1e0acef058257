"""Records: what crosses a file, a process or a step, with a type, a format and a way to read what older releases wrote.

A record is JSON. Its `format` is a number that is raised when its fields change; then a migration joins
`Record.MIGRATIONS`, which makes of the plain object of one format that of the next. So a file of any earlier release is
read: one migration after the other, then the fields are checked.

    what is read                                      what happens
    a file of an earlier format                       migrated, whatever is between
    one without a format                              format 0, of the releases before records had one
    one of a newer release, or of an unknown format   RecordError with the formats that this release reads
    a field missing, unknown, or of another type      RecordError that names it
    a file that was cut or changed                    DamagedFile, where it holds its own hash (`osft.storage.sealed`)
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from osft import storage
from osft.storage.sealed import read_sealed

Migration = Callable[[dict[str, Any]], dict[str, Any]]
"""From the plain object of a format, without the format itself, to that of the next one."""
_SHOWN = 3
"""Problems of a record that are told."""


class RecordError(ValueError):
    """What was read is not such a record; the message names the source and the first fields that are wrong."""


class RecordPart(BaseModel):
    """A part of a record: its fields are described by the strings behind them, have these types, and do not change."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",  # NaN stays NaN, as the json module has it
        protected_namespaces=(),
    )

    def replace(self, **changes: Any) -> Self:
        """The same with other values of some fields, which are checked."""
        return type(self)(**dict(self) | changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return self.model_dump(mode="json")

    @classmethod
    def from_plain(cls, value: Any) -> Self:
        """What `to_dict` gave of this release. Raises ValueError for another type or name of a field."""
        # As JSON, in which a tuple is a list; no file holds a lone surrogate.
        return cls.model_validate_json(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


class Record(RecordPart):
    """The content of a JSON file."""

    FORMAT: ClassVar[int] = 1
    """Of what `to_dict` gives."""
    MIGRATIONS: ClassVar[Mapping[int, Migration]] = {}
    """Format -> what makes the next one of it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, the format first."""
        return {"format": self.FORMAT} | super().to_dict()

    def to_json(self) -> str:
        """For a file."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, value: Any, source: str) -> Self:
        """The record of a plain object, of this format or an earlier one. Raises RecordError that names `source`."""
        if not isinstance(value, dict):
            raise RecordError(f"{source} holds no JSON object, but {type(value).__name__}")
        found = value.get("format", 0 if 0 in cls.MIGRATIONS else None)
        plain = {name: content for name, content in value.items() if name != "format"}
        known = [*sorted(cls.MIGRATIONS), cls.FORMAT]
        if found not in known:
            raise RecordError(
                f"{source} has the format {found!r}, this release reads {', '.join(map(str, known))}. Use the release "
                "that wrote it, or a newer one"
            )
        try:
            for earlier in range(found, cls.FORMAT):
                plain = cls.MIGRATIONS[earlier](plain)
            return cls.from_plain(plain)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors()]
            raise RecordError(f"{source} is not valid: {'; '.join(problems[:_SHOWN])}") from None
        except (KeyError, TypeError, AttributeError) as error:  # in a migration
            raise RecordError(f"{source} is not valid in the format {found}: {error!r}") from None

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> Self:
        """The record of a JSON text. Raises as `from_dict`."""
        try:
            value = json.loads(text)
        except ValueError as error:
            raise RecordError(f"{source} is not JSON: {error}") from None
        return cls.from_dict(value, source)

    @classmethod
    def read(cls, location: str | Path, remedy: str = "Run what writes it again") -> Self:
        """The record in a file, a path or URI, that may hold its own hash.

        Raises FileNotFoundError, DamagedFile with the `remedy` if it is not what was written, and as `from_dict`.
        """
        file = storage.fetch(location)
        return cls.from_dict(read_sealed(file, remedy), storage.name_of(file))
