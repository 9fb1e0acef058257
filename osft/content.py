"""Hashes of what files hold, so that they are told apart by content and not by name."""

import hashlib
from pathlib import Path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path, *, hidden: bool = True) -> str:
    """SHA-256 over the relative names and the bytes of a folder's files, with or without hidden ones."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and (hidden or not any(part.startswith(".") for part in name.parts)):
            digest.update(f"{name.as_posix()} {file_sha256(file)}\n".encode())
    return digest.hexdigest()
