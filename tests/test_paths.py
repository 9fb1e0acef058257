"""Paths are read as their users mean them, and those that cannot be written to are refused by name."""

import os
from pathlib import Path

import pytest

from osft.data.files import data_files
from osft.models import loading
from osft.orchestration import CompiledPipeline
from osft.settings.base import read_file
from osft.settings.training import TrainConfig
from osft.storage.paths import check_writable, expanded
from pipelines.run_local import local_arguments
from tests.conftest import arithmetic, write_jsonl
from tests.test_cli import invoke
from tests.test_settings import REQUIRED


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("~", "{home}"),
        ("~/", "{home}/"),
        ("~/a/b.jsonl", "{home}/a/b.jsonl"),
        ("~/data/*.jsonl", "{home}/data/*.jsonl"),
        ("~root/x", "/root/x"),
        ("a/~/b", "a/~/b"),
        ("./~x", "./~x"),
        ("s3://bucket/~/x", "s3://bucket/~/x"),
        ("org/model@v1", "org/model@v1"),
        ("example:web-text", "example:web-text"),
        ("price$", "price$"),
        ("data/a$1.jsonl", "data/a$1.jsonl"),
        ("", ""),
    ],
)
def test_home_folder_is_expanded_and_nothing_else(home, given, read):
    assert expanded(given) == read.format(home=home)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("~no-such-user/x", "knows no home folder of no-such-user. Give the whole path, or ./~no-such-user/x"),
        ("~backup~", "no home folder of backup~"),
        ("$HOME/x", r"\$HOME is not replaced by what it stands for"),
        ("${HOME}/x", r"\$\{HOME\} is not replaced"),
        ("$UNSET_VARIABLE/x", r"\$UNSET_VARIABLE is not replaced"),
        ("/data/$HOME/x", r"\$HOME is not replaced"),
        ("a\0b", "holds a NUL character"),
    ],
)
def test_path_that_is_no_path_is_refused(home, given, problem):
    with pytest.raises(ValueError, match=problem):
        expanded(given)


PATHS = ("_path", "_dir", "factors", "resume")
LOCATIONS = [name for name in TrainConfig.model_fields if name.endswith(PATHS)]


@pytest.mark.parametrize("name", LOCATIONS)
def test_home_folder_is_expanded_in_each_setting_that_is_a_path(home, name):
    config = TrainConfig(**REQUIRED | {name: "~/x"})
    assert getattr(config, name) == f"{home}/x"
    with pytest.raises(ValueError, match=f"^{name}: .*no-such-user"):
        TrainConfig(**REQUIRED | {name: "~no-such-user/x"})


def test_home_folder_is_expanded_wherever_else_a_path_is_taken(home, model_folder):
    (home / "model").symlink_to(model_folder)
    write_jsonl(home / "data.jsonl", arithmetic(3))
    (home / "c.yaml").write_text("num_epochs: 3\n")
    assert loading.model_folder("~/model").samefile(home / "model")
    assert [file.name for file in data_files("~/data.jsonl")] == ["data.jsonl"]
    assert [file.name for file in data_files("~/*.jsonl")] == ["data.jsonl"]
    assert read_file(Path("~/c.yaml"), "config") == {"num_epochs": 3}
    (home / "p.yaml").write_text(CompiledPipeline.read().text)
    assert CompiledPipeline.read("~/p.yaml").name == CompiledPipeline.read().name
    given = local_arguments("~/model", "~/data.jsonl", ['anchor_uris=["~/data.jsonl"]', "lm_eval_folder=~"], home)
    assert (given["base_model"], given["data_uri"]) == (f"{home}/model", f"{home}/data.jsonl")
    assert (given["anchor_uris"], given["lm_eval_folder"]) == ([f"{home}/data.jsonl"], str(home))
    code, _, errors = invoke("decompose", "~/model", "--store", "~/store", "--unfreeze-rank-ratio", "0.25")
    assert (code, errors) == (0, "") or "decompose" in errors
    assert (home / "store" / "sets").is_dir()
    code, _, errors = invoke("lineage", "m@champion", "--storage-root", "~/nothing")
    assert f"{home}/nothing holds no mlflow/mlflow.db" in errors
    code, _, errors = invoke("train", "~/c.yaml", "--set", "model_path=~/model")
    assert "required parameters are missing" in errors
    assert not Path("~").exists()


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("file", "a part of the path is a file"),
        ("file/below", "a part of the path is a file"),
        ("circle", "symbolic links lead in a circle"),
        ("circle/below", "symbolic links lead in a circle"),
        ("nowhere/below", "does not exist, or cannot be made there"),
        ("x" * 300, "the name is too long"),
        (f"a/{'x' * 300}/b", "the name is too long"),
        ("/dev/null", "a part of the path is a file"),
        ("/dev/null/x", "a part of the path is a file"),
    ],
)
def test_folder_that_cannot_be_is_refused_by_name_and_nothing_is_made(tmp_path, place, problem):
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"^ckpt_output_dir .*{problem}") as refused:
        check_writable("ckpt_output_dir", str(tmp_path / place))
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("place", ["new", "new/below/that", ".", "s3://bucket/run"])
def test_folder_that_can_be_is_not_made(tmp_path, place):
    check_writable("ckpt_output_dir", place if "://" in place else str(tmp_path / place))
    assert list(tmp_path.iterdir()) == []


def refused_to_nobody(location: str) -> str:
    """What `check_writable` says to a user who is not root, in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setuid(65534)
        try:
            check_writable("x", location)
        except ValueError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as told:
        return told.read()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become a user who may not write")
def test_folder_of_another_user_is_refused():
    assert "permission denied. Give a place that this user may use" in refused_to_nobody("/etc/new/below")
    assert "permission denied" in refused_to_nobody("/root/y/z")
    assert refused_to_nobody("/tmp/new") == ""


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["train", "dry run"])
def test_command_refuses_an_output_path_that_is_a_file(tmp_path, model_folder, chats, dry_run):
    (tmp_path / "out").write_text("mine")
    given = REQUIRED | {"model_path": model_folder, "data_path": chats, "ckpt_output_dir": tmp_path / "out"}
    settings = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    code, _, errors = invoke("train", *settings, *dry_run)
    assert code == 2
    assert errors.startswith(f"error: ckpt_output_dir {tmp_path}/out: {tmp_path}/out: a part of the path is a file")
    assert len(errors.splitlines()) == 1
    assert (tmp_path / "out").read_text() == "mine"
