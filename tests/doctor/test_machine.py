"""This machine, the storage folder, the model and the data, and the command's three forms of output."""

import importlib.metadata
import io
import json
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from osft.cli import app
from osft.doctor import doctor_command, machine, storage_folder
from osft.doctor.checks import CHECKS, examine
from osft.doctor.finding import Check, Finding
from osft.doctor.inputs import check_data, check_model
from osft.process import memory
from tests.conftest import write_jsonl
from tests.doctor.conftest import subject


def found(check: Any, parameters: dict[str, Any] | None = None) -> list[Finding]:
    return list(Check("machine", "it", check).findings(subject(parameters)))


def faults(check: Any, parameters: dict[str, Any] | None = None) -> list[Finding]:
    return [one for one in found(check, parameters) if one.level in ("warning", "error")]


def test_packages_of_this_environment_are_as_osft_needs_them():
    assert faults(machine.check_packages) == []


def test_package_of_another_release_is_named_with_what_is_needed(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "torch" else version(name))
    (one,) = faults(machine.check_packages)
    assert re.search(r"torch is 1\.0, and \S+ is needed", one.text)
    assert "pip install" in one.remedy


def test_gpu_that_torch_does_not_use_is_an_error(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    (one,) = found(machine.check_gpus)
    assert one.level == "error"
    assert "CUDA build of torch" in one.remedy


def test_little_memory_and_disk_are_told(monkeypatch):
    monkeypatch.setattr(machine, "memory_available", lambda: 2_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(10**9))
    ram, disk = faults(machine.check_memory)
    assert "2.0 GB" in ram.text
    assert "OSFT_SCRATCH" in disk.remedy


def test_memory_is_that_of_the_container_where_it_has_less(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "memory.max")
    assert memory.memory_available() == 2_000_000


def test_storage_folder_is_tried_and_left_as_it_was(tmp_path):
    told = found(storage_folder.check_storage_folder, {"storage_root": str(tmp_path)})
    assert {one.level for one in told} == {"ok"}
    assert len(told) == 4
    assert list(tmp_path.iterdir()) == []


def test_file_system_on_which_two_create_one_file_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_folder, "create_exclusively", lambda path, content: True)
    (one,) = faults(storage_folder.check_storage_folder, {"storage_root": str(tmp_path)})
    assert "8 of 8 creators" in one.text
    assert "NFS 4" in one.remedy


def test_storage_folder_that_is_a_file_is_an_error(tmp_path):
    file = tmp_path / "file"
    file.touch()
    (one,) = faults(storage_folder.check_storage_folder, {"storage_root": str(file)})
    assert one.level == "error"


def test_model_and_data_are_looked_at(model_folder, tmp_path, chats):
    (model,) = found(check_model, {"base_model": str(model_folder)})
    assert model.level == "ok"
    (data,) = found(check_data, {"data_uri": str(chats)})
    assert re.fullmatch(r"[\d,]+ records can be used", data.text)


def test_model_whose_patterns_name_nothing_is_an_error(model_folder):
    (one,) = faults(check_model, {"base_model": str(model_folder), "target_patterns": ["no_such_layer"]})
    assert "no_such_layer" in one.text


def test_record_that_cannot_be_used_is_told_by_file_and_line(tmp_path):
    file = write_jsonl(tmp_path / "chats.jsonl", [{"messages": []}])
    (one,) = faults(check_data, {"data_uri": str(file)})
    assert f"{file}" in f"{one.about} {one.text}"
    assert one.level == "error"


def test_what_lies_on_a_volume_that_is_not_mounted_is_not_checked():
    given = {"base_model": "/nonexistent/root/models/a", "data_uri": "/nonexistent/root/inbox/*.jsonl"}
    assert [one.level for one in found(check_model, given) + found(check_data, given)] == ["not checked"] * 2


def test_without_a_cluster_its_checks_are_not_checked_and_nothing_is_raised():
    told = list(examine(subject({"launcher": "pytorchjob"}), ["cluster", "pods"]))
    assert {one.level for one in told} == {"not checked"}
    assert all("KUBECONFIG" in one.text for one in told)


def test_every_check_asks_a_question():
    """What `--help` prints."""
    assert all((check.find.__doc__ or "").rstrip().endswith("?") for check in CHECKS)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    return [
        Finding(level="error", about="claim a", text="does not exist", remedy="Create it", area="pods"),
        Finding(level="not checked", about="nodes", text="no cluster", area="pods"),
        Finding(level="not checked", about="quotas", text="no cluster", area="pods"),
    ]


def shown(two: list[Finding], monkeypatch: pytest.MonkeyPatch, *, terminal: bool, as_json: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None, highlight=False)
    monkeypatch.setattr(doctor_command, "output", console)
    doctor_command.show(two, as_json=as_json)
    return console.file.getvalue()


def test_lines_where_there_is_no_terminal_and_a_table_where_there_is(two, monkeypatch):
    lines = shown(two, monkeypatch, terminal=False).splitlines()
    assert lines == [
        "error: pods: claim a: does not exist -> Create it",
        "not checked: pods: nodes, quotas: no cluster",
        "0 ok, 0 warning, 1 error, 2 not checked",
    ]
    table = shown(two, monkeypatch, terminal=True)
    assert "claim a" in table
    assert "Create it" in table


def test_json_has_each_finding_by_itself(two, monkeypatch):
    printed = json.loads(shown(two, monkeypatch, terminal=False, as_json=True))
    assert [one["about"] for one in printed["findings"]] == ["claim a", "nodes", "quotas"]


def test_area_that_is_none_is_refused():
    done = CliRunner().invoke(app, ["doctor", "--only", "podz"])
    assert done.exit_code == 2
    assert "Did you mean 'pods'?" in done.output
