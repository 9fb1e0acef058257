"""Content-addressed storage of splits.

    <store>/weights/<key>.safetensors   the factors of one weight, or of all that read one input
    <store>/sets/<key>.json             a manifest: the factors of one model, written last
    <store>/statistics/, moments/       what protect="activations" is computed from (`osft.subspace.statistics`)

A key is the hash of what determines the factors: the weight's bytes, or with protect="activations" the moments of the
inputs, and the rank. So a weight that did not change is never decomposed twice, whichever model it came with and
however its rank was chosen. The same key can stand for other bases: signs and rotations depend on the hardware. So a
file and the manifest hold the hash of the bases, too, and a set's key depends on it.

    what happens                            what the next run does
    a run is killed                         computes the weight at hand and what follows (`osft.storage.atomic`)
    two runs compute at once                both use the file that was written first
    a file is missing, cut or damaged       precompute says so and computes it again; load_factor_set raises
    a manifest is damaged                   precompute writes it again; load_factor_set raises
    the model's weights are others          they have other keys; training refuses a set that was made for others
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from osft import storage
from osft.models.checkpoint import CheckpointReader, tensor_sha256
from osft.models.conversion import ModelWeights
from osft.models.loading import empty_model
from osft.settings.subspace import Protect, SubspaceConfig
from osft.storage.atomic import atomic_path
from osft.storage.hashes import named_sha256
from osft.storage.sealed import DamagedFile, read_sealed, write_sealed
from osft.subspace.decomposition import (
    Factors,
    SplitKind,
    curvature,
    decompose,
    factor_shapes,
    split_by_inputs,
    split_of_inputs,
    unfrozen_rank,
)
from osft.subspace.rank_allocation import allocate_ranks, allocation_settings
from osft.subspace.statistics import InputStatistics, Statistics
from osft.subspace.targets import Target, select_targets

FORMAT = 2
"""Part of every key: raise it when what is stored, or how it is computed, changes."""
BY_INPUTS_FORMAT = 3
"""Of the sets of protect="activations", whose bases stay: raise it when a set's `unit` is computed in another way."""

_SPECTRA = ("singular_values", "energies")
"""What a file of factors holds beside the bases."""
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
    """Target -> `sha256` of its weight, `shape`, `rank`, `file` (relative to the store), `bases_sha256`; with
    protect="activations" also `split_kind`, and `gradient_energy`, the s of its layer (of experts a list)."""
    protect: Protect = "weights"
    statistics: str | None = None
    """With protect="activations": the file of the statistics that it was computed from, relative to the store."""
    unit: float | None = None
    """With protect="activations": what curvatures are divided by (`Statistics.unit`)."""
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

    @property
    def split_kinds(self) -> dict[str, SplitKind]:
        """Target -> how it is split."""
        return {target: weight.get("split_kind", self.free_subspace) for target, weight in self.weights.items()}

    def rows(self, target: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows, or experts, [start, stop) of the basis `name` (left, right or frozen) of `target`, float32."""
        with safe_open(self.factors_file(target), framework="pt") as opened:
            return opened.get_slice(name)[start:stop]

    def first_rows(self, target: str) -> list[torch.Tensor]:
        """The first row of each basis of `target`: enough to tell whether two sets were computed alike."""
        with safe_open(self.factors_file(target), framework="pt") as opened:
            return [opened.get_slice(name)[:1] for name in sorted(opened.keys()) if name not in _SPECTRA]

    def curvature(self, target: str) -> torch.Tensor | None:
        """s c_j of the free directions of a split by inputs, as `Factors` has it; None of one by singular vectors."""
        if self.protect == "weights":
            return None
        assert self.unit is not None, "written with every such set"
        weight = self.weights[target]
        with safe_open(self.factors_file(target), framework="pt") as opened:
            energies = opened.get_tensor("energies")
        gradient_energy = torch.tensor(weight["gradient_energy"])
        return curvature(
            energies, weight["rank"], weight["split_kind"], gradient_energy=gradient_energy, unit=self.unit
        )

    def spectrum(self, target: str) -> torch.Tensor:
        """Singular values, or with protect="activations" the roots of the inputs' energies: descending, float32.

        Of a stack of experts the root of the sum of their squares.
        """
        with safe_open(self.factors_file(target), framework="pt") as opened:
            if self.protect == "weights":
                values = opened.get_tensor("singular_values")
            else:
                values = opened.get_tensor("energies").clamp_min(0).sqrt()
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
    stored, targets, weights = _read_targets(model_path, config, trust_remote_code=trust_remote_code)
    ranks = allocate_ranks(targets, config, importance)
    for target in targets:
        rank, weight = ranks[target.name], weights[target.name]
        key = _hash(FORMAT, weight["sha256"], rank, sorted(factor_shapes(target.shape, rank, config.free_subspace)))
        weight |= {"rank": rank, "file": f"weights/{key}.safetensors"}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def compute(missing: set[str]) -> Iterator[tuple[str, Factors]]:
        for target in targets:
            if target.name in missing:
                tensor = stored.tensor(target.tensor).to(device)
                yield target.name, decompose(tensor, ranks[target.name], config.free_subspace)

    computed = _complete(store, weights, compute, report)
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
    return _write_set(store, manifest, computed, report)


def precompute_by_inputs(
    model_path: str | Path,
    store: str | Path,
    config: SubspaceConfig,
    statistics: Statistics,
    *,
    statistics_file: str,
    device: str | None = None,
    trust_remote_code: bool = False,
    report: Callable[[str], None] = print,
) -> FactorSet:
    """As `precompute`, for protect="activations": split every target weight by the statistics of its layer's inputs.

    `statistics_file` is where `statistics` lie, relative to the store. Layers that read the same input share a file.
    Raises ValueError for statistics of other weights, too.
    """
    _, targets, weights = _read_targets(model_path, config, trust_remote_code=trust_remote_code)
    shapes = {target.name: target.shape for target in targets}
    unit = statistics.unit
    for inputs in statistics.inputs():
        split_kind = split_of_inputs(transposed=inputs.transposed)
        digest = _moment_sha256(inputs)
        for name in set(inputs.targets) & set(shapes):
            rank = unfrozen_rank(shapes[name], config.unfreeze_rank_ratio, split_kind)
            weights[name] |= {
                "rank": rank,
                "file": f"weights/{_hash(FORMAT, 'inputs', digest, rank, split_kind)}.safetensors",
                "split_kind": split_kind,
                "gradient_energy": inputs.gradient_energies[name].tolist(),
            }
    if without := [name for name, weight in weights.items() if "file" not in weight]:
        raise ValueError(f"the statistics {statistics_file} are those of other weights: they have none of {without[0]}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def compute(missing: set[str]) -> Iterator[tuple[str, Factors]]:
        for inputs in statistics.inputs():
            name = next((name for name in inputs.targets if name in missing), None)
            if name is not None:
                weight = weights[name]
                moment, energy = inputs.moment.to(device), inputs.gradient_energies[name].to(device)
                yield (
                    name,
                    split_by_inputs(moment, weight["rank"], weight["split_kind"], gradient_energy=energy, unit=unit),
                )

    computed = _complete(store, weights, compute, report)
    manifest = {
        "format": BY_INPUTS_FORMAT,
        "protect": "activations",
        "unfreeze_rank_ratio": config.unfreeze_rank_ratio,
        "free_subspace": config.free_subspace,
        "weights": weights,
        "statistics": statistics_file,
        "unit": unit,
    }
    return _write_set(store, manifest, computed, report)


def _moment_sha256(inputs: InputStatistics) -> str:
    moment = inputs.moment
    parts = {"basis": moment.basis, "energies": moment.energies, "rest": moment.rest}
    return named_sha256({name: tensor_sha256(tensor) for name, tensor in parts.items()})


def _read_targets(
    model_path: str | Path, config: SubspaceConfig, *, trust_remote_code: bool
) -> tuple[ModelWeights, list[Target], dict[str, dict[str, Any]]]:
    """The target weights of a model, checked, and the `sha256` and `shape` of each by its name."""
    model = empty_model(model_path, trust_remote_code=trust_remote_code)
    stored = ModelWeights(CheckpointReader(model_path), model)
    targets = select_targets(model, config.target_patterns)
    stored.check_finite(but_for={target.tensor for target in targets})  # these when they are hashed
    for target in targets:
        stored.require(target.tensor)
        stored.check_invertible(target.tensor)
    weights: dict[str, dict[str, Any]] = {
        target.name: {"sha256": stored.sha256(target.tensor), "shape": list(target.shape)}
        for target in tqdm(targets, desc="hash", unit="weight", mininterval=2.0, delay=5.0)
    }
    return stored, targets, weights


def _complete(
    store: str | Path,
    weights: dict[str, dict[str, Any]],
    compute: Callable[[set[str]], Iterator[tuple[str, Factors]]],
    report: Callable[[str], None],
) -> int:
    """Write the files of factors that the store lacks, and put `bases_sha256` into `weights`. Returns for how many.

    compute: gives the factors of those of these targets that have files of their own.
    """
    files = {name: storage.local(store) / weight["file"] for name, weight in weights.items()}
    storage.fetch_files(store, sorted({weight["file"] for weight in weights.values()}))
    bases = _intact(files, report)
    missing = {name for name in weights if name not in bases}
    for name in missing:
        files[name].unlink(missing_ok=True)
    waiting = {files[name] for name in missing}
    with tqdm(total=len(waiting), desc="decompose", unit="file", mininterval=2.0, disable=not missing) as progress:
        for name, factors in compute(missing):
            tensors = {
                field: tensor.cpu().contiguous()
                for field, tensor in asdict(factors).items()
                if tensor is not None and field != "curvature"
            }
            digest = named_sha256({field: tensor_sha256(tensors[field]) for field in sorted(tensors)})
            described = {"weight": name, "sha256": weights[name]["sha256"], "bases_sha256": digest}
            with atomic_path(files[name], keep_existing=True) as temporary:
                save_file(tensors, temporary, metadata=described)
            storage.publish(storage.join(store, weights[name]["file"]))
            progress.update()
    bases |= _intact({name: files[name] for name in missing}, report)
    for name, weight in weights.items():
        if name not in bases:
            raise DamagedFile(f"{files[name]} was written and reads as something else. Check the disk of {store}")
        weight["bases_sha256"] = bases[name]
    return len(missing)


def _write_set(store: str | Path, manifest: dict[str, Any], computed: int, report: Callable[[str], None]) -> FactorSet:
    address = storage.join(store, "sets", f"{_hash(manifest)}.json")
    if not _is_there(address, manifest):
        write_sealed(storage.local(address), manifest)
        storage.publish(address)
    total = len(manifest["weights"])
    report(f"factors: computed {computed}, reused {total - computed} of {total} weights ({address})")
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
    expected = BY_INPUTS_FORMAT if manifest.get("protect") == "activations" else FORMAT
    if manifest.get("format") != expected:
        raise FactorsMismatchError(
            f"{path} has format {manifest.get('format')}, this version reads {expected}. Run `precompute_svd` again"
        )
    try:
        return FactorSet(
            path=path,
            unfreeze_rank_ratio=manifest["unfreeze_rank_ratio"],
            free_subspace=manifest["free_subspace"],
            weights=manifest["weights"],
            rank_allocation=manifest.get("rank_allocation", "uniform"),
            min_retention_ratio=manifest.get("min_retention_ratio"),
            importance=manifest.get("importance"),
            protect=manifest.get("protect", "weights"),
            statistics=manifest.get("statistics"),
            unit=manifest.get("unit"),
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

    of_file = {file: name for name, file in files.items()}  # each once
    with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="osft-factors") as pool:
        checked = tqdm(pool.map(check, of_file.values()), "check factors", len(of_file), delay=5.0)
        found = dict(zip(of_file, checked, strict=True))
    return {name: digest for name, file in files.items() if (digest := found[file]) is not None}


def check_settings(factors: FactorSet, config: SubspaceConfig, targets: Sequence[Target]) -> None:
    """Raise FactorsMismatchError unless the set was made for these settings and target weights."""
    rank_allocation, min_retention_ratio = allocation_settings(config)
    wanted = {
        "protect": config.protect,
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
