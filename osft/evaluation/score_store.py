"""Content-addressed storage of what was measured, so that no model is measured twice on the same records.

    <store>/<key>.json     one measurement: a model's scores of each record of a set, its answers, or its benchmarks

A key is the hash of everything that determines the numbers: the bytes of every file of the model (weights, config,
tokenizer, chat template, generation settings), the content of the records in their order, the settings, the dtype and
the kind of device, and the releases of the two libraries that compute. A file appears whole or not at all, and holds
the hash of its value. What is damaged all the same, is measured again and written over; two runs at once write the
same.
"""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from osft import storage
from osft.storage.hashes import folder_sha256

FORMAT = 2
"""Part of every key: raise it when what is stored, or how it is computed, changes."""


class ScoreStore:
    """The measurements below a path or URI; without one, those of this object's life."""

    def __init__(self, location: str | Path | None) -> None:
        self._location = location
        self._here: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        """The value that was put, or None. Raises as `storage.read` where the store itself cannot be used."""
        if key not in self._here and self._location is not None:
            content = storage.read(self._address(key))
            value = None if content is None else _value(content, key)
            if value is None:
                return None
            self._here[key] = value
        return self._here.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value of plain JSON types that is not None."""
        self._here[key] = value
        if self._location is not None:
            entry = {"format": FORMAT, "key": key, "sha256": _sha256(value), "value": value}
            storage.write(self._address(key), (json.dumps(entry) + "\n").encode())

    def measured(self, key: str, measure: Callable[[], Any]) -> Any:
        """The value of `key`: what is kept, or else what `measure` returns, which is then kept."""
        value = self.get(key)
        if value is None:
            value = measure()
            self.put(key, value)
        return value

    def _address(self, key: str) -> str:
        assert self._location is not None
        return storage.join(self._location, f"{key}.json")


def measurement_key(kind: str, **determined_by: Any) -> str:
    """The key of a measurement that all of `determined_by`, plain JSON values, determine."""
    libraries = {name: version(name) for name in ("torch", "transformers")}
    return _sha256([FORMAT, kind, libraries, determined_by])[:32]


def model_hash(folder: Path) -> str:
    """Hash of the names and bytes of all files of a model folder but for hidden ones, as hexadecimal digits."""
    return folder_sha256(folder, hidden=False)


def _value(content: bytes, key: str) -> Any:
    """What a file holds; None if it is not what was written under this key."""
    try:
        entry = json.loads(content)
        intact = entry["format"] == FORMAT and entry["key"] == key and entry["sha256"] == _sha256(entry["value"])
    except (ValueError, KeyError, TypeError):
        return None
    return entry["value"] if intact else None


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
