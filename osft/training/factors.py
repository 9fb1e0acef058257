"""The factor set that a run trains with: the one that is named, or the one that the store holds or gets.

python -m osft.training.factors WORK.json OUTCOME.json      computes it on a GPU (`osft.training.own_process`)
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from osft import storage
from osft.data.packing import Batching, Feeding
from osft.settings.subspace import SubspaceConfig
from osft.settings.training import TrainConfig
from osft.subspace.factor_set import FactorSet, load_factor_set
from osft.subspace.factor_store import precompute, precompute_by_inputs
from osft.subspace.rank_allocation import measure_importance
from osft.subspace.statistics_store import load_statistics
from osft.training.own_process import answer, in_own_process
from osft.training.prepare import data_folder
from osft.training.statistics import calibrated

if TYPE_CHECKING:
    from osft.data.dataset_folder import PreparedData


def factor_set(config: TrainConfig, model: Path, data: "PreparedData", batching: Batching) -> FactorSet:
    """The factor set that is named, or the one that the store holds or gets."""
    if named := _named_factor_set(config):
        return named
    return compute_factors(
        model,
        data.folder,
        factor_store(config),
        config.subspace,
        batching=batching,
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
    batching: Batching,
    trust_remote_code: bool = False,
) -> FactorSet:
    """Split what `store` does not hold yet.

    With adaptive ranks, the layers' importance is measured on `data` first. With protect="activations" their inputs
    are, on other text, unless the model carries its statistics (`osft.training.statistics`).

    With a GPU, that is done in a process of its own, which ends: a CUDA context would keep several 100 MB of the GPU
    from the training processes for as long as this one waits for them. Raises what the other process raised.
    """
    work = {
        "model": str(model),
        "data": str(data),
        "store": str(store),
        "subspace": subspace.to_dict(),
        "batching": batching.value,
        "trust_remote_code": trust_remote_code,
    }
    if not torch.cuda.is_available():
        return compute_factors_here(work, device="cpu")
    found = in_own_process("osft.training.factors", work)
    return replace(load_factor_set(found["path"]), computed=found["computed"])


def compute_factors_here(work: dict[str, Any], *, device: str) -> FactorSet:
    """`compute_factors` in this process."""
    model, subspace = Path(work["model"]), SubspaceConfig(**work["subspace"])
    common: dict[str, Any] = {"device": device, "trust_remote_code": work["trust_remote_code"]}
    if subspace.protect == "activations":
        batching = Batching(work["batching"])
        address = calibrated(model, work["store"], subspace, batching=batching, **common)
        file = address.removeprefix(f"{work['store']}/")
        return precompute_by_inputs(
            model, work["store"], subspace, load_statistics(address), statistics_file=file, **common
        )
    importance = None
    if subspace.rank_allocation == "adaptive":
        from osft.data.dataset_folder import load_split

        train = load_split(storage.fetch(work["data"]), "train")
        samples = [train[i] for i in range(min(subspace.calibration_samples, len(train)))]
        importance = measure_importance(
            model,
            samples,
            feeding=Feeding(
                max_tokens=max(2048, *(len(sample.input_ids) for sample in samples)),
                device=torch.device(device),
                batching=Batching(work["batching"]),
            ),
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            trust_remote_code=work["trust_remote_code"],
        )
    return precompute(model, work["store"], subspace, importance=importance, **common)


def _compute(work: dict[str, Any]) -> dict[str, Any]:
    """In the process of its own: where the factor set is, and how many weights had to be decomposed for it."""
    factors = compute_factors_here(work, device="cuda" if torch.cuda.is_available() else "cpu")
    return {"path": str(factors.path), "computed": factors.computed}


if __name__ == "__main__":
    answer(_compute)
