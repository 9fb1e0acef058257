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
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from osft import storage
from osft.models.checkpoint import CheckpointReader, tensor_sha256
from osft.models.conversion import ModelWeights
from osft.models.loading import empty_model
from osft.settings.subspace import SubspaceConfig
from osft.storage.atomic import atomic_path
from osft.storage.hashes import named_sha256
from osft.storage.sealed import DamagedFile, read_sealed, write_sealed
from osft.subspace.decomposition import (
    Factors,
    factor_shapes,
    split_by_inputs,
    split_of_inputs,
    unfrozen_rank,
)
from osft.subspace.factor_set import (
    FORMAT,
    FactorManifest,
    FactorManifestByInputs,
    FactorSet,
    SplitWeight,
    bases_in,
    bases_sha256,
    read_factor_set,
)
from osft.subspace.last_round import LastRound
from osft.subspace.rank_allocation import allocate_ranks, allocation_settings
from osft.subspace.shares import share_of
from osft.subspace.statistics import InputStatistics, Statistics
from osft.subspace.targets import Target, select_targets

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The target weights that one process has split."""

    weights: dict[str, SplitWeight]
    """By target."""
    computed: int
    """How many the store did not hold."""


def precompute(
    model_path: str | Path,
    store: str | Path,
    config: SubspaceConfig,
    *,
    importance: Mapping[str, float] | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> FactorSet:
    """Split every target weight of a model that the store does not hold yet, and write the set's manifest.

    As `split_share` and `join_shares`, in this process.
    """
    share = split_share(
        model_path, store, config, importance=importance, device=device, trust_remote_code=trust_remote_code
    )
    return join_shares(store, config, [share], importance=importance)


def split_share(
    model_path: str | Path,
    store: str | Path,
    config: SubspaceConfig,
    *,
    number: int = 0,
    processes: int = 1,
    importance: Mapping[str, float] | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Share:
    """Split the share of process `number` of a model's target weights, those that the store does not hold yet.

    Weights are decomposed but where their split follows from the last round's (`osft.subspace.last_round`). One weight,
    or one stack of experts, is in memory at a time, and no other process reads it. `importance` is that of
    `measure_importance`, for the adaptive rank allocation. `device` defaults to CUDA where there is one. Raises
    FileNotFoundError for a missing or incomplete model, ValueError for settings that select nothing and for a
    checkpoint whose target weights cannot be read or written back.
    """
    stored, targets = _open_targets(model_path, config, trust_remote_code=trust_remote_code, check_others=number == 0)
    ranks = allocate_ranks(targets, config, importance)
    targets = share_of(targets, number, processes)
    weights = _hashed(stored, targets)
    for target in targets:
        rank, weight = ranks[target.name], weights[target.name]
        key = _hash(FORMAT, weight["sha256"], rank, sorted(factor_shapes(target.shape, rank, config.free_subspace)))
        weight |= {"rank": rank, "file": f"weights/{key}.safetensors"}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    last_round, followed = LastRound(model_path, store, config), 0

    def compute(missing: set[str]) -> Iterator[tuple[str, Factors]]:
        nonlocal followed
        for target in targets:
            if target.name in missing:
                tensor = stored.tensor(target.tensor).to(device)
                factors, follows = last_round.split(target.name, tensor, ranks[target.name])
                followed += follows
                yield target.name, factors

    computed = _complete(store, weights, compute)
    if followed:
        logger.info(f"factors: {followed} of the {computed} computed follow from {last_round}")
    return Share(weights={name: SplitWeight(**weight) for name, weight in weights.items()}, computed=computed)


def join_shares(
    store: str | Path,
    config: SubspaceConfig,
    shares: Sequence[Share],
    *,
    importance: Mapping[str, float] | None = None,
) -> FactorSet:
    """Write the manifest of a set that was split in shares. It does not depend on how many there were."""
    rank_allocation, min_retention_ratio = allocation_settings(config)
    adaptive: dict[str, Any] = {}
    if rank_allocation != "uniform":
        adaptive = {
            "rank_allocation": rank_allocation,
            "min_retention_ratio": min_retention_ratio,
            "importance": dict(importance or {}),
        }
    manifest = FactorManifest(
        unfreeze_rank_ratio=config.unfreeze_rank_ratio,
        free_subspace=config.free_subspace,
        weights={name: weight for share in shares for name, weight in share.weights.items()},
        **adaptive,
    )
    return _write_set(store, manifest, sum(share.computed for share in shares))


def precompute_by_inputs(
    model_path: str | Path,
    store: str | Path,
    config: SubspaceConfig,
    statistics: Statistics,
    *,
    statistics_file: str,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> FactorSet:
    """As `precompute`, for protect="activations": split every target weight by the statistics of its layer's inputs.

    `statistics_file` is where `statistics` lie, relative to the store. Layers that read the same input share a file.
    Raises ValueError for statistics of other weights, too.
    """
    stored, targets = _open_targets(model_path, config, trust_remote_code=trust_remote_code)
    weights = _hashed(stored, targets)
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
                "gradient_energy": _energies(inputs.gradient_energies[name]),
            }
    if without := [name for name, weight in weights.items() if "file" not in weight]:
        raise ValueError(f"the statistics {statistics_file} are those of other weights: they have none of {without[0]}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    def compute(missing: set[str]) -> Iterator[tuple[str, Factors]]:
        for inputs in statistics.inputs():
            name = next((name for name in inputs.targets if name in missing), None)
            if name is not None:
                weight = weights[name]
                moment, energy = inputs.kept.to(device), inputs.gradient_energies[name].to(device)
                yield (
                    name,
                    split_by_inputs(moment, weight["rank"], weight["split_kind"], gradient_energy=energy, unit=unit),
                )

    computed = _complete(store, weights, compute)
    manifest = FactorManifestByInputs(
        protect="activations",
        unfreeze_rank_ratio=config.unfreeze_rank_ratio,
        free_subspace=config.free_subspace,
        weights={name: SplitWeight(**weight) for name, weight in weights.items()},
        statistics=statistics_file,
        unit=unit,
    )
    return _write_set(store, manifest, computed)


def _energies(energies: torch.Tensor) -> float | tuple[float, ...]:
    """Of a layer a number, of experts one each."""
    return tuple(energies.tolist()) if energies.ndim else energies.item()


def _moment_sha256(inputs: InputStatistics) -> str:
    return named_sha256({name: tensor_sha256(tensor) for name, tensor in inputs.input_tensors().items()})


def _open_targets(
    model_path: str | Path, config: SubspaceConfig, *, trust_remote_code: bool, check_others: bool = True
) -> tuple[ModelWeights, list[Target]]:
    """The weights of a model and its targets. `check_others`: read what is no target, for what is not finite."""
    model = empty_model(model_path, trust_remote_code=trust_remote_code)
    stored = ModelWeights(CheckpointReader(model_path), model)
    targets = select_targets(model, config.target_patterns)
    if check_others:
        stored.check_finite(but_for={target.tensor for target in targets})  # these when they are hashed
    for target in targets:
        stored.require(target.tensor)
        stored.check_invertible(target.tensor)
    return stored, targets


def _hashed(stored: ModelWeights, targets: Sequence[Target]) -> dict[str, dict[str, Any]]:
    """The `sha256` and `shape` of each target weight by its name."""
    return {
        target.name: {"sha256": stored.sha256(target.tensor), "shape": tuple(target.shape)}
        for target in tqdm(targets, desc="hash", unit="weight", mininterval=2.0, delay=5.0)
    }


def _complete(
    store: str | Path,
    weights: dict[str, dict[str, Any]],
    compute: Callable[[set[str]], Iterator[tuple[str, Factors]]],
) -> int:
    """Write the files of factors that the store lacks, and put `bases_sha256` into `weights`. Returns for how many.

    compute: gives the factors of those of these targets that have files of their own.
    """
    files = {name: storage.local(store) / weight["file"] for name, weight in weights.items()}
    storage.fetch_files(store, sorted({weight["file"] for weight in weights.values()}))
    bases, damaged = bases_in(files)
    for problem in damaged:
        logger.warning(f"factors: {problem} is decomposed again")
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
            described = {
                "weight": name,
                "sha256": weights[name]["sha256"],
                "bases_sha256": bases_sha256(tensors),
            }
            with atomic_path(files[name], keep_existing=True) as temporary:
                save_file(tensors, temporary, metadata=described)
            storage.publish(storage.join(store, weights[name]["file"]))
            progress.update()
    bases |= bases_in({name: files[name] for name in missing})[0]
    for name, weight in weights.items():
        if name not in bases:
            raise DamagedFile(f"{files[name]} was written and reads as something else. Check the disk of {store}")
        weight["bases_sha256"] = bases[name]
    return len(missing)


def _write_set(store: str | Path, manifest: FactorManifest, computed: int) -> FactorSet:
    plain = manifest.to_dict()
    address = storage.join(store, "sets", f"{_hash(plain)}.json")
    if not _is_there(address, plain):
        write_sealed(storage.local(address), plain)
        storage.publish(address)
    total = len(manifest.weights)
    logger.info(f"factors: computed {computed}, reused {total - computed} of {total} weights ({address})")
    return read_factor_set(storage.local(address), computed)


def _is_there(address: str, manifest: dict[str, Any]) -> bool:
    """Whether an address has this manifest, undamaged."""
    found = storage.find(address)
    try:
        return found is not None and read_sealed(found, "") == manifest
    except DamagedFile:
        return False


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
