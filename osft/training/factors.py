"""The factor set that a run trains with: the one that is named, or the one that the store holds or gets.

python -m osft.training.factors WORK.json OUTCOME.json      computes it, or a share, on a GPU (`own_process`)
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from osft import storage
from osft.data.packing import Feeding
from osft.settings.subspace import SubspaceConfig
from osft.settings.training import TrainConfig
from osft.subspace.factor_set import FactorSet, SplitWeight, load_factor_set
from osft.subspace.factor_store import Share, join_shares, precompute, precompute_by_inputs, split_share
from osft.subspace.preflight import Preflight
from osft.subspace.rank_allocation import measure_importance
from osft.subspace.statistics_store import load_statistics
from osft.training.own_process import answer, in_own_process, in_own_processes
from osft.training.prepare import data_folder
from osft.training.statistics import calibrated

if TYPE_CHECKING:
    from osft.data.dataset_folder import PreparedData

_MODULE = "osft.training.factors"


def factor_set(config: TrainConfig, model: Path, data: "PreparedData", preflight: Preflight) -> FactorSet:
    """The factor set that is named, or the one that the store holds or gets."""
    if named := _named_factor_set(config):
        return named
    return compute_factors(
        model,
        data.folder,
        factor_store(config),
        config.subspace,
        preflight=preflight,
        trust_remote_code=config.trust_remote_code,
    )


def factor_store(config: TrainConfig) -> str:
    """The path or URI of the store that the factors are in, or go to."""
    if config.factors and _names_a_set(config.factors):
        if storage.is_remote(config.factors):
            return config.factors.rsplit("/", 2)[0]
        return str(Path(config.factors).absolute().parents[1])
    return config.factors or storage.join(data_folder(config), "factors")


def _names_a_set(factors: str) -> bool:
    return Path(factors).is_file() or factors.endswith(".json")


def named_factors(config: TrainConfig) -> dict[str, str]:
    """What the run is made of by a factor set that is named in the settings; nothing if it is found or computed."""
    named = _named_factor_set(config)
    return {"factors": named.bases_sha256} if named else {}


def _named_factor_set(config: TrainConfig) -> FactorSet | None:
    if not config.factors or not _names_a_set(config.factors):
        return None
    if storage.find(config.factors) is None:
        raise FileNotFoundError(f"there is no factor set {config.factors}. Leave `factors` out to have it computed")
    return load_factor_set(config.factors)


def compute_factors(
    model: Path,
    data: str | Path,
    store: str | Path,
    subspace: SubspaceConfig,
    *,
    preflight: Preflight,
    trust_remote_code: bool = False,
    processes: int | None = None,
) -> FactorSet:
    """Split what `store` does not hold yet.

    With adaptive ranks, the layers' importance is measured on `data` first. With protect="activations" their inputs
    are, on other text, unless the model carries its statistics (`osft.training.statistics`).

    With GPUs, that is done in processes of their own, which end: a CUDA context would keep several 100 MB of the GPU
    from the training processes for as long as this one waits for them. With protect="weights" there are as many
    `processes` as GPUs, or as are given, each with its share of the weights. Raises what another process raised.
    """
    processes = processes or max(1, torch.cuda.device_count())
    work = {
        "model": str(model),
        "data": str(data),
        "store": str(store),
        "subspace": subspace.to_dict(),
        "preflight": preflight.to_dict(),
        "trust_remote_code": trust_remote_code,
    }
    if subspace.protect == "weights" and processes > 1:
        importance = in_own_process(_MODULE, work | {"importance_only": True}) if _is_adaptive(subspace) else None
        parts = [work | {"importance": importance, "number": n, "processes": processes} for n in range(processes)]
        shares = [
            Share(
                weights={name: SplitWeight.from_plain(weight) for name, weight in found["weights"].items()},
                computed=found["computed"],
            )
            for found in in_own_processes(_MODULE, parts)
        ]
        return join_shares(store, subspace, shares, importance=importance)
    if not torch.cuda.is_available():
        return compute_factors_here(work, device="cpu")
    found = in_own_process(_MODULE, work)
    return replace(load_factor_set(found["path"]), computed=found["computed"])


def compute_factors_here(work: dict[str, Any], *, device: str) -> FactorSet:
    """`compute_factors` in this process."""
    model, subspace = Path(work["model"]), SubspaceConfig(**work["subspace"])
    common: dict[str, Any] = {"device": device, "trust_remote_code": work["trust_remote_code"]}
    if subspace.protect == "activations":
        preflight = Preflight.from_dict(work["preflight"])
        address = calibrated(model, work["store"], subspace, preflight=preflight, **common)
        file = address.removeprefix(f"{work['store']}/")
        return precompute_by_inputs(
            model, work["store"], subspace, load_statistics(address), statistics_file=file, **common
        )
    importance = _importance(work, device=device) if _is_adaptive(subspace) else None
    return precompute(model, work["store"], subspace, importance=importance, **common)


def _is_adaptive(subspace: SubspaceConfig) -> bool:
    return subspace.rank_allocation == "adaptive"


def _importance(work: dict[str, Any], *, device: str) -> dict[str, float]:
    """The layers' importance, measured on the first samples of the data."""
    from osft.data.dataset_folder import load_split

    train = load_split(storage.fetch(work["data"]), "train")
    samples = [train[i] for i in range(min(SubspaceConfig(**work["subspace"]).calibration_samples, len(train)))]
    preflight = Preflight.from_dict(work["preflight"])
    return measure_importance(
        Path(work["model"]),
        samples,
        feeding=Feeding(
            max_tokens=max(2048, *(len(sample.input_ids) for sample in samples)),
            device=torch.device(device),
            batching=preflight.batching,
        ),
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        attention=preflight.attention,
        trust_remote_code=work["trust_remote_code"],
    )


def _compute_share(work: dict[str, Any]) -> dict[str, Any]:
    """The share of one of several processes, on a GPU of its own or with its part of the cores."""
    number, gpus = work["number"], torch.cuda.device_count()
    if not gpus and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // work["processes"]))
    share = split_share(
        Path(work["model"]),
        work["store"],
        SubspaceConfig(**work["subspace"]),
        number=number,
        processes=work["processes"],
        importance=work["importance"],
        device=f"cuda:{number % gpus}" if gpus else "cpu",
        trust_remote_code=work["trust_remote_code"],
    )
    plain = {name: weight.model_dump(mode="json", exclude_unset=True) for name, weight in share.weights.items()}
    return {"weights": plain, "computed": share.computed}


def _compute(work: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: the importance, a share, or where the factor set is and how many weights were split."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "importance_only" in work:
        return _importance(work, device=device)
    if "processes" in work:
        return _compute_share(work)
    factors = compute_factors_here(work, device=device)
    return {"path": str(factors.path), "computed": factors.computed}


if __name__ == "__main__":
    answer(_compute)
