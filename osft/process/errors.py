"""What a user can cause and cure, told in one line: the offender, the reason, the remedy.

Everything that goes wrong outside this project (the disk, a damaged file, a server) comes in the words of a library,
often without a name. `explained` says it in ours, as an exception of the contract of `osft()`:

    a path that cannot be used, a damaged file,       UnusableError, a ValueError (and an OSError): correct what
    a package or a server that is missing             was given
    a full disk, too little memory, an I/O error      ExhaustedError, a RuntimeError (and an OSError): the settings may
                                                      be right, and the same call resumes from the saved state
    a file that is not there                          FileNotFoundError
    another machine that does not answer              ConnectionError

What is none of these is a bug, and is shown with its traceback.
"""

import errno
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

_UNUSABLE = {
    errno.EACCES: "permission denied. Give a place that this user may use, or change its permissions",
    errno.EPERM: "the system does not permit it. Give another place",
    errno.EROFS: "the file system is read-only. Give another place, or mount it writable",
    errno.EISDIR: "is a folder, where a file is needed. Give the file",
    errno.ENOTDIR: "a part of the path is a file, where a folder is needed. Give another path, or remove that file",
    errno.EEXIST: "is a file, where a folder is needed. Give another path, or remove that file",
    errno.ENAMETOOLONG: "the name is too long for the file system. Give a shorter one",
    errno.ELOOP: "symbolic links lead in a circle. Give another path, or correct them",
    errno.EINVAL: "the file system does not take it. Give another path",
    errno.ENODEV: "is a device, where a file or folder is needed. Give another path",
    errno.ENXIO: "is a device or a socket, where a file or folder is needed. Give another path",
    errno.ESTALE: "the network file system has lost it. Mount it again",
    errno.EADDRINUSE: "the port is in use. Give another one, or end the program that has it",
    errno.ETXTBSY: "a running program uses it. Give another path",
}
_EXHAUSTED = {
    errno.ENOSPC: "no space is left on the disk. Free some, or give a path on a larger one; the same call resumes",
    errno.EDQUOT: "the disk quota is used up. Free some, or give a path elsewhere; the same call resumes",
    errno.EFBIG: "the file is larger than the file system or the limit (ulimit -f) takes. Raise it",
    errno.EIO: "the disk reports an input/output error. Check it",
    errno.EMFILE: "too many files are open. Raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine. Raise its limit",
    errno.ENOMEM: "there is not enough memory. Use a machine with more",
    errno.ENOLCK: "the file system has no locks. Mount it with them, or give a path elsewhere",
}
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN)
_PACKAGES = {
    "mlflow": "osft[mlflow]",
    "psutil": "osft[mlflow]",
    "kfp": "osft[pipelines]",
    "s3fs": "osft[s3]",
    "kubernetes": "osft[kubernetes]",
    "kubeflow": "osft[kubernetes]",
    "tenacity": "osft[kubernetes]",
    "matplotlib": "osft[report]",
    "lm_eval": "osft[eval]",
    "gguf": "osft[examples]",
    "accelerate": "osft[examples]",
    "tensorboard": "osft[tensorboard]",
    "liger_kernel": "osft[liger]",
    "wandb": "osft[wandb]",
    # What MLflow imports for an address of PostgreSQL, MySQL or SQL Server, and for artifacts in S3, Google's or Azure.
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "pymysql": "pymysql",
    "pyodbc": "pyodbc",
    "boto3": "boto3",
    "google": "google-cloud-storage",
    "azure": "azure-storage-blob",
}
"""Module -> the package that brings it, an extra of this one where there is one."""


_NOTE = "In short: "


class UnusableError(ValueError, OSError):
    """Something that was given cannot be used here: a setting that cannot work, as any other ValueError."""

    __str__ = Exception.__str__


class ExhaustedError(RuntimeError, OSError):
    """The machine has too little of something, or fails. Nothing is wrong with the settings."""

    __str__ = Exception.__str__


def explained(error: BaseException, *, path: str = "") -> Exception | None:
    """`error` in one line, as an exception of the contract above; None for a bug.

    What this project has raised itself comes back as it is. `path` is what to name where the error names no file.
    """
    if isinstance(error, UnusableError | ExhaustedError | ConnectionError):
        return error
    for explain in (_of_system, _of_library, _of_module):
        found = explain(error, path)
        if found is not None:
            return found
    if isinstance(error, ValueError) and _raised_in(error) not in ("torch", "numpy"):
        return error
    ours = {_raised_in(error), type(error).__module__.partition(".")[0]} & {"osft", "components", "pipelines"}
    return error if isinstance(error, RuntimeError) and ours else None


def one_line(error: BaseException) -> str:
    """The message without line breaks; that of a failed training in short, or with its traceback if it is a bug."""
    if isinstance(error, RuntimeError):
        return getattr(error, "reason", "") or str(error)
    return " ".join(str(error).split())


@contextmanager
def noted() -> Iterator[None]:
    """Write what the block raises in one line below its traceback, where it is no bug; `note_in` finds it."""
    try:
        yield
    except Exception as error:
        told = explained(error)
        if told is not None:
            error.add_note(_NOTE + one_line(told))
        raise


def note_in(traceback: str) -> str:
    """The line that `noted` wrote below a traceback; empty if there is none."""
    last = traceback.rstrip().rpartition("\n")[2]
    return last.removeprefix(_NOTE) if last.startswith(_NOTE) else ""


def _of_system(error: BaseException, path: str) -> Exception | None:
    """An error of the operating system."""
    if isinstance(error, MemoryError):
        return ExhaustedError("there is not enough memory. Use a machine with more")
    if not isinstance(error, OSError):
        return None
    if isinstance(error, TimeoutError | socket.gaierror) or error.errno in _UNREACHABLE:
        return ConnectionError(f"the network or the other machine does not answer ({one_line(error)})")
    if error.errno is None or isinstance(error, ValueError):  # a message of ours, or of a library's
        known = FileNotFoundError | PermissionError | ValueError
        return error if isinstance(error, known) else UnusableError(one_line(error))
    name = str(error.filename2 or error.filename or path)
    place = f"{name}: " if name else ""
    if error.errno in _EXHAUSTED:
        ours = error.filename is None and error.strerror != os.strerror(error.errno)
        return ExhaustedError(str(error.strerror) if ours else f"{place}{_EXHAUSTED[error.errno]}")
    if error.errno in _UNUSABLE:
        return UnusableError(f"{place}{_UNUSABLE[error.errno]}")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{place}does not exist, or cannot be made there. Correct the path")
    return UnusableError(f"{place}{error.strerror}. Give another path, or correct what is there")


def _of_library(error: BaseException, path: str) -> Exception | None:
    """An error of a library that reads files, talks to a server, or allocates."""
    place = f"{path or _file_of(error)}: ".removeprefix(": ")
    if "MlflowException" in [base.__name__ for base in type(error).__mro__]:
        from osft.process.mlflow_errors import explained_mlflow

        return explained_mlflow(error)  # type: ignore[arg-type]  # mlflow is not imported to ask
    if type(error).__name__ == "SafetensorError":
        if place and Path(place[:-2]).read_bytes()[:100].startswith(b"version https://git-lfs"):
            return UnusableError(f"{place}a pointer of Git LFS, not the file itself. Fetch it: git lfs pull")
        return UnusableError(f"{place}a file of weights is damaged or cut off ({one_line(error)}). Download it again")
    if type(error).__module__.partition(".")[0] == "yaml":
        return UnusableError(f"{place}not a YAML file: {one_line(error)}")
    if type(error).__name__ == "JSONDecodeError":
        return UnusableError(f"{place}not a JSON file, or a damaged one: {one_line(error)}. Write or download it again")
    if isinstance(error, UnicodeDecodeError):
        return UnusableError(f"{place}not a text in UTF-8: {one_line(error)}. Convert it, or give another file")
    if type(error).__module__.partition(".")[0] == "jinja2":
        line = getattr(error, "lineno", None)
        return UnusableError(
            f"the chat template cannot be used: {one_line(error)}{f' (line {line})' if line else ''}. Correct "
            "chat_template.jinja, or `chat_template` in tokenizer_config.json, in the model's folder"
        )
    if type(error).__name__ == "OutOfMemoryError":
        return ExhaustedError(
            f"the GPU has too little memory ({one_line(error).partition('. ')[0]}). Lower max_tokens_per_gpu, set "
            "gradient_checkpointing=True, or use more GPUs"
        )
    return None


def _file_of(error: BaseException) -> str:
    """The damaged file of an error that names none: one that the code which raised it had in hand, and that is damaged
    in that way; empty if there is none."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in list(frame.f_locals.values()):
            for file in _files(value):
                if _is_of(error, file):
                    return str(file)
    return ""


def _files(value: Any) -> list[Path]:
    """The file that a variable names, or those in the folder that it names."""
    if not isinstance(value, str | Path) or not 0 < len(str(value)) < 4096:
        return []
    try:
        path = Path(value)
        if path.is_dir():
            return sorted([*path.glob("*.json"), *path.glob("*.safetensors")])[:200]
        return [path] if path.is_file() else []
    except (OSError, ValueError):
        return []


def _is_of(error: BaseException, file: Path) -> bool:
    """Whether a file is the one that could not be read."""
    try:
        if type(error).__name__ == "SafetensorError":
            if file.suffix != ".safetensors":
                return False
            from safetensors import safe_open

            with safe_open(file, framework="pt"):
                return False
        if isinstance(error, UnicodeDecodeError):
            return file.read_bytes().startswith(error.object)
        return file.read_text(encoding="utf-8") == getattr(error, "doc", None)
    except Exception as wrong:
        return type(wrong) is type(error) and type(error).__name__ == "SafetensorError"


def _of_module(error: BaseException, path: str) -> Exception | None:
    """A package that is not installed."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    package = _PACKAGES.get((error.name or "").partition(".")[0])
    return UnusableError(f"{error.name} is not installed. Install it: pip install '{package}'") if package else None


def _raised_in(error: BaseException) -> str:
    """The package whose code raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] if frames else "osft"


def tell_in_one_line() -> None:
    """From here on, this process ends with one line for what `explained` knows, and a traceback for what is a bug."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        told = explained(error)
        if told is None:
            sys.__excepthook__(kind, error, trace)
        else:
            sys.stderr.write(f"error: {one_line(told)}\n")

    sys.excepthook = hook
