"""Text that the model to train writes itself, which training is held to (distill_weight) and measured on (fit_step).

    <store>/texts/<key>.jsonl   a text a line, {"text": …, "input_ids": […]}; the key is the hash of what determines it

It is written once for a model and the settings calibration_tokens, calibration_temperature and calibration_seed, on a
GPU in a process of its own, which gives the GPU back.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from osft import storage
from osft.atomic import atomic_path
from osft.config import SubspaceConfig, TrainConfig
from osft.data.samples import SampleList
from osft.data.self_written import as_samples, default_num_tokens, write_text
from osft.models import empty_model, load_model
from osft.subspace.targets import select_targets
from osft.training.identity import model_contents
from osft.training.own_process import answer, in_own_process

FORMAT = 1
"""Part of every key: raise it when the text is written differently."""


def needs_own_text(config: TrainConfig) -> bool:
    """Whether a run needs text that the model wrote."""
    return bool(config.distill_weight or config.fit_step)


def own_text(config: TrainConfig, model: Path, store: str | Path) -> Path:
    """The file with the text of the model in a folder; it is written if the store, a path or URI, does not have it.

    Raises ValueError for a model that writes none (`write_text`), and for a text that no micro-batch can hold.
    """
    work = {
        "model": str(model),
        "store": str(store),
        "subspace": asdict(config.subspace),
        "trust_remote_code": config.trust_remote_code,
    }
    address = _address(work)
    if storage.find(address) is None:
        if torch.cuda.is_available():
            in_own_process("osft.training.own_text", work)
        else:
            write(work)
    file = storage.fetch(address)
    longest = max(read_own_text(file).lengths)
    if longest > config.max_tokens_per_gpu:
        raise ValueError(
            f"the model's own text has sequences of {longest} tokens, more than "
            f"max_tokens_per_gpu={config.max_tokens_per_gpu}. Raise that, or give distill_weight=0 and fit_step=False"
        )
    return file


def read_own_text(file: Path) -> SampleList:
    """The samples of such a file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return SampleList(as_samples(json.loads(line)["input_ids"] for line in lines))


def write(work: dict[str, Any]) -> dict[str, Any]:
    """Let the model write, in this process."""
    folder, subspace, address = Path(work["model"]), SubspaceConfig(**work["subspace"]), _address(work)
    device, trust = "cuda" if torch.cuda.is_available() else "cpu", work["trust_remote_code"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = load_model(folder, dtype=dtype, trust_remote_code=trust)
    model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    texts = write_text(
        model,
        tokenizer,
        num_tokens=_num_tokens(work),
        seed=subspace.calibration_seed,
        temperature=subspace.calibration_temperature,
    )
    lines = ({"text": tokenizer.decode(text, skip_special_tokens=True), "input_ids": text} for text in texts)
    with atomic_path(storage.local(address)) as temporary:
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    storage.publish(address)
    return {}


def _num_tokens(work: dict[str, Any]) -> int:
    """As many as are asked for, or as the widest of the layers needs."""
    subspace = SubspaceConfig(**work["subspace"])
    if subspace.calibration_tokens:
        return subspace.calibration_tokens
    targets = select_targets(
        empty_model(work["model"], trust_remote_code=work["trust_remote_code"]), subspace.target_patterns
    )
    return default_num_tokens(max(max(target.shape[-2:]) for target in targets))


def _address(work: dict[str, Any]) -> str:
    subspace = SubspaceConfig(**work["subspace"])
    determined_by = {
        "format": FORMAT,
        "model": model_contents(Path(work["model"])),
        "tokens": _num_tokens(work),
        "temperature": subspace.calibration_temperature,
        "seed": subspace.calibration_seed,
    }
    key = hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()[:32]
    return storage.join(work["store"], "texts", f"{key}.jsonl")


if __name__ == "__main__":
    answer(write)
