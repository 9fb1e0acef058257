"""Paths, and the URIs of an object store with their local copies: `osft.storage` says what lies where."""

import glob
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from osft.storage.atomic import atomic_path, create_exclusively
from osft.storage.client import (
    PROTOCOL,
    StorageRefused,
    endpoint,
    explained,
    no_room,
    path_of,
    scratch,
    scratch_path,
    split,
)

MARKERS = ("training.json", "position.json", "dataset.json", "config.json")
"""What makes a folder complete is removed before the rest of it."""
_ATTEMPTS_TO_CREATE = 6
_PARALLEL = 8
"""Files that are transferred at once."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in the store."""

    size: int
    etag: str
    """What changes when its content does."""


def is_remote(location: str | Path) -> bool:
    """Whether `location` is a URI and not a path. Raises ValueError if it holds credentials."""
    found = PROTOCOL.match(str(location))
    if found is None:
        return False
    if "@" in found[2].split("/", 1)[0]:
        raise ValueError(
            f"a {found[1]}:// address must not hold credentials. Take them out of the address, and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return True


def join(location: str | Path, *parts: str) -> str:
    """The place `parts` below `location`."""
    if is_remote(location):
        return "/".join([str(location).rstrip("/"), *parts])
    return str(Path(location, *parts))


def local(location: str | Path) -> Path:
    """Where `location` is read and written on this machine: itself, or its local copy. Nothing is transferred."""
    if not is_remote(location):
        return Path(location)
    protocol, rest = split(location)
    parts = [part for part in rest.split("/") if part]
    if not parts or ".." in parts:
        raise ValueError(f"{location} names no place in an object store. Give {protocol}://bucket/prefix, without '..'")
    return scratch() / f"{protocol}-{hashlib.sha256(endpoint().encode()).hexdigest()[:8]}" / Path(*parts)


def name_of(path: Path) -> str:
    """What to call a file on this machine: the URI that it is a copy of, or its path."""
    if path.is_relative_to(scratch_path()):
        store, *parts = path.relative_to(scratch_path()).parts or [""]
        if found := re.fullmatch(r"(.+)-[0-9a-f]{8}", store):
            return f"{found[1]}://{'/'.join(parts)}"
    return str(path)


def files(location: str | Path) -> dict[str, Entry]:
    """The files below a URI by their relative paths; a file itself is "". Empty if there is nothing.

    Raises FileNotFoundError if the bucket does not exist, StorageRefused without valid credentials, ConnectionError
    if the store does not answer, and ValueError if the package that knows the protocol is not installed.
    """
    with explained(location) as store:
        path = path_of(location)
        found = (store.glob if glob.has_magic(path) else store.find)(path, detail=True)
        base = _glob_base(path) if glob.has_magic(path) else path
        return {
            name[len(base) :].lstrip("/"): _entry(entry) for name, entry in found.items() if entry["type"] == "file"
        }


def fetch(
    location: str | Path,
    *,
    marker: str | None = None,
    to: Path | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Path:
    """The file or folder at `location` (or what a glob names), on this machine. What is there and equal is not copied.

    `wanted` chooses files of a folder by their relative paths; `to` is the place that they go to, below the scratch
    folder, instead of the local copy.

    Raises FileNotFoundError if a URI names nothing, or a folder without its `marker`, and as `files`. A path is
    returned as it is.
    """
    if not is_remote(location):
        return Path(location)
    found = find(location, marker=marker, to=to, wanted=wanted)
    if found is None:
        lacking = f" is not complete there (no {marker}), or" if marker else ""
        raise FileNotFoundError(f"{location}{lacking} does not exist. Correct the address, or upload it")
    return found


def find(
    location: str | Path,
    *,
    marker: str | None = None,
    to: Path | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Path | None:
    """As `fetch`, but None for what is not there, or not complete. A path is looked at, too."""
    if not is_remote(location):
        path = Path(location)
        return path if (path / marker if marker else path).exists() else None
    entries = files(location)
    if not entries or (marker is not None and marker not in entries):
        return None
    path = base = to or local(location)
    pattern = "**/*"
    if glob.has_magic(str(location)):
        base = local(_glob_base(str(location)))
        pattern = path.relative_to(base).as_posix()
    # What the store no longer has is not to be read; what was made here and not published yet stays.
    for file in list(base.glob(pattern)):
        if file.is_file() and file.relative_to(base).as_posix() not in entries and _record(file).is_file():
            file.unlink()
    missing = {name: entry for name, entry in entries.items() if wanted(name) and not _in_sync(base / name, entry)}
    _check_room(location, sum(entry.size for entry in missing.values()))
    last = {name: missing.pop(name) for name in [marker] if name in missing}
    for part in (missing, last):
        _transfer(location, base, {name: entry.size for name, entry in part.items()}, _download)
    return path


def fetch_files(location: str | Path, names: Iterable[str]) -> None:
    """Fetch some of the files below a URI, those of them that are there and differ from what is here."""
    if is_remote(location):
        folder, entries = local(location), files(location)
        differing = {name: entries[name] for name in names if name in entries}
        sizes = {name: entry.size for name, entry in differing.items() if not _in_sync(folder / name, entry)}
        _check_room(location, sum(sizes.values()))
        _transfer(location, folder, sizes, _download)


def publish(location: str | Path, *, marker: str | None = None, source: Path | None = None) -> None:
    """Upload the local copy of a URI, a file or a folder, or `source` instead. Nothing for a path.

    With a `marker`, that file goes last, and a folder that has it already is complete and left alone. Raises as
    `files`.
    """
    if not is_remote(location):
        return
    path = source or local(location)
    if path.is_file():
        _transfer(location, path, {"": path.stat().st_size}, _upload)
        return
    if marker is not None and not (path / marker).is_file():
        raise FileNotFoundError(f"{path} is not complete: it has no {marker}")
    present = files(location)
    if marker is not None and marker in present:
        return
    names = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if file.is_file()]
    sizes = {
        name: (path / name).stat().st_size
        for name in names
        if not (name in present and _in_sync(path / name, present[name]))
    }
    last = {marker: sizes.pop(marker)} if marker is not None and marker in sizes else {}
    for part in (sizes, last):
        _transfer(location, path, part, _upload)


def remove(location: str | Path) -> None:
    """Remove a file or folder of the store if it is there; the local copy stays. Nothing for a path."""
    if is_remote(location):
        with explained(location) as store:
            path = path_of(location)
            found = store.find(path)
            markers = [name for name in found if name.rsplit("/", 1)[-1] in MARKERS]
            for part in (markers, [name for name in found if name not in markers]):
                if part:
                    store.rm(part)


def remove_files(location: str | Path, names: Iterable[str]) -> None:
    """Remove some of the files below a path or URI, what makes a folder complete before the rest."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    for name in names:
        parts[name.rsplit("/", 1)[-1] in MARKERS].append(name)
    for part in filter(None, parts.values()):
        if not is_remote(location):
            for name in part:
                Path(location, name).unlink(missing_ok=True)
            continue
        with explained(location) as store:
            store.rm([path_of(join(location, name)) for name in part])


def read(location: str | Path) -> bytes | None:
    """The bytes of a file, in a path or the store; None if it is not there."""
    try:
        if not is_remote(location):
            return Path(location).read_bytes()
        with explained(location) as store:
            content: bytes = store.cat_file(path_of(location))
            return content
    except FileNotFoundError:
        return None


def write(location: str | Path, content: bytes) -> None:
    """Make a small file, whole or not at all."""
    if is_remote(location):
        with explained(location) as store:
            store.pipe_file(path_of(location), content)
        return
    with atomic_path(Path(location)) as temporary:
        temporary.write_bytes(content)


def create(location: str | Path, content: bytes) -> bool:
    """Make a small file that is not there yet, whole. False if it is there: one of several creators makes it.

    Creators must give different contents, see `atomic.create_exclusively`. Raises StorageRefused where the store
    does not know `If-None-Match`, and as `files`.
    """
    if not is_remote(location):
        return create_exclusively(Path(location), content)
    for attempt in range(_ATTEMPTS_TO_CREATE):
        if attempt:
            time.sleep(0.2 * attempt)
        with explained(location) as store:
            path = path_of(location)
            made = _made(store, path, content)
            if made is None:
                continue
            if not made:
                break
            if not _made(store, path, content):
                return True
            raise StorageRefused(
                f"{location}: the object store ignores If-None-Match, so that one of several runs cannot be told to be "
                "the first. Use a store that knows it (Amazon S3, MinIO, Ceph), or a storage root on a volume"
            )
    return read(location) == content  # if it is, the answer to the request that made it was lost


def _made(store: Any, path: str, content: bytes) -> bool | None:
    """Whether a file could be made that was not there. None: somebody is making it right now."""
    try:
        store.pipe_file(path, content, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        code = (getattr(error.__cause__, "response", None) or {}).get("Error", {}).get("Code")
        if code in ("PreconditionFailed", "412"):
            return False
        if code == "ConditionalRequestConflict":
            return None
        raise
    return True


def names(location: str | Path) -> list[str]:
    """The relative names of the files below a place; none if it does not exist."""
    if is_remote(location):
        return list(files(location))
    return [f"{folder}/{name}"[len(str(location)) + 1 :] for folder, _, found in os.walk(location) for name in found]


def sizes(location: str | Path) -> dict[str, int]:
    """The bytes of the files below a place, by their relative names; none if it does not exist."""
    if is_remote(location):
        return {name: entry.size for name, entry in files(location).items()}
    found = {}
    for name in names(location):
        with suppress(FileNotFoundError):  # gone meanwhile
            found[name] = Path(location, name).lstat().st_size
    return found


def _check_room(location: str | Path, size: int) -> None:
    if size > shutil.disk_usage(scratch()).free:
        raise no_room(location)


def _entry(info: Mapping[str, Any]) -> Entry:
    etag = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("created")
    return Entry(int(info["size"]), str(etag))


def _record(file: Path) -> Path:
    """Where it is written down what a local file was when it was equal to the store's."""
    return scratch() / ".equal" / file.absolute().relative_to(scratch())


def _in_sync(file: Path, entry: Entry) -> bool:
    """Whether a file is what was fetched or published, and that is what the store has."""
    if not (file.is_file() and file.is_relative_to(scratch()) and _record(file).is_file()):
        return False
    recorded: Any = json.loads(_record(file).read_text(encoding="utf-8"))
    return bool(recorded == asdict(entry) | {"mtime_ns": file.stat().st_mtime_ns} and file.stat().st_size == entry.size)


def _remember(file: Path, entry: Entry) -> None:
    if file.is_relative_to(scratch()):
        with atomic_path(_record(file)) as temporary:
            temporary.write_text(json.dumps(asdict(entry) | {"mtime_ns": file.stat().st_mtime_ns}), encoding="utf-8")


def _download(store: Any, path: str, file: Path, bar: Any) -> None:
    entry = _entry(store.info(path))
    with atomic_path(file) as temporary:
        store.get_file(path, str(temporary), callback=bar)
        if temporary.stat().st_size != entry.size:
            raise OSError(f"{path} arrived with {temporary.stat().st_size} of {entry.size} bytes. Try again")
    _remember(file, entry)


def _upload(store: Any, path: str, file: Path, bar: Any) -> None:
    store.put_file(str(file), path, callback=bar)
    _remember(file, _entry(store.info(path)))


def _transfer(location: str | Path, folder: Path, sizes: Mapping[str, int], move: Callable[..., None]) -> None:
    """Move the files `sizes` (name -> bytes), several at once. The first error stops what has not begun."""
    if not sizes:
        return
    from fsspec.callbacks import Callback

    total = sum(sizes.values())
    name = str(location).rstrip("/").rsplit("/", 1)[-1]
    with tqdm(
        total=total or None,
        desc=f"{'fetch' if move is _download else 'publish'} {name}",
        unit="B",
        unit_scale=True,
        mininterval=5.0,
        delay=5.0,  # seconds; a short transfer needs no line
    ) as bar:

        class Advance(Callback):
            def relative_update(self, inc: int = 1) -> None:
                bar.update(inc)

        def one(name: str) -> None:
            base = _glob_base(str(location)) if glob.has_magic(str(location)) else str(location)
            address = join(base, name) if name else base
            with explained(address) as store:
                move(store, path_of(address), folder / name if name else folder, Advance())

        with ThreadPoolExecutor(min(_PARALLEL, len(sizes)), thread_name_prefix="osft-transfer") as pool:
            try:
                for done in [pool.submit(one, name) for name in sizes]:
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _glob_base(location: str) -> str:
    """The folder that holds all that a glob can name."""
    magic = re.search(r"[*?[]", location)
    assert magic is not None, f"{location} is no glob"
    return location[: location.rindex("/", 0, magic.start())]
