"""What a user can cause is one line in our words; a bug keeps its traceback."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import typer
import yaml
from mlflow.exceptions import MlflowException, RestException
from safetensors import SafetensorError, safe_open

from osft.process.console import failures
from osft.process.errors import ExhaustedError, UnusableError, explained, note_in, noted, one_line
from osft.process.mlflow_errors import TrackingRefused
from osft.training.launch import TrainingFailed
from tests.test_cli import invoke
from tests.test_settings import REQUIRED


def raised(cause) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 (any)
        cause()
    return caught.value


def raises(error: BaseException):
    def cause() -> None:
        raise error

    return cause


def system(number: int, name: str | None = "/data/x") -> OSError:
    return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize(
    ("cause", "kind", "words"),
    [
        (raises(system(errno.EACCES)), UnusableError, "/data/x: permission denied. Give a place"),
        (raises(system(errno.EPERM)), UnusableError, "/data/x: the system does not permit it"),
        (raises(system(errno.EROFS)), UnusableError, "/data/x: the file system is read-only"),
        (raises(system(errno.EISDIR)), UnusableError, "/data/x: is a folder, where a file is needed"),
        (raises(system(errno.ENOTDIR)), UnusableError, "/data/x: a part of the path is a file"),
        (raises(system(errno.EEXIST)), UnusableError, "/data/x: is a file, where a folder is needed"),
        (raises(system(errno.ENAMETOOLONG)), UnusableError, "/data/x: the name is too long"),
        (raises(system(errno.ELOOP)), UnusableError, "/data/x: symbolic links lead in a circle"),
        (raises(system(errno.ENOTEMPTY)), UnusableError, "/data/x: Directory not empty. Give another path"),
        (raises(system(errno.ENOENT)), FileNotFoundError, "/data/x: does not exist"),
        (raises(system(errno.ENOSPC)), ExhaustedError, "/data/x: no space is left on the disk. Free some"),
        (raises(system(errno.EDQUOT)), ExhaustedError, "/data/x: the disk quota is used up"),
        (raises(system(errno.EIO)), ExhaustedError, "/data/x: the disk reports an input/output error"),
        (raises(system(errno.EMFILE)), ExhaustedError, "/data/x: too many files are open"),
        (raises(system(errno.ENOSPC, None)), ExhaustedError, "no space is left on the disk"),
        (raises(OSError(errno.ENOSPC, "no room in /scratch for s3://b")), ExhaustedError, "no room in /scratch for s3"),
        (raises(MemoryError()), ExhaustedError, "there is not enough memory"),
        (raises(system(errno.EHOSTUNREACH, None)), ConnectionError, "does not answer"),
        (raises(socket.gaierror(-2, "Name or service not known")), ConnectionError, "does not answer"),
        (raises(TimeoutError("timed out")), ConnectionError, "does not answer"),
        (raises(ConnectionRefusedError(111, "refused")), ConnectionError, "refused"),
        (lambda: Path("/dev/null/x").read_text(), UnusableError, "/dev/null/x: a part of the path is a file"),
        (lambda: Path("/").write_text(""), UnusableError, "/: is a folder, where a file is needed"),
        (lambda: Path("/proc/x").mkdir(), FileNotFoundError, "/proc/x: does not exist, or cannot be made there"),
        (lambda: Path("/tmp", "x" * 300).write_text(""), UnusableError, "the name is too long"),
        (lambda: Path("/dev/full").write_text("x" * 99999), ExhaustedError, "no space is left"),
        (lambda: json.loads("{"), UnusableError, "Expecting property name"),
        (lambda: yaml.safe_load("a: ["), UnusableError, "not a YAML file: while parsing"),
        (lambda: safe_open(__file__, "pt"), UnusableError, "a file of weights is damaged or cut off"),
        (raises(torch.OutOfMemoryError("CUDA out of memory. Tried")), ExhaustedError, "Lower max_tokens_per_gpu"),
        (raises(ModuleNotFoundError("x", name="kfp.dsl")), UnusableError, "pip install 'osft[pipelines]'"),
        (raises(ModuleNotFoundError("x", name="psycopg2")), UnusableError, "pip install 'psycopg2-binary'"),
        (raises(ModuleNotFoundError("x", name="MySQLdb")), UnusableError, "pip install 'mysqlclient'"),
        (raises(MlflowException("Invalid name", 1000)), UnusableError, "MLflow refuses: Invalid name"),
        (raises(MlflowException("database or disk is full")), ExhaustedError, "MLflow's database"),
        (raises(MlflowException("attempt to write a readonly database")), UnusableError, "cannot be written to"),
        (
            raises(RestException({"error_code": "PERMISSION_DENIED", "message": "no"})),
            TrackingRefused,
            "MLFLOW_TRACKING_PASSWORD",
        ),
        (
            raises(
                MlflowException("API request to http://h/api failed with exception: [Errno 111] Connection refused)")
            ),
            ConnectionError,
            "does not answer",
        ),
        (
            raises(RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "busy"})),
            ConnectionError,
            "fails: TEMPORARILY_UNAVAILABLE: busy. Try again",
        ),
    ],
)
def test_error_of_a_user_is_one_line_of_the_contract(cause, kind, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = explained(raised(cause))
    assert isinstance(told, kind)
    assert isinstance(told, ValueError | RuntimeError | FileNotFoundError | ConnectionError)
    assert words in one_line(told)
    assert "\n" not in one_line(told)


@pytest.mark.parametrize(
    "cause",
    [
        lambda: {}["a"],
        lambda: [].x,
        lambda: 1 / 0,
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: torch.zeros(2).reshape(3),
        raises(AssertionError("never")),
        raises(TypeError("f() takes 2 arguments")),
        raises(ModuleNotFoundError("x", name="osft.nothing")),
        raises(RuntimeError("of another package")),
        raises(StopIteration()),
    ],
)
def test_bug_is_none(cause):
    assert explained(raised(cause)) is None


def test_error_of_this_project_stays_as_it_is():
    from osft.data.files import data_files
    from osft.settings.training import TrainConfig

    for cause in (lambda: data_files("/nowhere"), lambda: TrainConfig.from_parameters({"num_epoch": 1})):
        error = raised(cause)
        assert explained(error) is error


def end(error: BaseException) -> tuple[int, type[BaseException] | None]:
    """Exit code and, of a bug, the type that a command ends with."""
    try:
        with failures(connection_lost=141):
            raise error
    except typer.Exit as ended:
        return ended.exit_code, None
    except Exception as bug:
        return -1, type(bug)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a\nb"), 2),
        (FileNotFoundError("gone"), 2),
        (system(errno.EACCES), 2),
        (system(errno.ENOSPC), 1),
        (ConnectionError("away"), 141),
        (TrainingFailed("long", 143), 143),
        (PermissionError("the server refuses"), 1),
        (MlflowException("no", 1000), 2),
        (typer.Exit(7), 7),
    ],
)
def test_exit_code_says_what_kind_of_error_it_is(error, code, capsys):
    assert end(error) == (code, None)
    assert len(capsys.readouterr().err.splitlines()) == (0 if isinstance(error, typer.Exit) else 1)


def test_bug_in_a_command_keeps_its_traceback():
    assert end(KeyError("x")) == (-1, KeyError)


def test_line_below_a_traceback_is_what_the_command_says_of_a_failed_training():
    import traceback

    with pytest.raises(OSError, match="No space") as full, noted():
        raise system(errno.ENOSPC)
    told = note_in("".join(traceback.format_exception(full.value)))
    assert (
        told
        == "/data/x: no space is left on the disk. Free some, or give a path on a larger one; the same call resumes"
    )
    failed = TrainingFailed("training failed\nTraceback …", 1, reason=f"rank 0: {told}")
    assert one_line(failed) == f"rank 0: {told}"
    assert "Traceback" in str(failed), "the library's contract"
    with pytest.raises(KeyError) as bug, noted():
        raise KeyError("x")
    assert note_in("".join(traceback.format_exception(bug.value))) == ""


@pytest.mark.parametrize(
    ("code", "last"),
    [
        ("raise ValueError('a' + chr(10) + 'b')", "error: a b"),
        ("open('/nowhere/x')", "error: /nowhere/x: does not exist, or cannot be made there. Correct the path"),
        ("{}['x']", "KeyError: 'x'"),
    ],
)
def test_step_ends_with_the_message_as_its_last_line(code, last):
    program = f"from osft.process.errors import tell_in_one_line; tell_in_one_line(); {code}"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == last
    assert ("Traceback" in ended.stderr) == last.startswith("KeyError")


def test_damaged_weights_are_safetensors_own_error():
    assert isinstance(raised(lambda: safe_open(__file__, "pt")), SafetensorError)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[1]"),
        ("config.json", b"\xff\x00"),
        ("tokenizer.json", b"{"),
        ("tokenizer_config.json", b'{"a": '),
        ("model.safetensors", b""),
        ("model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{"),
        ("model.safetensors", LFS_POINTER),
        ("model.safetensors.index.json", b"{"),
        ("chat_template.jinja", b"{% for %}"),
    ],
)
def test_damaged_file_of_a_model_is_named_by_the_command(tmp_path, model_folder, chats, name, content):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (model / name).write_bytes(content)
    given = REQUIRED | {"model_path": model, "data_path": chats, "ckpt_output_dir": tmp_path / "out"}
    code, _, printed = invoke("train", *[part for key, value in given.items() for part in ("--set", f"{key}={value}")])
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert name in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged or cut off"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "damaged or cut off"),
        (LFS_POINTER, "a pointer of Git LFS, not the file itself. Fetch it: git lfs pull"),
    ],
    ids=["empty", "cut", "pointer"],
)
def test_file_that_a_library_does_not_name_is_found_by_its_damage(tmp_path, content, words):
    (tmp_path / "whole.json").write_text("{}")
    file = tmp_path / "model-00002.safetensors"
    file.write_bytes(content)

    def read(folder: Path) -> None:
        safe_open(folder / "model-00002.safetensors", "pt")

    told = str(explained(raised(lambda: read(tmp_path))))
    assert told.startswith(f"{file}: ")
    assert words in told


def test_json_file_that_a_library_does_not_name_is_found_by_its_content(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "damaged.json").write_text('{"a": ')

    def read(folder: Path) -> None:
        json.loads((folder / "damaged.json").read_text())

    assert str(explained(raised(lambda: read(tmp_path)))).startswith(f"{tmp_path}/damaged.json: not a JSON file")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "/nowhere.yaml"],
        ["train", "/"],
        ["train", "/dev/null"],
        ["train", "--set", "model_path"],
        ["decompose", "/nowhere", "--store", "/dev/null/x", "--unfreeze-rank-ratio", "0.25"],
        ["evaluate", "/nowhere", "/nowhere", "/nowhere.jsonl"],
        ["evaluate", "a", "b", "c", "--gate", "/"],
        ["lineage", "m@champion"],
        ["lineage", "m@champion", "--storage-root", "/nowhere"],
        ["lineage", "m@champion", "--tracking-uri", "localhost:5000"],
        ["export", "/nowhere", "--format", "lora", "--output", "/dev/null/x"],
        ["submit", "/nowhere.yaml", "--dry-run"],
        ["submit", "--pipeline", "/", "--dry-run"],
        ["submit", "--set", "model_name=team/model", "--dry-run"],
        ["submit", "--set", "num_epochs=2.5", "--dry-run"],
        ["status", "--host", "http://127.0.0.1:1", "--token-file", "/nowhere"],
        ["status", "--host", "http://127.0.0.1:1", "--cookie-file", "/"],
        ["schedule", "create", "n", "--cron", "x", "--dry-run"],
    ],
    ids=" ".join,
)
def test_command_refuses_in_one_line(arguments, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, _, printed = invoke(*arguments)
    assert code == 2
    assert len(printed.splitlines()) == 1
    assert printed.startswith("error: ")
