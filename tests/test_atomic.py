"""Files and folders are complete or absent."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from osft.storage import atomic
from osft.storage.atomic import atomic_path, create_exclusively, write_json


def test_failed_writer_leaves_nothing(tmp_path):
    for make in (lambda path: path.write_text("half"), lambda path: path.mkdir()):
        with pytest.raises(RuntimeError), atomic_path(tmp_path / "x") as temporary:
            make(temporary)
            raise RuntimeError
        assert list(tmp_path.iterdir()) == []


def test_file_is_replaced_and_folder_of_another_writer_is_kept(tmp_path):
    write_json(tmp_path / "a.json", [1])
    write_json(tmp_path / "a.json", [2])
    assert (tmp_path / "a.json").read_text() == "[\n  2\n]\n"
    for content in ("first", "second"):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / "file").write_text(content)
    assert (tmp_path / "folder" / "file").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "folder"}


def test_folder_that_another_writer_makes_during_the_flush_is_kept(tmp_path, monkeypatch):
    """Of the three nodes of a run that prepare the same data at the same time, none fails."""
    flush = atomic.flush

    def flush_beside_another(path):
        flush(path)
        if path.name.startswith("folder.incomplete-"):
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "file").write_text("first")

    monkeypatch.setattr(atomic, "flush", flush_beside_another)
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("second")
    assert (tmp_path / "folder" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_killed_writer_leaves_no_final_name(tmp_path):
    code = "import sys, time, pathlib; from osft.storage.atomic import atomic_path\n"
    code += "with atomic_path(pathlib.Path(sys.argv[1])) as t:\n t.write_text('half'); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x")])
    while not list(tmp_path.iterdir()):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "x").exists()
    (left,) = tmp_path.iterdir()
    assert ".incomplete-" in left.name


@pytest.fixture
def log(monkeypatch) -> list[tuple[str, str]]:
    """What was flushed and renamed, in order, by name."""
    done = []
    fsync, replace = os.fsync, os.replace

    def flushes(descriptor):
        done.append(("flush", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def renames(source, target):
        done.append(("rename", target.name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushes)
    monkeypatch.setattr(os, "replace", renames)
    return done


def test_bytes_are_on_disk_before_the_name_and_the_name_before_the_return(tmp_path, log):
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert log == [("flush", temporary.name), ("rename", "file"), ("flush", tmp_path.name)]


def test_all_files_of_a_folder_are_on_disk_before_its_name(tmp_path, log):
    with atomic_path(tmp_path / "folder") as temporary:
        (temporary / "a" / "b").mkdir(parents=True)
        (temporary / "a" / "b" / "deep").write_text("x")
        (temporary / "top").write_text("x")
    names = [("flush", name) for name in ("deep", "b", "a", "top", temporary.name)]
    assert log == [*names, ("rename", "folder"), ("flush", tmp_path.name)]


def test_folder_that_cannot_be_flushed_is_no_error_but_a_broken_disk_is(tmp_path, monkeypatch):
    def fails(error):
        def fsync(descriptor):
            if os.path.isdir(f"/proc/self/fd/{descriptor}") or error == errno.EIO:
                raise OSError(error, os.strerror(error))

        monkeypatch.setattr(os, "fsync", fsync)

    fails(errno.EINVAL)
    write_json(tmp_path / "a.json", [1])
    fails(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        write_json(tmp_path / "a.json", [2])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["[\n  1\n]\n"], "the old one, and nothing else"


@pytest.mark.parametrize("error", [0, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_file_is_created_by_one_of_several(tmp_path, monkeypatch, error):
    def refuses(*arguments):
        raise OSError(error, os.strerror(error))

    if error:
        monkeypatch.setattr(os, "link", refuses)
    assert create_exclusively(tmp_path / "claim", b"first")
    assert not create_exclusively(tmp_path / "claim", b"second")
    assert create_exclusively(tmp_path / "claim", b"first"), "the answer to the first request was lost"
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]
