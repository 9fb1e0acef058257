"""Content-addressed storage of decompositions.

    <store>/weights/<key>.safetensors   the factors of one weight
    <store>/sets/<key>.json             a manifest: the factors of one model, written last

A weight's key is the hash of its bytes and of what determines its factors, so a weight that did not change is
never decomposed twice, whichever model it came with. Each file appears whole or not at all (`osft.atomic`): a
killed run loses the weight at hand and the next one goes on behind it; two runs at once write equal files. A
manifest names its weights and their hashes, and training refuses a set whose hashes are not those of its model.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from osft.atomic import atomic_path, write_json
from osft.checkpoint import CheckpointReader, tensor_sha256
from osft.config import SubspaceConfig
from osft.models import empty_model
from osft.subspace.decomposition import decompose, factor_shapes, unfrozen_rank
from osft.subspace.targets import linear_shape, select_targets

FORMAT = 1
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
    """Target module -> `sha256` of its weight, `shape`, `rank`, `file` (relative to the store)."""
    computed: int = 0
    """How many decompositions this call computed; the rest was there."""

    @property
    def key(self) -> str:
        """The set's content hash, its file's stem."""
        return self.path.stem

    def factors_file(self, target: str) -> Path:
        """The safetensors file with the factors of `target`."""
        return self.path.parent.parent / self.weights[target]["file"]

    def rows(self, target: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the basis `name` (left, right or frozen) of `target`, float32."""
        with safe_open(self.factors_file(target), framework="pt") as opened:
            return opened.get_slice(name)[start:stop]

    def singular_values(self, target: str) -> torch.Tensor:
        """(min(m, n),), descending, float32."""
        with safe_open(self.factors_file(target), framework="pt") as opened:
            return opened.get_tensor("singular_values")


def precompute(
    model_path: str | Path,
    store: str | Path,
    config: SubspaceConfig,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    report: Callable[[str], None] = print,
) -> FactorSet:
    """Decompose every target weight of a model that the store does not hold yet, and write the set's manifest.

    One weight is in memory at a time. `device` defaults to CUDA where there is one. Raises FileNotFoundError for
    a missing or incomplete model, ValueError for settings that select nothing.
    """
    store = Path(store)
    reader = CheckpointReader(model_path)
    model = empty_model(model_path, trust_remote_code=trust_remote_code)
    targets = select_targets(model, config.target_patterns)
    shapes = {name: linear_shape(model, name) for name in targets}
    ranks = {name: unfrozen_rank(shape, config.unfreeze_rank_ratio) for name, shape in shapes.items()}
    for name in targets:
        if f"{name}.weight" not in reader:
            raise ValueError(
                f"{model_path} stores no tensor {name}.weight, although its architecture has that layer. Load the "
                "model once with AutoModelForCausalLM and save it with `save_pretrained` to get matching names"
            )

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights: dict[str, dict[str, Any]] = {}
    computed = 0
    for name in tqdm(targets, desc="decompose", unit="weight", mininterval=2.0):
        weight = reader.tensor(f"{name}.weight")
        digest = tensor_sha256(weight)
        key = _hash(FORMAT, digest, ranks[name], sorted(factor_shapes(shapes[name], ranks[name], config.free_subspace)))
        file = store / "weights" / f"{key}.safetensors"
        if not file.is_file():
            factors = decompose(weight.to(device), ranks[name], config.free_subspace)
            tensors = {field: t.cpu() for field, t in asdict(factors).items() if t is not None}
            with atomic_path(file) as temporary:
                save_file(tensors, temporary, metadata={"weight": name, "sha256": digest})
            computed += 1
        weights[name] = {
            "sha256": digest,
            "shape": list(shapes[name]),
            "rank": ranks[name],
            "file": str(file.relative_to(store)),
        }

    manifest = {
        "format": FORMAT,
        "unfreeze_rank_ratio": config.unfreeze_rank_ratio,
        "free_subspace": config.free_subspace,
        "weights": weights,
    }
    path = store / "sets" / f"{_hash(manifest)}.json"
    if not path.is_file():
        write_json(path, manifest)
    report(f"factors: computed {computed}, reused {len(targets) - computed} of {len(targets)} weights ({path})")
    return load_factor_set(path, computed=computed)


def load_factor_set(path: str | Path, *, computed: int = 0) -> FactorSet:
    """Read a manifest. Raises FileNotFoundError if it or one of its files is missing."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no factor set {path}. Run `precompute_svd` for this model first")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise FactorsMismatchError(f"{path} has format {manifest.get('format')}, this version reads {FORMAT}")
    factors = FactorSet(
        path=path,
        unfreeze_rank_ratio=manifest["unfreeze_rank_ratio"],
        free_subspace=manifest["free_subspace"],
        weights=manifest["weights"],
        computed=computed,
    )
    for name in factors.weights:
        if not factors.factors_file(name).is_file():
            raise FileNotFoundError(
                f"{path} is damaged: the factors of {name} ({factors.factors_file(name)}) are missing. "
                "Run `precompute_svd` again, it computes what is missing"
            )
    return factors


def check_settings(factors: FactorSet, config: SubspaceConfig, targets: list[str]) -> None:
    """Raise FactorsMismatchError unless the set was made for these settings and target weights."""
    for setting in ("unfreeze_rank_ratio", "free_subspace"):
        made, wanted = getattr(factors, setting), getattr(config, setting)
        if made != wanted:
            raise FactorsMismatchError(f"{factors.path} was made with {setting}={made}, this run wants {wanted}")
    if set(factors.weights) != set(targets):
        name = sorted(set(factors.weights) ^ set(targets))[0]
        where = "only the set" if name in factors.weights else "only this run"
        raise FactorsMismatchError(f"{factors.path} was made for other target weights: {where} has {name}")


def check_weights(factors: FactorSet, reader: CheckpointReader, targets: list[str]) -> None:
    """Raise FactorsMismatchError unless the model's weights are those that were decomposed."""
    for name in targets:
        found = reader.sha256(f"{name}.weight")
        if found != factors.weights[name]["sha256"]:
            raise FactorsMismatchError(
                f"{factors.path} does not belong to {reader.folder}: the weight of {name} has hash {found[:12]}, "
                f"the set was made for {factors.weights[name]['sha256'][:12]}. Run `precompute_svd` for this model"
            )


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
