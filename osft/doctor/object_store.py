"""Whether an object store does what rounds need of it: tried with one small object, which is removed again."""

import os
import uuid
from collections.abc import Iterator

from osft import storage
from osft.doctor.finding import Finding, NotChecked, error, ok, separated
from osft.doctor.subject import Subject

FOLDER = "doctor"
"""Below the storage root, where the probe lies for a moment."""


def check_object_store(subject: Subject) -> Iterator[Finding]:
    """Can an object be created only if it is not there (If-None-Match), read, listed and deleted?"""
    root = subject.configuration.storage_root
    if not storage.is_remote(root):
        yield ok("object store", f"none is needed: storage_root is {root}")
        return
    if not subject.in_pod and root.startswith("s3") and not _has_credentials():
        raise NotChecked(
            f"no credentials for {root} are set here (AWS_ACCESS_KEY_ID, AWS_PROFILE): the pods have theirs from the "
            "secret storage_secret"
        )
    yield probe(root)


def probe(root: str) -> Finding:
    """Create, read, list and delete one object below `root`."""
    place, content = storage.join(root, FOLDER, f"probe-{uuid.uuid4().hex}"), uuid.uuid4().hex.encode()
    about = f"object store {root}"
    try:
        if not storage.create(place, content):
            return error(about, "says that a new name exists already", "Use a store with consistent writes, such as S3")
        try:
            if storage.read(place) != content:
                return error(about, "gives other bytes than were written", "Use a store that reads what was written")
            if not storage.names(storage.join(root, FOLDER)):
                return error(about, "does not list what was written", "Allow s3:ListBucket to these credentials")
        finally:
            storage.remove(place)
        if storage.read(place) is not None:
            return error(about, "still has what was deleted", "Allow s3:DeleteObject, and use no object lock")
    except (ValueError, PermissionError, FileNotFoundError, ConnectionError) as refusal:
        return error(about, *separated(refusal))
    return ok(about, "creates exclusively, reads, lists and deletes")


def _has_credentials() -> bool:
    names = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE")
    return any(os.environ.get(name) for name in names)
