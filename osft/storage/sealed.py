"""JSON files that hold the hash of their own content, so that a damaged one is told from a whole one.

What a run, a store or a round says of itself (that it is finished, what it was made of, where to resume) is such a
file. The hash is its last entry, `sha256`. A file of an older release has none and is read as it is.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from osft import storage
from osft.storage.atomic import write_json

SEAL = "sha256"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class DamagedFile(ValueError):
    """A file does not hold what was written to it; the message names it, and says what to do."""


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """An object of plain JSON values with its hash as the last entry."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain | {SEAL: _sha256(plain)}


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write an object with its hash as indented JSON, atomically."""
    write_json(path, sealed(value))


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a file, without its hash. Raises DamagedFile if it is not what was written; see `unsealed`."""
    return unsealed(path.read_bytes(), storage.name_of(path), remedy)


def unsealed(content: bytes, name: str, remedy: str) -> dict[str, Any]:
    """The object that the bytes of a file hold, without its hash.

    Raises DamagedFile, with the file's `name` and the `remedy`, if the bytes are not those of a JSON object that was
    written.
    """
    try:
        value = json.loads(content)
    except ValueError as error:
        raise DamagedFile(f"{name} is damaged: it is not JSON ({error}). {remedy}") from None
    if not isinstance(value, dict):
        raise DamagedFile(f"{name} is damaged: it holds no JSON object. {remedy}")
    last = list(value)[-1] if value else ""
    # The name of the hash may be what is damaged.
    if last == SEAL or (last and _DIGEST.fullmatch(str(value[last]))):
        digest = value.pop(last)
        if last != SEAL or digest != _sha256(value):
            raise DamagedFile(f"{name} is damaged, or was changed by hand: its sha256 is another. {remedy}")
    return value


def _sha256(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
