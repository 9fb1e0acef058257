"""Addresses of MLflow and names in it, checked before they are used.

MLflow finds out late, and says it in many ways: a host without `http://` is a folder to it, which its version 3 refuses
with a paragraph on migration; a database in a folder's place is tried for four minutes; a registry's name is checked
when a model is registered, after the training.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from osft.process.errors import UnusableError, explained
from osft.storage.paths import expanded

_HOST = re.compile(r"(localhost|\[[0-9a-fA-F:]+\]|[\w-]+(\.[\w-]+)*)(:\d{1,5})(/.*)?|localhost(/.*)?")
_SQLITE = "sqlite:///"
_FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
"""MLflow's own way to keep using runs in files."""


def checked_address(uri: str, *, make: bool = True) -> str:
    """The address of a tracking server or database, with `~` expanded in a database's path.

    A database that is not there is made, empty, with its folder, unless `make` is False.

    Raises ValueError, without telling a password, for one that MLflow would not understand, would take for something
    else, or could not open.
    """
    if uri != uri.strip() or re.search(r"\s", uri.partition("://")[2].partition("/")[0]):
        raise ValueError(f"the MLflow address {uri!r} holds a blank. Take it out")
    scheme, colon, _ = uri.partition(":")
    if uri.startswith("sqlite:"):
        return _checked_database(uri, make=make)
    if scheme in ("http", "https") and colon:
        return _checked_server(uri)
    if _HOST.fullmatch(uri):
        raise ValueError(f"the MLflow address {uri} has no scheme. Give http://{uri}, or https://{uri}")
    if scheme == "file" or not re.fullmatch(r"[A-Za-z][\w+.-]*:.*|databricks", uri, re.DOTALL):
        if os.environ.get(_FILE_STORE, "").lower() in ("true", "1"):
            return uri
        folder = Path(expanded(uri.removeprefix("file://"))).absolute()
        raise ValueError(
            f"the MLflow address {uri} is a folder, in which MLflow no longer keeps runs. Give {_SQLITE}"
            f"{folder / 'mlflow.db'}, or the address of a server, http://…"
        )
    if urlsplit(uri).password:
        raise _password()
    return uri


def _password() -> ValueError:
    return ValueError(
        "the tracking server's address must not hold a password, which would end up in logs. Set "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (for PostgreSQL: PGPASSWORD)"
    )


def _checked_server(uri: str) -> str:
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"the MLflow address cannot be read: {error}. Give http://host:port") from None
    if parts.password:
        raise _password()
    if not host:
        raise ValueError(f"the MLflow address {uri} names no host. Give http://host:port")
    return uri


def _checked_database(uri: str, *, make: bool) -> str:
    """A SQLite address whose file can be opened. MLflow tries one that cannot for minutes."""
    if not uri.startswith(_SQLITE) or not uri.removeprefix(_SQLITE) or ":memory:" in uri:
        raise ValueError(
            f"the MLflow address {uri} names no file. Give sqlite:/// and a path, such as sqlite:////data/mlflow.db "
            "(four slashes) or sqlite:///mlflow.db for one in this folder"
        )
    path, question, query = uri.removeprefix(_SQLITE).partition("?")
    file = Path(expanded(path))
    try:
        if file.is_dir():
            raise ValueError(f"the MLflow address {uri} is a folder. Give a file in it: {_SQLITE}{file / 'mlflow.db'}")
        if make:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("ab").close()  # as SQLite does
        if file.exists() and file.open("rb").read(16) not in (b"", b"SQLite format 3\0"):
            raise ValueError(f"the MLflow address {uri} is a file, but no SQLite database. Give another path")
    except OSError as error:
        raise UnusableError(f"the MLflow address {uri}: {explained(error, path=str(file))}") from None
    return f"{_SQLITE}{file}{question}{query}"


def check_model_name(name: str) -> None:
    """Raise ValueError for a name that no model of the registry can have, before anything is done for it.

    The rules are MLflow's (no '/' or ':', and nothing that a path would take for another folder); that a database takes
    256 characters; and that a quotation mark ends the name in a search, which registering does.
    """
    remedy = "Give model_name letters, digits, '-', '_' and '.', such as team-model"
    if not name.strip():
        raise ValueError(f"model_name is empty. {remedy}")
    if wrong := re.search(r"[/:'\"\x00-\x1f\x7f]", name):
        raise ValueError(f"model_name {name!r} holds {wrong[0]!r}, which no model's name in MLflow can. {remedy}")
    if name != name.strip() or len(name) > 256:
        raise ValueError(f"model_name {name!r} is longer than 256 characters, or begins or ends with a blank. {remedy}")
    if name == "." or name.startswith(".."):
        raise ValueError(f"model_name {name!r} would be another folder, which no model's name in MLflow can. {remedy}")


@contextmanager
def bounded_requests(*, retries: int, timeout_seconds: float) -> Iterator[None]:
    """Within the block, MLflow repeats a request that has no answer so often, and waits so long for one.

    By itself it tries for four minutes, with two minutes for each answer. What the user has set stays.
    """
    bounds = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": f"{timeout_seconds:g}",
    }
    mine = {name: value for name, value in bounds.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)
