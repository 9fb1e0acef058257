"""Which files a data path names: a file, a folder, a glob, a `datasets` folder, or a data set of the hub."""

import glob
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osft import storage
from osft.storage.atomic import atomic_path
from osft.storage.paths import expanded

_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")

FORMATS = frozenset({".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow"})
COMPRESSIONS = frozenset({".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd", ".lz4"})
_ABOUT = frozenset({"readme", "license", "licence", "notice", "citation", "changelog", "dataset_info", "dataset_infos"})
"""Files of a data folder that speak of the data, by their names without suffixes."""
_HELD_OUT_SPLITS = frozenset({"test", "validation", "valid", "val", "dev", "eval"})


class DataError(ValueError):
    """Data that cannot be used; the message names the file, and the line or row of a bad record."""


def data_files(uri: str) -> list[Path]:
    """The files of a data path or URI, in the order in which they are read.

    A folder is all of its data files, also those in folders below it; hidden files, names that begin with an
    underscore, and a README or licence are passed over. A hub id, `org/name` or `org/name@revision`, is fetched: its
    split `train` as a Parquet file below the scratch folder.

    Raises FileNotFoundError if there is none, and DataError for a folder with a file that is no data or with files of
    several splits.
    """
    if is_hub_dataset(uri):
        return [fetch_hub_dataset(uri.partition("@")[0], hub_commit(uri))]
    path = storage.fetch(expanded(uri))
    if path.is_dir():
        return _folder_files(uri, path)
    if path.is_file():
        return [path]
    files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    if not files:
        raise FileNotFoundError(
            f"data {uri} does not exist. Give a file ({_formats()}), a folder of them, a glob, or the id of a data set "
            "of the Hugging Face hub"
        )
    return files


def is_hub_dataset(uri: str) -> bool:
    """Whether a data path is the id of a Hugging Face data set, `org/name` or `org/name@revision`, and no file's."""
    named_like_one = bool(_DATASET_ID.fullmatch(uri)) and not storage.is_remote(uri)
    return named_like_one and not suffixes(Path(uri)) and not Path(uri).exists()


def suffixes(path: Path) -> str:
    """The suffix of the format, `.jsonl` for `a.jsonl.gz`; empty for a file that is none of `FORMATS`."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower() if name.suffix.lower() in FORMATS else ""


def data_name(uri: str) -> str:
    """What the records of a data path are called: the file's or folder's name, the part after `example:`."""
    path = Path(uri.split(":", 1)[-1] if uri.startswith("example:") else uri)
    if any(character in path.name for character in "*?["):
        path = path.parent
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    return path.stem or path.absolute().name


def check_names(uris: Sequence[str]) -> None:
    """Raise DataError unless the data paths have different names: results are told apart by them."""
    names = [data_name(uri) for uri in uris]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two data sets are called {name!r} ({', '.join(uris)}). Rename one of the files")


def _formats() -> str:
    return ", ".join(sorted(FORMATS))


def _folder_files(uri: str, folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if len(splits) > 1:
            raise DataError(f"{uri} holds several datasets: {', '.join(splits)}. Give one of them, {uri}/{splits[0]}")
        return _folder_files(f"{uri}/{splits[0]}", folder / splits[0])
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        names = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        files = [folder / name["filename"] for name in names]
        if missing := [file.name for file in files if not file.is_file()]:
            raise DataError(f"{uri}: {missing[0]}, which its state.json names, is not there. Save the dataset again")
        return files
    files = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        about = file.suffix.lower() == ".md" or file.name.split(".")[0].lower() in _ABOUT
        hidden = any(part.startswith((".", "_")) or ".incomplete-" in part for part in parts)
        if not file.is_file() or about or hidden:
            continue
        if not suffixes(file):
            raise DataError(
                f"data folder {uri} holds {'/'.join(parts)}, which is no data that can be read ({_formats()}, also "
                f"compressed). Move it elsewhere, or give a glob: {uri.rstrip('/')}/*.jsonl"
            )
        files.append(file)
    if not files:
        raise FileNotFoundError(f"data folder {uri} holds no data file ({_formats()}, also compressed)")
    _check_splits(uri, folder, files)
    return files


def _check_splits(uri: str, folder: Path, files: Sequence[Path]) -> None:
    """Raise DataError if some of a folder's files are for training and others to measure it."""
    found: dict[str, str] = {}
    for file in files:
        for part in file.relative_to(folder).parts:
            found.setdefault(re.split(r"[-_.\d]", part.lower())[0], "/".join(file.relative_to(folder).parts))
    held_out = sorted(_HELD_OUT_SPLITS & found.keys())
    if "train" in found and held_out:
        raise DataError(
            f"data folder {uri} holds several splits: {found['train']} and {found[held_out[0]]}. Give the one to train "
            f"on, {uri.rstrip('/')}/{found['train']}, and the other as validation data"
        )


def hub_commit(uri: str) -> str:
    """The commit that the revision of a hub id names now. Raises as `fetch_hub_dataset`."""
    dataset, _, revision = uri.partition("@")

    def ask() -> str:
        from huggingface_hub import HfApi

        found = HfApi().dataset_info(dataset, revision=revision or None).sha
        assert found is not None, "the hub answers with a commit"
        return found

    commit: str = _ask_hub(uri, ask)
    return commit


def fetch_hub_dataset(dataset: str, commit: str) -> Path:
    """The split `train` of a data set of the hub as a Parquet file below the scratch folder; reused if it is there.

    Raises FileNotFoundError if the hub does not give it.
    """
    path = storage.local(f"hf://datasets/{dataset}@{commit}/train.parquet")
    if not path.is_file():

        def fetch() -> None:
            from datasets import load_dataset

            rows: Any = load_dataset(dataset, revision=commit, split="train", streaming=True)
            with atomic_path(path) as temporary:
                rows.to_parquet(str(temporary))

        _ask_hub(f"{dataset}@{commit}", fetch)
    return path


def _ask_hub(uri: str, question: Any) -> Any:
    try:
        return question()
    except Exception as error:  # those of the HTTP client, which is another one in each generation of the hub's
        raise FileNotFoundError(
            f"data {uri} is neither a file or folder nor a data set that the Hugging Face hub gives: {error}. "
            "Without access to the hub, download the data elsewhere and give the path of its files"
        ) from error
