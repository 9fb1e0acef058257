"""Paths in place, and URIs of an object store through a local copy: what is transferred, complete, goes wrong."""

import errno
import os
import shutil
import sys
import urllib.request
from pathlib import Path

import pytest

from osft import TrainConfig, storage
from osft.data.files import data_files
from osft.data.records import read_records
from osft.storage import client
from osft.storage.client import StorageRefused


def write(folder: Path, **contents: str) -> Path:
    for name, text in contents.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def downloads(object_store, uri: str) -> list[str]:
    """The names of the files below a URI that were read since the last call."""
    base = f"/{uri.removeprefix('s3://')}/"
    read = [path.removeprefix(base) for method, path in object_store.requests if method == "GET" and base in path]
    object_store.requests.clear()
    return sorted(name for name in read if name)


def test_path_is_used_in_place(tmp_path):
    folder = write(tmp_path / "model", config="{}")
    assert storage.fetch(folder) == storage.local(str(folder)) == folder
    assert storage.find(folder, marker="config") == folder
    assert storage.find(folder, marker="nothing") is None
    storage.publish(folder)
    storage.remove(folder)
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "config"]
    assert storage.join(folder, "a", "b") == f"{folder}/a/b"


def test_round_trip_through_an_empty_scratch_folder(bucket, tmp_path):
    uri = f"{bucket}/models/tiny"
    write(storage.local(uri), config="{}", parts__one="1" * 100, parts__two="")
    storage.publish(uri, marker="config")
    shutil.rmtree(tmp_path / "scratch")
    fetched = storage.fetch(uri, marker="config")
    assert fetched == storage.local(uri)
    found = {file.relative_to(fetched).as_posix(): file.read_text() for file in fetched.rglob("*") if file.is_file()}
    assert found == {"config": "{}", "parts/one": "1" * 100, "parts/two": ""}


def test_only_what_is_missing_or_differs_is_fetched(bucket, object_store):
    uri = f"{bucket}/data"
    for name in ("a", "b", "c", "d"):
        object_store.files.pipe(f"{uri}/{name}", b"old")
    storage.fetch(uri)
    assert downloads(object_store, uri) == ["a", "b", "c", "d"]
    storage.fetch(uri)
    assert downloads(object_store, uri) == []
    object_store.files.pipe(f"{uri}/a", b"new")  # of the same size
    (storage.local(uri) / "b").unlink()
    (storage.local(uri) / "c").write_text("was changed here")
    folder = storage.fetch(uri)
    assert downloads(object_store, uri) == ["a", "b", "c"]
    assert [(folder / name).read_text() for name in "abcd"] == ["new", "old", "old", "old"]


def test_file_that_the_store_no_longer_has_is_not_read_from_the_local_copy(bucket, object_store):
    for name in ("one", "two"):
        object_store.files.pipe(f"{bucket}/data/{name}.jsonl", b"{}")
    object_store.files.pipe(f"{bucket}/data/README.md", b"{}")
    assert [file.name for file in data_files(f"{bucket}/data/*.jsonl")] == ["one.jsonl", "two.jsonl"]
    object_store.files.rm(f"{bucket}/data/two.jsonl")
    assert [file.name for file in data_files(f"{bucket}/data")] == ["one.jsonl"]
    object_store.files.rm(f"{bucket}/data/one.jsonl")
    with pytest.raises(FileNotFoundError, match=f"{bucket}/data/.*.jsonl does not exist"):
        data_files(f"{bucket}/data/*.jsonl")


def test_marker_is_uploaded_last(bucket, object_store):
    uri = f"{bucket}/state"
    write(storage.local(uri), a_marker="", b="", c="", z="")
    object_store.requests.clear()
    storage.publish(uri, marker="a_marker")
    puts = [path.rsplit("/", 1)[1] for method, path in object_store.requests if method == "PUT"]
    assert sorted(puts[:-1]) == ["b", "c", "z"]
    assert puts[-1] == "a_marker"


def test_interrupted_upload_is_not_read_and_can_be_completed(bucket, object_store):
    uri = f"{bucket}/data/abc"
    names = [f"part{i}" for i in range(12)]
    write(storage.local(uri), dataset="{}", **dict.fromkeys(names, "x"))
    with (
        object_store.failing(lambda method, path: 403 if method == "PUT" and path.endswith("part5") else None),
        pytest.raises(PermissionError, match=f"{uri}/part5: the object store.* refuses access"),
    ):
        storage.publish(uri, marker="dataset")
    assert object_store.names(uri), "some of it is there"
    assert "dataset" not in object_store.names(uri)
    assert storage.find(uri, marker="dataset") is None
    with pytest.raises(FileNotFoundError, match=r"is not complete there \(no dataset\)"):
        storage.fetch(uri, marker="dataset")
    storage.publish(uri, marker="dataset")
    assert object_store.names(uri) == {"dataset", *names}


def test_complete_folder_is_not_written_again(bucket, object_store):
    uri = f"{bucket}/model"
    write(storage.local(uri), config="first", weights="first")
    storage.publish(uri, marker="config")
    write(storage.local(uri), config="second", weights="second")
    storage.publish(uri, marker="config")
    assert object_store.files.cat(f"{uri}/weights") == b"first"
    assert (storage.fetch(uri) / "weights").read_text() == "first"


def test_marker_is_removed_before_the_rest(bucket, object_store):
    uri = f"{bucket}/run/state/step-4"
    write(storage.local(uri), shard="")
    (storage.local(uri) / "position.json").write_text("{}")
    storage.publish(uri, marker="position.json")
    deletes = 0

    def fails_the_second_time(method: str, path: str) -> int | None:
        nonlocal deletes
        deletes += method == "POST"
        return 403 if deletes > 1 else None

    with object_store.failing(fails_the_second_time), pytest.raises(PermissionError):
        storage.remove(uri)
    assert object_store.names(uri) == {"shard"}
    storage.remove(uri)
    assert object_store.names(uri) == set()
    storage.remove(uri)


def test_transient_errors_are_repeated(bucket, object_store):
    seen: dict[tuple[str, str], int] = {}

    def fails_once(method: str, path: str) -> int | None:
        seen[method, path] = seen.get((method, path), 0) + 1
        return 503 if seen[method, path] == 1 else None

    uri = f"{bucket}/folder"
    write(storage.local(uri), marker="m", part="p")
    with object_store.failing(fails_once):
        storage.publish(uri, marker="marker")
        shutil.rmtree(os.environ["OSFT_SCRATCH"])
        assert (storage.fetch(uri) / "part").read_text() == "p"
    assert all(count > 1 for count in seen.values())


def test_missing_bucket_is_named(bucket):
    for call in (storage.fetch, storage.files, storage.remove):
        with pytest.raises(FileNotFoundError, match=r"there is no bucket 'nowhere-at-all' at 127.0.0.1:\d+. Create it"):
            call("s3://nowhere-at-all/model")
    write(storage.local("s3://nowhere-at-all/model"), config="")
    with pytest.raises(FileNotFoundError, match="there is no bucket 'nowhere-at-all'"):
        storage.publish("s3://nowhere-at-all/model", marker="config")


def test_wrong_and_missing_credentials_are_refused_without_showing_them(bucket, object_store, monkeypatch):
    def check_from_the_first_request_on(count: bytes) -> None:
        address = f"{object_store.environment['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
        given = urllib.request.Request(address, data=count, headers={"Content-Type": "text/plain"})
        urllib.request.urlopen(given).read()

    check_from_the_first_request_on(b"0")
    try:
        with pytest.raises(StorageRefused, match="Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as found:
            storage.fetch(f"{bucket}/model")
    finally:
        check_from_the_first_request_on(b"inf")
    assert object_store.environment["AWS_SECRET_ACCESS_KEY"] not in str(found.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    with pytest.raises(StorageRefused, match="there are no credentials. Set AWS_ACCESS_KEY_ID"):
        storage.fetch(f"{bucket}/model")


def test_store_that_does_not_answer_is_named(bucket, monkeypatch):
    monkeypatch.setattr(client, "_ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="127.0.0.1:9 does not answer.*Check AWS_ENDPOINT_URL"):
        storage.fetch(f"{bucket}/model")


@pytest.mark.parametrize("name", ["model_path", "data_path", "ckpt_output_dir", "factors"])
def test_address_with_credentials_is_refused_and_not_repeated(name):
    sizes = {"effective_batch_size": 1, "max_tokens_per_gpu": 9, "max_seq_len": 9}
    settings = {"model_path": "model", "data_path": "data.jsonl", "ckpt_output_dir": "out"}
    settings |= {"unfreeze_rank_ratio": 0.5, "learning_rate": 1e-3} | sizes
    with pytest.raises(ValueError, match=f"{name}: a s3:// address must not hold credentials") as found:
        TrainConfig(**settings | {name: "s3://me:hunter2@bucket/prefix"})
    assert "hunter2" not in str(found.value)


def test_full_disk_is_named_before_anything_is_fetched(bucket, object_store, monkeypatch, tmp_path):
    object_store.files.pipe(f"{bucket}/model/weights", b"12345")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4))
    with pytest.raises(OSError, match="no space left in .*scratch for s3.*Set OSFT_SCRATCH") as found:
        storage.fetch(f"{bucket}/model")
    assert found.value.errno == errno.ENOSPC


def test_missing_extra_is_named(bucket, monkeypatch):
    monkeypatch.setattr(client, "_connected", client._connected.__wrapped__)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"pip install 'osft\[s3\]'"):
        storage.fetch(f"{bucket}/model")


def test_bad_record_is_named_by_its_uri(bucket, object_store):
    object_store.files.pipe(f"{bucket}/data/chats.jsonl", b'{"text": "a"}\nno JSON\n')
    with pytest.raises(ValueError, match=f"^{bucket}/data/chats.jsonl:2: not valid JSON"):
        list(read_records(f"{bucket}/data", allow_text=True))


def test_endpoints_do_not_share_a_local_copy(bucket, monkeypatch):
    here = storage.local(bucket)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://elsewhere:9000")
    assert storage.local(bucket) != here
    with pytest.raises(ValueError, match="names no place in an object store"):
        storage.local("s3://bucket/../other")
