"""Whether a safetensors file is whole, from its header: what a download that went wrong leaves behind is named.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the header's length, the header, a JSON
object of each tensor's dtype, shape and place, and the tensors' bytes without gaps.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch

_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
_BITS |= {"F32": 32, "I32": 32, "U32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}
"""Of a number, by dtype; the rest has 8."""
_MAX_HEADER = 100_000_000
"""Bytes; the format's own bound."""


_PULL = "Run `git lfs pull` in its folder, or download it again"
_SAVE = "Load the model with transformers and save it with `save_pretrained`"
_REMEDIES = (_PULL, _SAVE)


class DamagedFileError(ValueError):
    """A file of weights is not whole: which, what it is, and what to do, in a line."""


def tensor_names(file: Path) -> list[str]:
    """The names of the tensors of a safetensors file whose header and length are right.

    Raises FileNotFoundError if it is missing and DamagedFileError for whatever else cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} is incomplete: {file.name} is missing. Download it again")
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if len(start) < 8 or _text(start):
            raise _damaged(file, _what_it_is(start + opened.read(200)))
        (length,) = struct.unpack("<Q", start)
        if length > _MAX_HEADER:
            raise _damaged(file, _what_it_is(start))
        if length > size - 8:
            raise _damaged(file, f"is cut within its header: it has {size:,} bytes")
        header = opened.read(length)
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        ends = {name: _end(name, described) for name, described in tensors.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise _damaged(file, f"has a header that cannot be read ({error})") from None
    if not ends:
        raise _damaged(file, "holds no tensor")
    whole = 8 + length + max(ends.values())
    if size != whole:
        state = "cut" if size < whole else "longer than it should be"
        raise _damaged(file, f"is {state}: it has {size:,} bytes of {whole:,}")
    if sum(end - tensors[name]["data_offsets"][0] for name, end in ends.items()) != max(ends.values()):
        raise _damaged(file, "has a header whose tensors overlap or leave gaps")
    return list(tensors)


def check_index(index: Path, weight_map: dict[str, str]) -> None:
    """Raise unless each file of an index is whole and has the tensors that the index says. As `tensor_names`."""
    for name in sorted(set(weight_map.values())):
        there = set(tensor_names(index.parent / name))
        missing = [tensor for tensor, file in weight_map.items() if file == name and tensor not in there]
        if missing:
            raise _damaged(index.parent / name, f"has no tensor {missing[0]}, which {index.name} says is in it")


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name. Raises DamagedFileError if the index is none."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("it names no file")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        start = index.read_bytes()[:200]
        what = _what_it_is(start) if _is_pointer(start) else f"is no index of weights ({error})"
        raise _damaged(index, what) from None
    return weight_map


def check_finite(name: str, tensor: torch.Tensor, folder: Path) -> None:
    """Raise DamagedFileError if a weight has a number that is not finite."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        count = int((~tensor.isfinite()).sum())
        raise DamagedFileError(
            f"{folder}: {name} has {count:,} of {tensor.numel():,} numbers that are not finite (NaN or infinite), so "
            "the model cannot compute anything. Download it again, or take a checkpoint from before they arose"
        )


def _end(name: str, described: dict[str, Any]) -> int:
    begin, end = described["data_offsets"]
    bits = _BITS.get(described["dtype"], 8) * math.prod(described["shape"])
    if begin < 0 or 8 * (end - begin) != bits:
        raise ValueError(f"{name} has {end - begin} bytes, not those of its shape and dtype")
    return int(end)


def _damaged(file: Path, what: str) -> DamagedFileError:
    return DamagedFileError(f"{file} {what}" + ("" if what.endswith(_REMEDIES) else ". Download it again"))


def _is_pointer(start: bytes) -> bool:
    return start.startswith(b"version https://git-lfs")


def _text(start: bytes) -> bool:
    """Whether eight bytes are text, where the length of a header has zeros."""
    return all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start)


def _what_it_is(start: bytes) -> str:
    if _is_pointer(start):
        return f"is a Git-LFS pointer, not the file itself. {_PULL}"
    if not start:
        return "is empty"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return f"is a pickle of PyTorch under another name, which is not read. {_SAVE}"
    if start.startswith(b"GGUF"):
        return f"is a GGUF file under another name, which is not read. {_SAVE}"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, such as a refused download leaves"
    if not start.strip(b"\x00"):
        return "begins with zeros, as a download that never finished"
    return f"is no safetensors file (it begins with {start[:16]!r})"
