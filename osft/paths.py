"""Paths as users write them, and whether they can be written to."""

import os
import re
import tempfile
from pathlib import Path

from osft import storage
from osft.errors import explained

_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def expanded(location: str) -> str:
    """A path with `~` or `~user` at its beginning replaced by the home folder; a URI and any other path as it is.

    Raises ValueError for a user that this machine does not have, for a shell variable (what it stands for may differ
    where the path is used: in a pod, or in the process of another user), and for a NUL character.
    """
    if storage.is_remote(location):
        return location
    if "\0" in location:
        raise ValueError(f"{location!r} holds a NUL character, which no path can")
    if location.startswith("~"):
        home = os.path.expanduser(location)
        if home.startswith("~"):
            user = location[1:].partition("/")[0] or "this process"
            raise ValueError(
                f"{location}: this machine knows no home folder of {user}. Give the whole path, or ./{location} for a "
                "file of that name"
            )
        return home
    variable = _VARIABLE.search(location)
    if variable and (variable.start() == 0 or variable[1].strip("{}") in os.environ):
        raise ValueError(f"{location}: {variable[0]} is not replaced by what it stands for. Give the whole path")
    return location


def check_writable(name: str, location: str, *, make: bool = True) -> None:
    """Raise ValueError unless files can be made in the folder `location`, which is made if it is not there.

    `name` is the parameter that the message names. Without `make` nothing is made, and the nearest folder that is there
    is asked. A URI is not looked at.
    """
    if storage.is_remote(location):
        return
    folder = Path(location).absolute()
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"\0")
            return
        while not _is_there(folder):
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(20, os.strerror(20), str(folder))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, os.strerror(13), str(folder))
    except OSError as error:
        raise ValueError(f"{name}: {explained(error, path=str(folder))}") from None


def _is_there(path: Path) -> bool:
    """Whether there is something of that name. Raises OSError for one that cannot be."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True
