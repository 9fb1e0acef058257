"""Hugging Face model folders: read rows of a weight without loading the model, write one tensor at a time."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from osft.atomic import atomic_path

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class CheckpointReader:
    """The tensors of a model folder, by the names under which they are stored.

    Raises FileNotFoundError if the folder, a shard or safetensors weights are missing, ValueError if the weights are
    quantized.
    """

    def __init__(self, model_path: str | Path) -> None:
        self.folder = Path(model_path)
        if not (self.folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{model_path} is not a model folder: it has no config.json. Give a folder that "
                "`save_pretrained` or a download from the Hugging Face hub wrote"
            )
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "an unnamed method")
            raise ValueError(
                f"{model_path} holds weights quantized by {method}, which cannot be split or trained. Load the model "
                "with AutoModelForCausalLM and a quantization_config that dequantizes (for gpt-oss "
                "`Mxfp4Config(dequantize=True)`), save it with `save_pretrained`, and give that folder"
            )
        if (self.folder / _INDEX).is_file():
            weight_map = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = {name: self.folder / file for name, file in weight_map.items()}
        elif (self.folder / _SINGLE).is_file():
            with safe_open(self.folder / _SINGLE, framework="pt") as opened:
                files = dict.fromkeys(opened.keys(), self.folder / _SINGLE)
        else:
            raise FileNotFoundError(
                f"{model_path} has no safetensors weights ({_SINGLE} or {_INDEX}). Pickled weights are not read; "
                "load the model once and save it with `save_pretrained`"
            )
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise FileNotFoundError(f"{model_path} is incomplete: {file.name} is missing. Download it again")
        self._files = files
        self._opened: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """The names of all stored tensors."""
        return list(self._files)

    def _slice(self, name: str) -> Any:
        file = self._files[name]
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt").__enter__()
        return self._opened[file].get_slice(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, in the dtype in which it is stored."""
        return self._slice(name)[start:stop]

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, in the dtype in which it is stored."""
        return self._slice(name)[...]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored."""
        stored = self._slice(name)
        return (stored[0:0] if stored.get_shape() else stored[...]).dtype

    def empty(self, name: str) -> torch.Tensor:
        """A tensor's shape and dtype, on the meta device."""
        return torch.empty(self._slice(name).get_shape(), dtype=self.dtype(name), device="meta")


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Hash of a CPU tensor's dtype, shape and bytes, as hexadecimal digits."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checkpoint(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    source: Path,
    *,
    max_shard_bytes: int = 5 * 1000**3,
) -> None:
    """Write a model folder: `tensors` as safetensors shards, everything else copied from `source`.

    Holds one shard in memory. The folder appears under its name only when it is complete.
    """
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for file in source.iterdir():
            if file.is_file() and not _is_weights(file.name):
                shutil.copy2(file, temporary / file.name)
        shards: list[list[str]] = []
        shard: dict[str, torch.Tensor] = {}
        total = 0

        def flush() -> None:
            nonlocal shard
            save_file(shard, temporary / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
            shards.append(list(shard))
            shard = {}

        for name, tensor in tensors:
            if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > max_shard_bytes:
                flush()
            shard[name] = tensor.contiguous()
            total += tensor.nbytes
        flush()

        if len(shards) == 1:
            (temporary / "shard-0.safetensors").rename(temporary / _SINGLE)
            return
        weight_map = {}
        for number, names in enumerate(shards):
            final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            (temporary / f"shard-{number}.safetensors").rename(temporary / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (temporary / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json"))
