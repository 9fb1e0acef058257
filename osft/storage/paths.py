"""Paths as users write them, and whether they can be written to."""

import errno
import os
import re
from pathlib import Path

from osft import storage
from osft.process.errors import UnusableError, explained

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


def check_writable(name: str, location: str) -> None:
    """Raise ValueError unless a folder can be at `location` in which this user may make files. Nothing is made.

    `name` is the parameter that the message names. A URI is not looked at.
    """
    if storage.is_remote(location):
        return
    path, missing = Path(location).absolute(), list[Path]()
    try:
        while not _is_there(path):
            missing.append(path)
            path = path.parent
        for part in missing:
            if len(os.fsencode(part.name)) > os.pathconf(path, "PC_NAME_MAX"):
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(part))
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except OSError as error:
        raise UnusableError(f"{name} {location}: {explained(error, path=str(path))}") from None


def _is_there(path: Path) -> bool:
    """Whether there is something of that name. Raises OSError for a name that cannot be."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    path.stat()  # a link that leads nowhere, or in a circle
    return True
