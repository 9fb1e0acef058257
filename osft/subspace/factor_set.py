"""A factor set: what a model's target weights were split into, as a manifest of the store names it."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from osft import storage
from osft.models.checkpoint import tensor_sha256
from osft.models.conversion import ModelWeights
from osft.settings.subspace import FreeSubspace, Protect, SubspaceConfig
from osft.storage.hashes import named_sha256
from osft.storage.record import Record, RecordError, RecordPart
from osft.storage.sealed import DamagedFile, read_sealed
from osft.subspace.decomposition import Factors, SplitKind, curvature
from osft.subspace.rank_allocation import allocation_settings
from osft.subspace.targets import Target

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


class SplitWeight(RecordPart):
    """One target weight of a set, and where its factors are."""

    sha256: str
    """Of the weight."""
    shape: tuple[int, ...]
    """(m, n), or (experts, m, n)."""
    rank: int
    """Unfrozen directions."""
    file: str
    """Relative to the store."""
    split_kind: SplitKind | None = None
    """With protect="activations"; else the set's `free_subspace`."""
    gradient_energy: float | tuple[float, ...] | None = None
    """With protect="activations": the s of its layer, of experts one each."""
    bases_sha256: str | None = None
    """None in sets of early releases."""


class FactorManifest(Record):
    """The file that makes a set of factors complete.

    What it does not need is not in it: its content names it, so that what there was before keeps its name.
    """

    FORMAT: ClassVar[int] = FORMAT

    protect: Protect = "weights"
    unfreeze_rank_ratio: float
    free_subspace: FreeSubspace
    weights: dict[str, SplitWeight]
    """By target."""
    rank_allocation: str = "uniform"
    min_retention_ratio: float | None = None
    """Of the adaptive allocation."""
    importance: dict[str, float] | None = None
    """Of the adaptive allocation: block -> what `measure_importance` found."""
    statistics: str | None = None
    """With protect="activations": the file of the statistics that it was computed from, relative to the store."""
    unit: float | None = None
    """With protect="activations": what curvatures are divided by (`Statistics.unit`)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: of what was given."""
        return {"format": self.FORMAT} | self.model_dump(mode="json", exclude_unset=True)


class FactorManifestByInputs(FactorManifest):
    """That of a set with protect="activations"."""

    FORMAT: ClassVar[int] = BY_INPUTS_FORMAT

    protect: Literal["activations"]
    statistics: str
    unit: float


@dataclass(kw_only=True, slots=True)
class FactorSet:
    """One model's factors, as a manifest names them: the fields of `FactorManifest`."""

    path: Path
    """The manifest file."""
    unfreeze_rank_ratio: float
    free_subspace: FreeSubspace
    weights: dict[str, SplitWeight]
    """By target."""
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
        digests: dict[str, str] = {}
        for target in sorted(self.weights):
            digest = self.weights[target].bases_sha256
            if digest is None:
                raise ValueError(f"{self.path} is of an early release, without hashes of its bases. Load it with check")
            digests[target] = digest
        return named_sha256(digests)

    def factors_file(self, target: str) -> Path:
        """The safetensors file with the factors of `target`."""
        return self.path.parent.parent / self.weights[target].file

    @property
    def ranks(self) -> dict[str, int]:
        """Target -> the number of its unfrozen directions."""
        return {target: weight.rank for target, weight in self.weights.items()}

    @property
    def split_kinds(self) -> dict[str, SplitKind]:
        """Target -> how it is split."""
        return {target: weight.split_kind or self.free_subspace for target, weight in self.weights.items()}

    def rows(self, target: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows, or experts, [start, stop) of the basis `name` (left, right or frozen) of `target`, float32."""
        with safe_open(self.factors_file(target), framework="pt") as opened:
            return opened.get_slice(name)[start:stop]

    def factors(self, target: str) -> Factors:
        """All that is stored of `target`. Raises FileNotFoundError, DamagedFile if it is not what the set is of."""
        file = self.factors_file(target)
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
        except (SafetensorError, ValueError) as error:
            raise DamagedFile(f"{storage.name_of(file)} is damaged ({error})") from None
        if bases_sha256(tensors) != self.weights[target].bases_sha256:
            raise DamagedFile(f"{storage.name_of(file)} does not hold the bases that {self.path} is of")
        return Factors(**tensors)

    def first_rows(self, target: str) -> list[torch.Tensor]:
        """The first row of each basis of `target`: enough to tell whether two sets were computed alike."""
        with safe_open(self.factors_file(target), framework="pt") as opened:
            return [opened.get_slice(name)[:1] for name in sorted(opened.keys()) if name not in _SPECTRA]

    def curvature(self, target: str) -> torch.Tensor | None:
        """s c_j of the free directions of a split by inputs, as `Factors` has it; None of one by singular vectors."""
        if self.protect == "weights":
            return None
        weight = self.weights[target]
        assert self.unit is not None, "written with every such set"
        assert weight.split_kind is not None, "written with every such weight"
        with safe_open(self.factors_file(target), framework="pt") as opened:
            energies = opened.get_tensor("energies")
        gradient_energy = torch.tensor(weight.gradient_energy)
        return curvature(energies, weight.rank, weight.split_kind, gradient_energy=gradient_energy, unit=self.unit)

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


def load_factor_set(path: str | Path, *, check: bool = True) -> FactorSet:
    """Read a manifest, of a path or URI, and `check` that the bases are those that it was written for.

    Raises FileNotFoundError if it or one of its files is missing, DamagedFile if one is not what was written.
    """
    address, found = path, storage.find(path)
    if found is None:
        raise FileNotFoundError(f"there is no factor set {path}. Run `precompute_svd` for this model first")
    factors = read_factor_set(found, 0)
    store = str(address).rsplit("/", 2)[0]
    storage.fetch_files(store, [weight.file for weight in factors.weights.values()])
    files = {name: factors.factors_file(name) for name in factors.weights}
    for name, file in files.items():
        if not file.is_file():
            raise FileNotFoundError(
                f"{path} is damaged: the factors of {name} ({file}) are missing. "
                "Run `precompute_svd` again, it computes what is missing"
            )
    if not check:
        return factors
    bases, _ = bases_in(files)
    for name, file in files.items():
        recorded = factors.weights[name].bases_sha256
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
        factors.weights[name] = factors.weights[name].replace(bases_sha256=bases[name])
    return factors


def read_factor_set(path: Path, computed: int) -> FactorSet:
    """The set of a manifest on this machine, whose files are not looked at; `computed` is how many of them are new."""
    remedy = "Remove it and run `precompute_svd` again, which writes it again"
    found = read_sealed(path, remedy)
    kind = FactorManifestByInputs if found.get("protect") == "activations" else FactorManifest
    if found.get("format") != kind.FORMAT:
        raise FactorsMismatchError(
            f"{path} has format {found.get('format')}, this version reads {kind.FORMAT}. Run `precompute_svd` again"
        )
    try:
        manifest = kind.from_dict(found, storage.name_of(path))
    except RecordError as error:
        raise DamagedFile(f"{error}. {remedy}") from None
    return FactorSet(path=path, computed=computed, **dict(manifest))


def bases_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of what a file of factors holds, by the tensors' names."""
    return named_sha256({name: tensor_sha256(tensors[name]) for name in sorted(tensors)})


def bases_in(files: Mapping[str, Path]) -> tuple[dict[str, str], list[str]]:
    """Target -> the hash of the bases in its file, of those files that are there and hold what was written.

    Also what is wrong with those that do not, a line for each file.
    """
    damaged: list[str] = []

    def check(name: str) -> str | None:
        file = files[name]
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                recorded = (opened.metadata() or {}).get("bases_sha256")
                found = bases_sha256({key: opened.get_tensor(key) for key in sorted(opened.keys())})
        except (SafetensorError, OSError, ValueError) as error:
            damaged.append(f"{storage.name_of(file)} is damaged ({error}), {name}")
            return None
        if recorded not in (None, found):
            damaged.append(f"{storage.name_of(file)} is damaged (its hash is another), {name}")
            return None
        return found

    of_file = {file: name for name, file in files.items()}  # each once
    with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="osft-factors") as pool:
        checked = tqdm(pool.map(check, of_file.values()), "check factors", len(of_file), delay=5.0)
        found = dict(zip(of_file, checked, strict=True))
    return {name: digest for name, file in files.items() if (digest := found[file]) is not None}, damaged


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
        found, made = stored.sha256(target.tensor), factors.weights[target.name].sha256
        if found != made:
            raise FactorsMismatchError(
                f"{factors.path} does not belong to {stored.folder}: the weight of {target.name} has hash "
                f"{found[:12]}, the set was made for {made[:12]}. Run `precompute_svd` for this model"
            )
