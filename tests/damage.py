"""What becomes of files."""

import os
from pathlib import Path


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 8)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def flipped(file: Path, at: int | None = None) -> None:
    """A bit of it, by default in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    file.write_bytes(content)


def missing(file: Path) -> None:
    file.unlink()
