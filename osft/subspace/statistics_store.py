"""Content-addressed storage of statistics (`osft.subspace.statistics`).

    <store>/moments/<hash>.safetensors   the statistics of one input, by the hash of their content
    <store>/statistics/<key>.json        a manifest: the statistics of one model over its texts, written last

The key is what the caller names them by, such as the hash of all that they are measured with (`statistics_key`), or
the hash of their content.

    what happens                            what the next run does
    a run is killed                         measures again; without a manifest, files are not read
    two runs store the same                 both use the file that was written first
    a file is missing, cut or damaged       load_statistics, or reading the input, raises and names it
    a manifest is damaged                   load_statistics raises; find_statistics says that there is none

Of an input n wide, k directions are kept (`kept_rank`), 2 n k bytes, beside which the rest is little:

    model             inputs of a block (width: k)              statistics       weights in bfloat16
    SmolLM2-135M      3 x 576: 576, 1536: 1536                   0.2 GB           0.3 GB
    Llama-3-8B        3 x 4096: 1024, 14336: 1024                1.7 GB            16 GB
    Llama-3-70B       3 x 8192: 1024, 28672: 1024                8.7 GB           141 GB
    Qwen3-30B-A3B     128 x (2048: 128, 768: 128), 2 x 2048 …    4.5 GB            61 GB
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from osft import storage
from osft.storage.atomic import atomic_path
from osft.storage.record import Record, RecordError, RecordPart
from osft.storage.sealed import DamagedFile, write_sealed
from osft.subspace.second_moment import SecondMoment
from osft.subspace.statistics import (
    OUTPUT,
    InputStatistics,
    Part,
    Statistics,
    content_sha256,
    restored_outputs,
    tensors_sha256,
)

FORMAT = 1
"""Part of every key: raise it when what is stored, or how it is measured, changes."""
_REMEDY = "Remove it and measure the statistics again (`precompute_svd`)"


class StoredInput(RecordPart):
    """The statistics of one input in a store."""

    targets: tuple[str, ...]
    """The target weights that read it."""
    transposed: bool
    """Whether these are stored (in_features, out_features)."""
    shape: tuple[int, ...]
    """Of the basis of its second moment."""
    error_bound: float
    """Of that, the largest (`osft.subspace.second_moment`)."""
    file: str
    """Relative to the store."""
    sha256: str
    """Of what is in the file."""


class StatisticsManifest(Record):
    """The file that makes statistics complete."""

    FORMAT: ClassVar[int] = FORMAT

    content_sha256: str
    parts: tuple[Part, ...]
    """The texts that they are of."""
    inputs: tuple[StoredInput, ...]
    """In the model's order."""


def statistics_key(**made_of: Any) -> str:
    """The key of statistics that are made of this: the model's hash, the text, settings, targets; plain JSON values."""
    return hashlib.sha256(json.dumps([FORMAT, made_of], sort_keys=True).encode()).hexdigest()[:32]


def statistics_address(store: str | Path, key: str) -> str:
    """The path or URI of the manifest of statistics with a key, or a content hash, in a store."""
    return storage.join(store, "statistics", f"{key[:32]}.json")


def save_statistics(statistics: Statistics, store: str | Path, key: str | None = None) -> str:
    """Write statistics to a store, a path or URI, one input at a time; the path or URI of the manifest.

    `key`: by default the hash of the content.
    """
    described = []
    for each in tqdm(statistics.inputs(), "store statistics", len(statistics.layout), mininterval=2.0, delay=5.0):
        digest = each.sha256
        file = f"moments/{digest[:32]}.safetensors"
        address = storage.join(store, file)
        with atomic_path(storage.local(address), keep_existing=True) as temporary:
            save_file(each.tensors(), temporary)
        storage.publish(address)
        described.append(
            StoredInput(
                targets=each.targets,
                transposed=each.transposed,
                shape=tuple(each.kept.basis.shape),
                error_bound=each.kept.error_bound.max().item(),
                file=file,
                sha256=digest,
            )
        )
    digest = content_sha256(statistics.parts, [each.sha256 for each in described])
    manifest = StatisticsManifest(content_sha256=digest, parts=statistics.parts, inputs=tuple(described))
    address = statistics_address(store, key or digest)
    write_sealed(storage.local(address), manifest.to_dict())
    storage.publish(address)
    return address


def find_statistics(store: str | Path, key: str) -> str | None:
    """The path or URI of the statistics with this key, if they are there and whole."""
    address = statistics_address(store, key)
    try:
        load_statistics(address)
    except (FileNotFoundError, DamagedFile):
        return None
    return address


def load_statistics(path: str | Path) -> Statistics:
    """The statistics of a manifest, a path or URI. The inputs are read, and checked, one at a time when asked for.

    Raises FileNotFoundError if it or one of its files is missing, DamagedFile if it is not what was written; reading
    an input raises DamagedFile.
    """
    found, manifest = _read_manifest(path)
    storage.fetch_files(str(path).rsplit("/", 2)[0], [each.file for each in manifest.inputs])
    stored = _Stored(found.parent.parent, manifest.inputs)
    for each in manifest.inputs:
        if not stored.file(each).is_file():
            raise FileNotFoundError(
                f"{path} is damaged: {storage.name_of(stored.file(each))} of {each.targets[0]} is missing. {_REMEDY}"
            )
    layout = [each.targets for each in manifest.inputs]
    return Statistics(manifest.parts, stored, layout, sha256=manifest.content_sha256)


def stored_parts(path: str | Path) -> tuple[Part, ...]:
    """The texts that the statistics of a manifest are of, without what was measured. Raises as `load_statistics`."""
    return _read_manifest(path)[1].parts


def stored_files(path: str | Path) -> tuple[str, ...]:
    """The files of the inputs of a manifest, relative to its store. Raises as `load_statistics`."""
    return tuple(each.file for each in _read_manifest(path)[1].inputs)


def _read_manifest(path: str | Path) -> tuple[Path, StatisticsManifest]:
    """The file, and what it holds."""
    found = storage.find(path)
    if found is None:
        raise FileNotFoundError(f"there are no statistics {path}. Measure them first (`precompute_svd`)")
    try:
        return found, StatisticsManifest.read(path, _REMEDY)
    except RecordError as error:
        raise DamagedFile(f"{error}. {_REMEDY}") from None


def stored_output_moments(path: str | Path) -> Iterator[tuple[str, SecondMoment]]:
    """The targets of a manifest and the S of their outputs, one at a time, without reading the far larger C.

    Raises as `load_statistics`. Files are not checked against their hashes.
    """
    load_statistics(path)
    found, manifest = _read_manifest(path)
    for described in manifest.inputs:
        with safe_open(found.parent.parent / described.file, framework="pt") as opened:
            names = [name for name in sorted(opened.keys()) if name.startswith(OUTPUT)]
            outputs = {name: opened.get_tensor(name) for name in names}
        yield from restored_outputs(described.targets, outputs).items()


class _Stored(Sequence[InputStatistics]):
    """Inputs that are read when they are asked for."""

    def __init__(self, folder: Path, described: Sequence[StoredInput]) -> None:
        self._folder, self._described = folder, described

    def file(self, described: StoredInput) -> Path:
        return self._folder / described.file

    def __len__(self) -> int:
        return len(self._described)

    def __getitem__(self, index: Any) -> Any:
        described = self._described[index]
        file, targets = self.file(described), described.targets
        try:
            tensors = load_file(file)
            if tensors_sha256(targets, tensors, transposed=described.transposed) != described.sha256:
                raise ValueError("its hash is another")
            return InputStatistics.from_tensors(targets, tensors, transposed=described.transposed)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise DamagedFile(f"{storage.name_of(file)} of {targets[0]} is damaged ({error}). {_REMEDY}") from None
