"""Content-addressed storage of decompositions.

    <store>/weights/<key>.safetensors   the factors of one weight
    <store>/sets/<key>.json             a manifest: the factors of one model, written last

A weight's key is the hash of its bytes and of what determines its factors, its rank among them, so a weight that did
not change is never decomposed twice, whichever model it came with and however its rank was chosen. The same key can
stand for other bases: signs and rotations depend on the hardware. So a file and the manifest hold the hash of the
bases, too, and a set's key depends on it.

    what happens                            what the next run does
    a run is killed                         computes the weight at hand and what follows (`osft.atomic`)
    two runs compute at once                both use the file that was written first
    a file is missing, cut or damaged       precompute says so and computes it again; load_factor_set raises
    a manifest is damaged                   precompute writes it again; load_factor_set raises
    the model's weights are others          they have other keys; training refuses a set that was made for others
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from osft import storage
from osft.atomic import atomic_path
from osft.checkpoint import CheckpointReader, tensor_sha256
from osft.config import SubspaceConfig
from osft.content import named_sha256
from osft.conversion import ModelWeights
from osft.models import empty_model
from osft.sealed import DamagedFile, read_sealed, write_sealed
from osft.subspace.decomposition import decompose, factor_shapes
from osft.subspace.rank_allocation import allocate_ranks, allocation_settings
from osft.subspace.targets import Target, select_targets

FORMAT = 2
"""Part of every key: raise it when what is stored, or how it is computed, changes."""


_PARALLEL = 4
"""Files of factors that are checked at once."""


class FactorsMismatchError(ValueError):
    """A factor set does not belong to the model or the settings that it is to be used with."""


@dataclass(kw_only=True, slots=True)
class FactorSet:
    """The manifest of one model's factors."""

    path: Path
    """The manifest file."""
    unfreeze_rank_ratio: float
    free_subspace: str
    weights: dict[str, dict[str, Any]]
    """Target -> `sha256` of its weight, `shape`, `rank`, `file` (relative to the store), `bases_sha256`."""
    rank_allocation: str = "uniform"
    min_retention_ratio: float | None = None
    """Of the adaptive allocation."""
    importance: dict[str, float] | None = None
    """Of the adaptive allocation: block -> what `measure_importance` found."""
    computed: int = 0
    """How many decompositions this call computed; the rest was there."""

    @property
    def key(self) -> str:
        """The set's content hash, its file's stem."""
        return self.path.stem

    @property
    def bases_sha256(self) -> str:
        """Hash of all bases, which tells this set from one that was computed for the same weights elsewhere."""
        return named_sha256({target: self.weights[target]["bases_sha256"] for target in sorted(self.weights)})

    def factors_file(self, target: str) -> Path:
        """The safetensors file with the factors of `target`."""
        return self.path.parent.parent / self.weights[target]["file"]

    @property
    def ranks(self) -> dict[str, int]:
        """Target -> the number of its unfrozen directions."""
        return {target: weight["rank"] for target, weight in self.weights.items()}

    def rows(self, target: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows, or experts, [start, stop) of the basis `name` (left, right or frozen) of `target`, float32."""
        with safe_open(self.factors_file(target), framework="pt") as opened:
            return opened.get_slice(name)[start:stop]

    def first_rows(self, target: str) -> list[torch.Tensor]:
        """The first row of each basis of `target`: enough to tell whether two sets were computed alike."""
        with safe_open(self.factors_file(target), framework="pt") as opened:
            return [opened.get_slice(name)[:1] for name in sorted(opened.keys()) if name != "singular_values"]

    def singular_values(self, target: str) -> torch.Tensor:
        """(min(m, n),), descending, float32; of a stack of experts the root of the sum of their squares."""
        with safe_open(self.factors_file(target), framework="pt") as opened:
            values = opened.get_tensor("singular_values")
        return values if values.ndim == 1 else values.square().sum(0).sqrt()


def precompute(
    model_path: str | Path,
    store: str | Path,
    config: SubspaceConfig,
    *,
    importance: Mapping[str, float] | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    report: Callable[[str], None] = print,
) -> FactorSet:
    """Decompose every target weight of a model that the store does not hold yet, and write the set's manifest.

    One weight, or one stack of experts, is in memory at a time. `importance` is that of `measure_importance`, for
    the adaptive rank allocation. `device` defaults to CUDA where there is one. Raises FileNotFoundError for a missing
    or incomplete model, ValueError for settings that select nothing and for a checkpoint whose target weights cannot
    be read or written back.
    """
    mirror = storage.local(store)
    reader = CheckpointReader(model_path)
    model = empty_model(model_path, trust_remote_code=trust_remote_code)
    stored = ModelWeights(reader, model)
    targets = select_targets(model, config.target_patterns)
    ranks = allocate_ranks(targets, config, importance)
    stored.check_finite(but_for={target.tensor for target in targets})  # these when they are hashed
    for target in targets:
        stored.require(target.tensor)
        stored.check_invertible(target.tensor)

    weights: dict[str, dict[str, Any]] = {}
    for target in tqdm(targets, desc="hash", unit="weight", mininterval=2.0, delay=5.0):
        digest, rank = stored.sha256(target.tensor), ranks[target.name]
        key = _hash(FORMAT, digest, rank, sorted(factor_shapes(target.shape, rank, config.free_subspace)))
        file = f"weights/{key}.safetensors"
        weights[target.name] = {"sha256": digest, "shape": list(target.shape), "rank": rank, "file": file}

    files = {name: mirror / weight["file"] for name, weight in weights.items()}
    storage.fetch_files(store, [weight["file"] for weight in weights.values()])
    bases = _intact(files, report)
    missing = [target for target in targets if target.name not in bases]
    for target in missing:
        files[target.name].unlink(missing_ok=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for target in tqdm(missing, desc="decompose", unit="weight", mininterval=2.0, disable=not missing):
        file, weight = files[target.name], weights[target.name]
        factors = decompose(stored.tensor(target.tensor).to(device), weight["rank"], config.free_subspace)
        tensors = {field: t.cpu().contiguous() for field, t in asdict(factors).items() if t is not None}
        digest = named_sha256({name: tensor_sha256(tensors[name]) for name in sorted(tensors)})
        described = {"weight": target.name, "sha256": weight["sha256"], "bases_sha256": digest}
        with atomic_path(file, keep_existing=True) as temporary:
            save_file(tensors, temporary, metadata=described)
        storage.publish(storage.join(store, weight["file"]))
    bases |= _intact({target.name: files[target.name] for target in missing}, report)
    for name, weight in weights.items():
        if name not in bases:
            raise DamagedFile(f"{files[name]} was written and reads as something else. Check the disk of {store}")
        weight["bases_sha256"] = bases[name]

    manifest: dict[str, Any] = {
        "format": FORMAT,
        "unfreeze_rank_ratio": config.unfreeze_rank_ratio,
        "free_subspace": config.free_subspace,
        "weights": weights,
    }
    rank_allocation, min_retention_ratio = allocation_settings(config)
    if rank_allocation != "uniform":
        manifest |= {
            "rank_allocation": rank_allocation,
            "min_retention_ratio": min_retention_ratio,
            "importance": dict(importance or {}),
        }
    address = storage.join(store, "sets", f"{_hash(manifest)}.json")
    if not _is_there(address, manifest):
        write_sealed(storage.local(address), manifest)
        storage.publish(address)
    computed = len(missing)
    report(f"factors: computed {computed}, reused {len(targets) - computed} of {len(targets)} weights ({address})")
    return _read_factor_set(storage.local(address), computed)


def load_factor_set(path: str | Path, *, check: bool = True) -> FactorSet:
    """Read a manifest, of a path or URI, and `check` that the bases are those that it was written for.

    Raises FileNotFoundError if it or one of its files is missing, DamagedFile if one is not what was written.
    """
    address, found = path, storage.find(path)
    if found is None:
        raise FileNotFoundError(f"there is no factor set {path}. Run `precompute_svd` for this model first")
    factors = _read_factor_set(found, 0)
    store = str(address).rsplit("/", 2)[0]
    storage.fetch_files(store, [weight["file"] for weight in factors.weights.values()])
    files = {name: factors.factors_file(name) for name in factors.weights}
    for name, file in files.items():
        if not file.is_file():
            raise FileNotFoundError(
                f"{path} is damaged: the factors of {name} ({file}) are missing. "
                "Run `precompute_svd` again, it computes what is missing"
            )
    if not check:
        return factors
    bases = _intact(files, lambda line: None)
    for name, file in files.items():
        recorded = factors.weights[name].get("bases_sha256", bases.get(name))  # of an older release: none
        if bases.get(name) is None:
            raise DamagedFile(
                f"{storage.name_of(file)} is damaged: it does not hold the whole factors of {name}. Run "
                "`precompute_svd` again, it computes what is damaged"
            )
        if recorded is not None and bases[name] != recorded:
            raise FactorsMismatchError(
                f"{path} was made of other bases of {name} (hash {recorded[:12]}) than there are now in "
                f"{storage.name_of(file)} ({bases[name][:12]}). Run `precompute_svd` again for a set of those"
            )
        factors.weights[name]["bases_sha256"] = bases[name]
    return factors


def _read_factor_set(path: Path, computed: int) -> FactorSet:
    remedy = "Remove it and run `precompute_svd` again, which writes it again"
    manifest = read_sealed(path, remedy)
    if manifest.get("format") != FORMAT:
        raise FactorsMismatchError(f"{path} has format {manifest.get('format')}, this version reads {FORMAT}")
    try:
        return FactorSet(
            path=path,
            unfreeze_rank_ratio=manifest["unfreeze_rank_ratio"],
            free_subspace=manifest["free_subspace"],
            weights=manifest["weights"],
            rank_allocation=manifest.get("rank_allocation", "uniform"),
            min_retention_ratio=manifest.get("min_retention_ratio"),
            importance=manifest.get("importance"),
            computed=computed,
        )
    except KeyError as error:
        raise DamagedFile(f"{storage.name_of(path)} is damaged: it has no {error}. {remedy}") from None


def _is_there(address: str, manifest: dict[str, Any]) -> bool:
    """Whether an address has this manifest, undamaged."""
    found = storage.find(address)
    try:
        return found is not None and read_sealed(found, "") == json.loads(json.dumps(manifest))
    except DamagedFile:
        return False


def _intact(files: Mapping[str, Path], report: Callable[[str], None]) -> dict[str, str]:
    """Target -> the hash of the bases in its file, of those files that are there and hold what was written."""

    def check(name: str) -> str | None:
        file = files[name]
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                recorded = (opened.metadata() or {}).get("bases_sha256")
                found = named_sha256({key: tensor_sha256(opened.get_tensor(key)) for key in sorted(opened.keys())})
        except (SafetensorError, OSError, ValueError) as error:
            report(f"factors: {storage.name_of(file)} is damaged ({error}), {name} is decomposed again")
            return None
        if recorded not in (None, found):
            report(f"factors: {storage.name_of(file)} is damaged (its hash is another), {name} is decomposed again")
            return None
        return found

    with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="osft-factors") as pool:
        found = dict(zip(files, tqdm(pool.map(check, files), "check factors", len(files), delay=5.0), strict=True))
    return {name: digest for name, digest in found.items() if digest is not None}


def check_settings(factors: FactorSet, config: SubspaceConfig, targets: Sequence[Target]) -> None:
    """Raise FactorsMismatchError unless the set was made for these settings and target weights."""
    rank_allocation, min_retention_ratio = allocation_settings(config)
    wanted = {
        "unfreeze_rank_ratio": config.unfreeze_rank_ratio,
        "free_subspace": config.free_subspace,
        "rank_allocation": rank_allocation,
        "min_retention_ratio": min_retention_ratio,
    }
    for setting, value in wanted.items():
        made = getattr(factors, setting)
        if made != value:
            raise FactorsMismatchError(f"{factors.path} was made with {setting}={made}, this run wants {value}")
    names = {target.name for target in targets}
    if set(factors.weights) != names:
        name = sorted(set(factors.weights) ^ names)[0]
        where = "only the set" if name in factors.weights else "only this run"
        raise FactorsMismatchError(f"{factors.path} was made for other target weights: {where} has {name}")


def check_weights(factors: FactorSet, stored: ModelWeights, targets: Sequence[Target]) -> None:
    """Raise FactorsMismatchError unless the model's weights are those that were decomposed."""
    for target in targets:
        found, made = stored.sha256(target.tensor), factors.weights[target.name]["sha256"]
        if found != made:
            raise FactorsMismatchError(
                f"{factors.path} does not belong to {stored.folder}: the weight of {target.name} has hash "
                f"{found[:12]}, the set was made for {made[:12]}. Run `precompute_svd` for this model"
            )


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
