"""Hugging Face model folders: read rows of a weight without loading the model, write one tensor at a time.

    config.json, tokenizer, …                    as they came from the base model
    README.md                                    the model card, written for this model
    model.safetensors, or shards and an index    the weights as they are served
    exact/                                       what the rounding of the served weights took (`osft.models.rounding`):
        residual-<n>.safetensors                   of each rounded tensor <name> and <name>.units
        manifest.json                              each <name>, its file, and the hash of the served tensor

A reader gives exact weights where there is an exact/, else the weights as they are stored. What looks for weights in a
model folder (transformers, vLLM, converters) does not look into subfolders, so to them the folder is a plain one.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from osft.models.origin import MODEL_CARD, ORIGIN
from osft.models.rounding import decode_residual
from osft.models.weight_files import check_index, read_index, tensor_names
from osft.storage.atomic import atomic_path

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
EXACT = "exact"
_MANIFEST = "manifest.json"
_UNITS = ".units"
FORMAT = 1
"""Of exact/manifest.json."""
MAX_SHARD_BYTES = 5 * 1000**3


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor to be written."""

    name: str
    """Under which it is stored."""
    served: torch.Tensor
    """On the CPU, in the dtype in which it is stored."""
    residual: tuple[torch.Tensor, torch.Tensor] | None = None
    """What `osft.models.rounding.encode_residual` gave, if it was rounded."""


class CheckpointReader:
    """The tensors of a model folder, by the names under which they are stored.

    `tensor`, `rows` and `dtype` are of the exact weights, `served` of what is in the model's own files; they differ
    where the folder keeps a residual.

    Raises FileNotFoundError if the folder, a shard or safetensors weights are missing, DamagedFileError if one of the
    files is not whole, ValueError if the weights are quantized or the residual is damaged.
    """

    def __init__(self, model_path: str | Path) -> None:
        self.folder = Path(model_path)
        if not (self.folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{model_path} is not a model folder: it has no config.json. Give a folder that "
                "`save_pretrained` or a download from the Hugging Face hub wrote"
            )
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{self.folder / 'config.json'} holds no settings, {{name: value}}. Download it again")
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "an unnamed method")
            raise ValueError(
                f"{model_path} holds weights quantized by {method}, which cannot be split or trained. Load the model "
                "with AutoModelForCausalLM and a quantization_config that dequantizes (for gpt-oss "
                "`Mxfp4Config(dequantize=True)`), save it with `save_pretrained`, and give that folder"
            )
        if (self.folder / _INDEX).is_file():
            weight_map = read_index(self.folder / _INDEX)
            check_index(self.folder / _INDEX, weight_map)
            files = {name: self.folder / file for name, file in weight_map.items()}
        elif (self.folder / _SINGLE).is_file():
            files = dict.fromkeys(tensor_names(self.folder / _SINGLE), self.folder / _SINGLE)
        else:
            raise FileNotFoundError(
                f"{model_path} has no safetensors weights ({_SINGLE} or {_INDEX}). Pickled weights are not read; "
                "load the model once and save it with `save_pretrained`"
            )
        self._files = files
        self._residuals = self._read_manifest()
        self._opened: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """The names of all stored tensors."""
        return list(self._files)

    def has_residual(self, name: str) -> bool:
        """Whether the exact tensor is another one than the served."""
        return name in self._residuals

    @property
    def is_exact(self) -> bool:
        """Whether the folder keeps the residual of any weight."""
        return bool(self._residuals)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the exact tensor: float32 where there is a residual, else as it is stored."""
        served = self._slice(self._files[name], name)[start:stop]
        if name not in self._residuals:
            return served
        q, units = self._residual(name)
        return decode_residual(served, q[start:stop], units[start:stop] if served.ndim > 1 else units[...])

    def tensor(self, name: str) -> torch.Tensor:
        """The whole exact tensor: float32 where there is a residual, else as it is stored.

        Raises ValueError if the residual belongs to another tensor than the one that is served.
        """
        served = self.served(name)
        if name not in self._residuals:
            return served
        if tensor_sha256(served) != self._residuals[name]["served_sha256"]:
            raise ValueError(
                f"{self.folder / EXACT} does not belong to the weights beside it: {name} was changed since. Remove "
                "the folder to start from the weights as they are stored, or copy the model again"
            )
        q, units = self._residual(name)
        return decode_residual(served, q[...], units[...])

    def served(self, name: str) -> torch.Tensor:
        """A whole tensor as the model's own files have it."""
        return self._slice(self._files[name], name)[...]

    def saved(self, name: str) -> SavedTensor:
        """A tensor as it is, with its residual, to be written to another folder."""
        if name not in self._residuals:
            return SavedTensor(name, self.served(name))
        q, units = self._residual(name)
        return SavedTensor(name, self.served(name), (q[...], units[...]))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the exact tensor."""
        return torch.float32 if name in self._residuals else self.served_dtype(name)

    def served_dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored."""
        stored = self._slice(self._files[name], name)
        return (stored[0:0] if stored.get_shape() else stored[...]).dtype

    def empty(self, name: str) -> torch.Tensor:
        """A tensor's shape and dtype, on the meta device."""
        shape = self._slice(self._files[name], name).get_shape()
        return torch.empty(shape, dtype=self.dtype(name), device="meta")

    def _residual(self, name: str) -> tuple[Any, Any]:
        """What `encode_residual` gave, as slices of the file."""
        file = self.folder / EXACT / self._residuals[name]["file"]
        return self._slice(file, name), self._slice(file, name + _UNITS)

    def _slice(self, file: Path, name: str) -> Any:
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt").__enter__()
        return self._opened[file].get_slice(name)

    def _read_manifest(self) -> dict[str, dict[str, str]]:
        """Name -> `file` and `served_sha256` of each tensor with a residual."""
        folder = self.folder / EXACT
        if not (folder / _MANIFEST).is_file():
            return {}
        try:
            manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            version, tensors = manifest["format"], manifest["tensors"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{folder / _MANIFEST} is damaged. Copy the model again, or remove {folder} to start from the weights "
                "as they are stored"
            ) from None
        if version != FORMAT:
            raise ValueError(f"{folder} has format {version}, this release reads {FORMAT}. Use a newer release")
        for name, described in tensors.items():
            if name not in self._files or not (folder / described["file"]).is_file():
                missing = name if name not in self._files else folder / described["file"]
                raise ValueError(
                    f"{folder} is incomplete or of another model: {missing} is missing. Copy the model again, or "
                    f"remove {folder} to start from the weights as they are stored"
                )
        return dict(tensors)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Hash of a CPU tensor's dtype, shape and bytes, as hexadecimal digits."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    # Flat: a dimension of size 1 may have any stride in a tensor that counts as contiguous.
    digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checkpoint(
    folder: Path,
    tensors: Iterable[SavedTensor],
    source: Path,
    *,
    dtype: torch.dtype | None = None,
    files: Callable[[], Mapping[str, str]] = dict,
) -> None:
    """Write a model folder: `tensors` as safetensors shards, and of `source` all that is true of the new model, too.

    `dtype` is what config.json is to say of the weights, None: as it came. `files` gives the texts of more files by
    their names, and is called when the weights are written. Holds two shards in memory. The folder appears under its
    name only when it is complete.
    """
    with atomic_path(folder) as temporary:
        copy_model_files(source, temporary)
        served = _Shards(temporary, "model")
        exact = _Shards(temporary / EXACT, "residual")
        digests: dict[str, str] = {}
        for tensor in tensors:
            served.add({tensor.name: tensor.served})
            if tensor.residual is not None:
                q, units = tensor.residual
                exact.add({tensor.name: q, tensor.name + _UNITS: units})
                digests[tensor.name] = tensor_sha256(tensor.served)
        served.flush()
        exact.flush()
        _name_shards(served, temporary)
        if digests:
            file_of = {name: file for file, names in exact.files.items() for name in names}
            described = {name: {"file": file_of[name], "served_sha256": digest} for name, digest in digests.items()}
            manifest = {"format": FORMAT, "tensors": described}
            (temporary / EXACT / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for name, text in files().items():
            (temporary / name).write_text(text, encoding="utf-8")
        if dtype is not None:
            _set_dtype(temporary / "config.json", str(dtype).removeprefix("torch."))


class _Shards:
    """Writes tensors to files `<stem>-<n>.safetensors` of at most MAX_SHARD_BYTES, unless one tensor is larger."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.files: dict[str, list[str]] = {}
        """The name of each file and of the tensors in it."""
        self.total_bytes = 0
        self._folder, self._stem = folder, stem
        self._pending: dict[str, torch.Tensor] = {}

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors to one file."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and sum(tensor.nbytes for tensor in self._pending.values()) + size > MAX_SHARD_BYTES:
            self.flush()
        self._pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self.total_bytes += size

    def flush(self) -> None:
        """Write what is pending."""
        if self._pending:
            self._folder.mkdir(exist_ok=True)
            file = f"{self._stem}-{len(self.files) + 1:05d}.safetensors"
            save_file(self._pending, self._folder / file, metadata={"format": "pt"})
            self.files[file] = list(self._pending)
            self._pending = {}


def _name_shards(shards: _Shards, folder: Path) -> None:
    """Give the files of a model the names that transformers looks for."""
    if len(shards.files) == 1:
        (folder / next(iter(shards.files))).rename(folder / _SINGLE)
        return
    weight_map = {}
    for number, (file, names) in enumerate(shards.files.items(), start=1):
        final = f"model-{number:05d}-of-{len(shards.files):05d}.safetensors"
        (folder / file).rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": shards.total_bytes}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite"),
    *(".index.json", ".npz", ".pkl", ".ot"),
)
"""Ends of the names of files that hold the base model's weights, or say where they are."""
_OF_THE_BASE = frozenset(
    {
        *(MODEL_CARD, "trainer_state.json", "trainer_log.jsonl", "all_results.json", "train_results.json"),
        *("eval_results.json", "training_args.json", "adapter_config.json", ORIGIN),
    }
)
"""Files that tell how the base model was made or how it scored."""


def copy_model_files(source: Path, folder: Path) -> None:
    """Copy what belongs to a model but its weights: config, tokenizer, templates, code, licence, subfolders too.

    Left behind is what would be false of another model: weights in any format, the model card, logs of its training.
    So are hidden files.
    """
    folder.mkdir()
    for entry in sorted(source.iterdir()):
        if entry.name.startswith(".") or (entry.is_dir() and entry.name == EXACT):
            continue
        if entry.is_dir():
            copy_model_files(entry, folder / entry.name)
            if not any((folder / entry.name).iterdir()):
                (folder / entry.name).rmdir()
        elif not entry.name.endswith(_WEIGHTS) and entry.name not in _OF_THE_BASE:
            shutil.copy2(entry, folder / entry.name)


def _set_dtype(config_file: Path, dtype: str) -> None:
    """Have a config.json, and the parts of a composite one, say in which dtype the weights are stored."""
    config = json.loads(config_file.read_text(encoding="utf-8"))

    def change(part: dict[str, Any]) -> None:
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
        for value in part.values():
            if isinstance(value, dict):
                change(value)

    change(config)
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
