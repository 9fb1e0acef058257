"""The connection to an object store: fsspec's client, and errors that name the place, the reason and the remedy."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_ENVIRONMENT = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"),
)
_EXTRAS = {"s3": "osft[s3]", "s3a": "osft[s3]"}
_ATTEMPTS = 6
"""At a request, with waits of about 1, 2, 4, … seconds in between."""


class StorageRefused(PermissionError, ValueError):
    """The store takes no requests with these credentials: a setting that cannot work, as any other ValueError."""


def split(location: str | Path) -> tuple[str, str]:
    """The protocol of a URI, and what follows `://`."""
    found = PROTOCOL.match(str(location))
    assert found is not None, f"{location} is no URI"
    return found[1].lower(), found[2]


def path_of(location: str | Path) -> str:
    """The path of a URI within its store."""
    from fsspec.core import strip_protocol

    protocol, rest = split(location)
    return str(strip_protocol(f"{protocol}://{rest}"))


def scratch_path() -> Path:
    """The folder that holds all local copies."""
    given = os.environ.get("OSFT_SCRATCH")
    return Path(given).absolute() if given else Path(tempfile.gettempdir()).absolute() / f"osft-{os.getuid()}"


def scratch() -> Path:
    """The folder that holds all local copies, made if need be."""
    folder = scratch_path()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def endpoint() -> str:
    """The address of S3 that is set; empty for Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _filesystem(protocol: str) -> Any:
    return _connected(protocol, os.getpid(), tuple(os.environ.get(name) for name in _ENVIRONMENT))


@lru_cache(maxsize=8)
def _connected(protocol: str, process: int, environment: tuple[str | None, ...]) -> Any:
    """fsspec's client, which takes its settings from the environment when it is made."""
    import fsspec

    options: dict[str, Any] = {}
    if protocol in _EXTRAS:
        retries = {"mode": "standard", "max_attempts": _ATTEMPTS}
        options = {
            "config_kwargs": {"retries": retries, "connect_timeout": 10, "read_timeout": 60},
            # Parts of a file in memory at once, each of 50 MiB, times _PARALLEL files.
            "max_concurrency": 2,
        }
    try:
        return fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        install = f"pip install '{_EXTRAS[protocol]}'" if protocol in _EXTRAS else str(error)
        raise ValueError(f"addresses with {protocol}:// need another package. Install it: {install}") from None
    except ValueError as error:
        raise ValueError(f"{protocol}:// is no known kind of address ({error}). Give a path or s3://…") from None


@contextmanager
def explained(location: str | Path) -> Iterator[Any]:
    """The client for `location`; its errors name the location, the reason and the remedy."""
    protocol, rest = split(location)
    store = _filesystem(protocol)
    try:
        yield store
    except FileNotFoundError as error:
        if "bucket does not exist" not in str(error):
            raise
        bucket = rest.split("/", 1)[0]
        raise FileNotFoundError(
            f"{location}: there is no bucket {bucket!r}{_at_endpoint()}. Create it, or correct the address"
        ) from None
    except PermissionError as error:
        if error.filename is not None:  # of this machine's disk
            raise
        raise StorageRefused(
            f"{location}: the object store{_at_endpoint()} refuses access ({error}). Check AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, and that they may read and write there"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_room(location) from None
        raise
    except Exception as error:
        if not type(error).__module__.startswith(("botocore", "aiohttp")):
            raise
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            raise StorageRefused(
                f"{location}: there are no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (on a cluster "
                "from a secret)"
            ) from None
        raise ConnectionError(
            f"{location}: the object store{_at_endpoint()} does not answer ({type(error).__name__}). Check "
            "AWS_ENDPOINT_URL and the network"
        ) from None


def _at_endpoint() -> str:
    """Where requests go, without what may be secret in the address."""
    parts = urlsplit(endpoint())
    return f" at {parts.hostname}{f':{parts.port}' if parts.port else ''}" if parts.hostname else ""


def no_room(location: str | Path) -> OSError:
    """The error of a full scratch folder."""
    return OSError(
        errno.ENOSPC, f"no space left in {scratch()} for {location}. Set OSFT_SCRATCH to a folder on a larger disk"
    )
