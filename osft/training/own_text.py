"""Text that the model to train writes itself, to be measured on, held to (distill_weight) and fitted by (fit_step).

    <store>/texts/<key>.json   `input_ids`: the tokens of each text; the key is the hash of what determines them

It is written once for a model and the settings calibration_tokens, calibration_temperature and calibration_seed, on a
GPU in a process of its own, which gives the GPU back.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from osft import storage
from osft.data.samples import SampleList
from osft.data.self_written import FORMAT, as_samples, default_num_tokens, write_text
from osft.models.cpu_linear import fast_linear_layers
from osft.models.loading import empty_model, load_model
from osft.settings.subspace import SubspaceConfig
from osft.settings.training import TrainConfig
from osft.storage.sealed import read_sealed, write_sealed
from osft.subspace.targets import Target, select_targets
from osft.training.identity import model_contents
from osft.training.own_process import answer, in_own_process

_REMEDY = "Remove it: the model writes the text again"


def default_text_tokens(targets: Sequence[Target]) -> int:
    """Tokens that a model with these targets writes where calibration_tokens does not say."""
    # The widest input of a layer is the output of another, or as wide.
    return default_num_tokens(max(max(target.shape[-2:]) for target in targets))


def written_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    store: str | Path,
    subspace: SubspaceConfig,
    *,
    num_tokens: int,
) -> list[list[int]]:
    """The texts of the model of a folder, read from the store, a path or URI, or written now and kept there.

    Raises ValueError for a model that writes none (`write_text`), DamagedFile if the file is not what was written.
    """
    address = _address(folder, store, subspace, num_tokens)
    if found := storage.find(address):
        return _read(found)
    with fast_linear_layers(model):
        texts = write_text(
            model,
            tokenizer,
            num_tokens=num_tokens,
            seed=subspace.calibration_seed,
            temperature=subspace.calibration_temperature,
        )
    write_sealed(storage.local(address), {"input_ids": texts})
    storage.publish(address)
    return texts


def needs_own_text(config: TrainConfig) -> bool:
    """Whether what is trained depends on it."""
    return bool(config.distill_weight or config.fit_step)


def own_text(config: TrainConfig, model: Path, store: str | Path) -> Path | None:
    """The file with the text of the model in a folder; None if the run has no use for it.

    It is written if it is not in the store and the run needs it. A run with protect="activations" that does not samples
    its drift on it, if it is there. Raises as `written_text`, and ValueError for a text that is needed and that no
    micro-batch can hold.
    """
    if not (needs_own_text(config) or config.protect == "activations"):
        return None
    trust = config.trust_remote_code
    targets = select_targets(empty_model(model, trust_remote_code=trust), config.target_patterns)
    num_tokens = config.calibration_tokens or default_text_tokens(targets)
    address = _address(model, store, config.subspace, num_tokens)
    if storage.find(address) is None:
        if not needs_own_text(config):
            return None
        work = {"model": str(model), "store": str(store), "num_tokens": num_tokens, "trust_remote_code": trust}
        work |= {"subspace": config.subspace.to_dict()}
        if torch.cuda.is_available():
            in_own_process("osft.training.own_text", work)
        else:
            _write(work)
    file = storage.fetch(address)
    longest = max(read_own_text(file).lengths)
    if longest > config.max_tokens_per_gpu:
        if not needs_own_text(config):
            return None
        raise ValueError(
            f"the model's own text has sequences of {longest} tokens, more than "
            f"max_tokens_per_gpu={config.max_tokens_per_gpu}. Raise that, or give distill_weight=0 and fit_step=False"
        )
    return file


def read_own_text(file: Path) -> SampleList:
    """The samples of such a file, with a loss on every token. Raises DamagedFile if it is not what was written."""
    return SampleList(as_samples(_read(file)))


def _write(work: dict[str, Any]) -> dict[str, Any]:
    """Let the model write, in this process."""
    folder, trust = Path(work["model"]), work["trust_remote_code"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = load_model(folder, dtype=dtype, device=device, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    subspace = SubspaceConfig(**work["subspace"])
    written_text(model, tokenizer, folder, work["store"], subspace, num_tokens=work["num_tokens"])
    return {}


def _read(file: Path) -> list[list[int]]:
    texts: list[list[int]] = read_sealed(file, _REMEDY)["input_ids"]
    return texts


def _address(folder: Path, store: str | Path, subspace: SubspaceConfig, num_tokens: int) -> str:
    determined_by = {
        "format": FORMAT,
        "model": model_contents(folder),
        "tokens": num_tokens,
        "temperature": subspace.calibration_temperature,
        "seed": subspace.calibration_seed,
    }
    key = hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()[:32]
    return storage.join(store, "texts", f"{key}.json")


if __name__ == "__main__":
    answer(_write)
