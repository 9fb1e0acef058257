"""Content-addressed storage of decompositions.

    <store>/weights/<key>.safetensors   the factors of one weight
    <store>/sets/<key>.json             a manifest: the factors of one model, written last

A weight's key is the hash of its bytes and of what determines its factors, its rank among them, so a weight that did
not change is never decomposed twice, whichever model it came with and however its rank was chosen. Each file appears
whole or not at all (`osft.atomic`): a killed run loses the weight at hand and the next one goes on behind it; two runs
at once write equal files. A manifest names its weights and their hashes, and training refuses a set whose hashes are
not those of its model.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from osft import storage
from osft.atomic import atomic_path, write_json
from osft.checkpoint import CheckpointReader, tensor_sha256
from osft.config import SubspaceConfig
from osft.conversion import ModelWeights
from osft.models import empty_model
from osft.subspace.decomposition import decompose, factor_shapes
from osft.subspace.rank_allocation import allocate_ranks, allocation_settings
from osft.subspace.targets import Target, select_targets

FORMAT = 2
"""Part of every key: raise it when what is stored, or how it is computed, changes."""


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
    """Target -> `sha256` of its weight, `shape`, `rank`, `file` (relative to the store)."""
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
    there = storage.files(storage.join(store, "weights")) if storage.is_remote(store) else {}
    reader = CheckpointReader(model_path)
    model = empty_model(model_path, trust_remote_code=trust_remote_code)
    stored = ModelWeights(reader, model)
    targets = select_targets(model, config.target_patterns)
    ranks = allocate_ranks(targets, config, importance)
    for target in targets:
        stored.require(target.tensor)
        stored.check_invertible(target.tensor)

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights: dict[str, dict[str, Any]] = {}
    computed = 0
    for target in tqdm(targets, desc="decompose", unit="weight", mininterval=2.0):
        weight, rank = stored.tensor(target.tensor), ranks[target.name]
        digest = tensor_sha256(weight)
        key = _hash(FORMAT, digest, rank, sorted(factor_shapes(target.shape, rank, config.free_subspace)))
        file = mirror / "weights" / f"{key}.safetensors"
        if not (file.name in there or (file.is_file() and not storage.is_remote(store))):
            factors = decompose(weight.to(device), rank, config.free_subspace)
            tensors = {field: t.cpu() for field, t in asdict(factors).items() if t is not None}
            with atomic_path(file) as temporary:
                save_file(tensors, temporary, metadata={"weight": target.name, "sha256": digest})
            storage.publish(storage.join(store, "weights", file.name))
            computed += 1
        weights[target.name] = {
            "sha256": digest,
            "shape": list(target.shape),
            "rank": rank,
            "file": str(file.relative_to(mirror)),
        }

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
    if storage.find(address) is None:
        write_json(storage.local(address), manifest)
        storage.publish(address)
    report(f"factors: computed {computed}, reused {len(targets) - computed} of {len(targets)} weights ({address})")
    return load_factor_set(address, computed=computed)


def load_factor_set(path: str | Path, *, computed: int = 0) -> FactorSet:
    """Read a manifest, of a path or URI. Raises FileNotFoundError if it or one of its files is missing."""
    address, found = path, storage.find(path)
    if found is None:
        raise FileNotFoundError(f"there is no factor set {path}. Run `precompute_svd` for this model first")
    path = found
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise FactorsMismatchError(f"{path} has format {manifest.get('format')}, this version reads {FORMAT}")
    factors = FactorSet(
        path=path,
        unfreeze_rank_ratio=manifest["unfreeze_rank_ratio"],
        free_subspace=manifest["free_subspace"],
        weights=manifest["weights"],
        rank_allocation=manifest.get("rank_allocation", "uniform"),
        min_retention_ratio=manifest.get("min_retention_ratio"),
        importance=manifest.get("importance"),
        computed=computed,
    )
    store = str(address).rsplit("/", 2)[0]
    storage.fetch_files(store, [weight["file"] for weight in factors.weights.values()])
    for name in factors.weights:
        if not factors.factors_file(name).is_file():
            raise FileNotFoundError(
                f"{path} is damaged: the factors of {name} ({factors.factors_file(name)}) are missing. "
                "Run `precompute_svd` again, it computes what is missing"
            )
    return factors


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
