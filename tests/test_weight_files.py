"""A file of weights that is not whole is named, with what it is and what to do."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from osft.models.checkpoint import CheckpointReader
from osft.models.conversion import ModelWeights
from osft.models.loading import empty_model
from osft.models.weight_files import DamagedFileError, check_finite, tensor_names
from tests.conftest import tiny_llama


def header(tensors: object, data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)) -> dict:
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


DAMAGED = {
    "a Git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "empty": (b"", "is empty"),
    "a few bytes": (b"\x10\x00", "is no safetensors file"),
    "zeros": (bytes(4096), "holds no tensor|cannot be read|begins with zeros"),
    "a web page": (b"<!DOCTYPE html><html>401 Unauthorized</html>", "is a web page"),
    "a JSON error": (b'{"error": "Repository not found"}', "is no safetensors file"),
    "a pickle": (b"PK\x03\x04\x00\x00\x08\x08\x00\x00archive/data.pkl", "is a pickle of PyTorch"),
    "a GGUF file": (b"GGUF\x03\x00\x00\x00\x00\x00", "is a GGUF file"),
    "cut within its header": (header(one(), bytes(8))[:30], "is cut within its header"),
    "cut within its data": (header(one(), bytes(7)), "is cut: it has"),
    "cut after its header": (header(one()), "is cut: it has"),
    "two downloads in one": (header(one(), bytes(8)) * 2, "is longer than it should be"),
    "a header that is no JSON": (struct.pack("<Q", 9) + b"not json!" + bytes(8), "has a header that cannot be read"),
    "a header that is a list": (header([1, 2]), "has a header that cannot be read"),
    "a tensor without a place": (header({"w": {"dtype": "F32"}}), "has a header that cannot be read"),
    "a shape that is not its bytes": (header(one(shape=(3,)), bytes(8)), "w has 8 bytes, not those of its shape"),
    "no tensor": (header({"__metadata__": {"format": "pt"}}), "holds no tensor"),
    "overlapping tensors": (header(one() | {"v": one()["w"]}, bytes(8)), "overlap or leave gaps"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_file_is_named_with_what_it_is(what, tmp_path):
    content, message = DAMAGED[what]
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(DamagedFileError, match=message) as error:
        CheckpointReader(tmp_path)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_whole_file_is_read_whatever_its_dtype(dtype, tmp_path):
    tensors = {"a": torch.zeros(3, 5).to(dtype), "b": torch.zeros(()).to(dtype), "c": torch.zeros(0, 4).to(dtype)}
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    assert sorted(tensor_names(tmp_path / "w.safetensors")) == ["a", "b", "c"]


def sharded(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number, name in enumerate("ab"):
        save_file({name: torch.zeros(4)}, folder / f"model-0000{number + 1}-of-00002.safetensors")
    files = {name: f"model-0000{number + 1}-of-00002.safetensors" for number, name in enumerate("ab")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def test_each_shard_is_checked(tmp_path):
    folder = sharded(tmp_path / "m")
    assert CheckpointReader(folder).names() == ["a", "b"]
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(DamagedFileError, match=r"00002-of-00002.safetensors is cut"):
        CheckpointReader(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00002.safetensors is missing"):
        CheckpointReader(folder)
    shard.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(DamagedFileError, match="has no tensor b, which model.safetensors.index.json says"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b'{"weight_map": {"a": ', "is no index of weights"),
        (b'{"metadata": {}}', "is no index of weights"),
        (b'{"weight_map": {}}', "it names no file"),
        (b"[]", "is no index of weights"),
        (b"\xff\xfe\x00", "is no index of weights"),
    ],
)
def test_damaged_index_is_named(content, message, tmp_path):
    folder = sharded(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=message):
        CheckpointReader(folder)


@pytest.mark.parametrize("name", ["norm.weight", "embed_tokens.weight", "layers.1.mlp.up_proj.weight"])
def test_weight_that_is_not_finite_is_named_when_weights_are_hashed(name, tmp_path):
    name, model = f"model.{name}", tiny_llama()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = torch.nan
    model.save_pretrained(tmp_path)
    stored = ModelWeights(CheckpointReader(tmp_path), empty_model(tmp_path))
    with pytest.raises(DamagedFileError, match=f"{name} has 1 of"):
        stored.sha256(name)
    with pytest.raises(DamagedFileError, match=f"{name} has 1 of"):
        stored.check_finite(but_for=())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_number_that_is_not_finite_is_found_wherever_it_is(value, dtype, tmp_path):
    tensor = torch.zeros(7, 9, dtype=dtype)
    check_finite("w", tensor, tmp_path)
    tensor[6, 8] = value
    with pytest.raises(DamagedFileError, match="w has 1 of 63 numbers that are not finite"):
        check_finite("w", tensor, tmp_path)
