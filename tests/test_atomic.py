"""Files and folders are complete or absent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from osft.atomic import atomic_path, write_json


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


def test_killed_writer_leaves_no_final_name(tmp_path):
    code = "import sys, time, pathlib; from osft.atomic import atomic_path\n"
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
