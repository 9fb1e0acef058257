"""Addresses and names that MLflow would meet late, or take for something else, are refused at once and in one line."""

import http.server
import itertools
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from osft.tracking import runs
from osft.tracking.addresses import bounded_requests, check_model_name, checked_address


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("localhost:5000", "has no scheme. Give http://localhost:5000"),
        ("mlflow.example.org:443/path", "has no scheme. Give http://mlflow.example.org:443/path"),
        ("127.0.0.1:5000", "has no scheme"),
        ("[::1]:5000", "has no scheme"),
        ("localhost", "has no scheme. Give http://localhost,"),
        ("./mlruns", "is a folder, in which MLflow no longer keeps runs. Give sqlite:////"),
        ("/data/mlruns", "Give sqlite:////data/mlruns/mlflow.db"),
        ("file:///data/mlruns", "Give sqlite:////data/mlruns/mlflow.db"),
        ("http://", "names no host"),
        ("http:/localhost:5000", "names no host"),
        ("http://host:port", "cannot be read"),
        ("http://host:99999", "cannot be read"),
        (" http://host", "holds a blank"),
        ("http://my host", "holds a blank"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:/tmp/x.db", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///~no-such-user/x.db", "knows no home folder of no-such-user"),
        ("sqlite:////proc/version", "the file system does not take it|permission"),
        (f"sqlite:///{__file__}", "is a file, but no SQLite database"),
        ("sqlite:////dev/null/x.db", "a part of the path is a file|is a file, where a folder"),
        (f"sqlite:////tmp/{'x' * 300}.db", "too long"),
        ("https://me:hidden@host", "must not hold a password"),
        ("postgresql://me:hidden@host/mlflow", "must not hold a password"),
    ],
)
def test_address_is_refused_at_once_with_what_to_give(address, problem, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    started = time.monotonic()
    with pytest.raises(ValueError, match=problem) as refused:
        runs.client(address, "")
    assert time.monotonic() - started < 2
    assert "\n" not in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_database_that_is_a_folder_is_refused_with_the_file_to_give(tmp_path):
    with pytest.raises(ValueError, match=f"is a folder. Give a file in it: sqlite:///{tmp_path}/mlflow.db"):
        checked_address(f"sqlite:///{tmp_path}")


@pytest.mark.parametrize(
    "address",
    ["http://localhost:5000", "https://u@host/mlflow/", "postgresql+psycopg2://u@/db?host=/run", "databricks"],
)
def test_address_that_mlflow_understands_stays_as_it_is(address):
    assert checked_address(address) == address


def test_home_folder_in_the_path_of_a_database_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checked_address("sqlite:///~/a/mlflow.db", make=False) == f"sqlite:///{tmp_path}/a/mlflow.db"
    assert list(tmp_path.iterdir()) == [], "not asked to"
    assert checked_address("sqlite:///~/a/mlflow.db?timeout=9") == f"sqlite:///{tmp_path}/a/mlflow.db?timeout=9"
    assert (tmp_path / "a" / "mlflow.db").read_bytes() == b""


def test_folder_is_taken_where_mlflow_was_told_to(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert checked_address("./mlruns") == "./mlruns"


@pytest.mark.parametrize(
    "name",
    [
        "team/model",
        "model:1",
        "",
        "  ",
        " model",
        "model ",
        "a'b",
        'a"b',
        "a\nb",
        "a\tb",
        "x" * 257,
        "..",
        "..model",
        "a/../b",
        ".",
    ],
)
def test_name_that_the_registry_refuses_is_refused_before(name):
    with pytest.raises(ValueError, match="^model_name.*Give model_name letters, digits"):
        check_model_name(name)


@pytest.mark.parametrize("name", ["osft-model", "team.model_2", "Modell für Mails", "x" * 256, "a@b", "50%"])
def test_name_that_the_registry_takes_is_taken(mlflow, name):
    check_model_name(name)
    mlflow.create_registered_model(name)
    assert runs.client("", Path(mlflow.tracking_uri.removeprefix("sqlite:///")).parents[1]) is not None
    assert [model.name for model in mlflow.search_registered_models(f"name = '{name}'")] == [name]


def test_mlflow_takes_every_name_that_is_taken(mlflow):
    taken = []
    for length in (1, 2, 3):
        for name in map("".join, itertools.product("a./: \n'", repeat=length)):
            try:
                check_model_name(name)
            except ValueError:
                continue
            mlflow.create_registered_model(name)
            taken.append(name)
    assert {"a", ".a", "a..", "a a"} <= set(taken)


def test_deleted_experiment_is_refused_with_the_command_that_restores_it(mlflow, registry_root):
    number = mlflow.create_experiment("gone")
    mlflow.delete_experiment(number)
    with pytest.raises(ValueError, match=f"'gone' was deleted. Restore it .*restore --experiment-id {number}"):
        runs.experiment_of(mlflow, "gone", registry_root)


def test_server_that_does_not_answer_fails_a_step_with_a_message_in_time(monkeypatch):
    monkeypatch.setattr(runs, "_RETRY_SECONDS", 0.05)
    started = time.monotonic()
    with pytest.raises(ConnectionError, match="server http://127.0.0.1:1 does not answer .connection refused"):
        runs.client("http://127.0.0.1:1", "", wait_seconds=0.3)
    assert 0.3 < time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ((404, "text/html", b"<h1>not here</h1>"), ValueError, "does not answer as one"),
        ((501, "text/plain", b"no POST"), ValueError, "does not answer as one"),
        ((200, "text/html", b"<form>log in</form>"), ValueError, "does not answer as one"),
        ((302, "text/html", b""), ValueError, "no MLflow server|does not answer as one"),
        ((401, "text/plain", b"who?"), ValueError, "MLFLOW_TRACKING_USERNAME"),
        ((403, "application/json", b'{"error_code": "PERMISSION_DENIED"}'), ValueError, "MLFLOW_TRACKING_USERNAME"),
        ((503, "text/html", b"starting"), ConnectionError, "does not answer .503 error responses"),
        ((502, "text/html", b"bad gateway"), ConnectionError, "does not answer .502 error responses"),
        ((429, "text/plain", b"slow down"), ConnectionError, "does not answer"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_answer_of_another_server_or_of_a_proxy_is_told_in_one_line(answer, kind, words):
    status, content_type, body = answer

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(kind, match=words) as told:
            runs.client(f"http://127.0.0.1:{server.server_port}", "", wait_seconds=0)
        server.shutdown()
    assert "\n" not in str(told.value)


def test_server_that_takes_a_request_and_never_answers_is_not_waited_for(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(ConnectionError, match="does not answer"):
            runs.client(f"http://127.0.0.1:{silent.getsockname()[1]}", "", wait_seconds=0)
    assert time.monotonic() - started < 5


def test_bounds_of_requests_are_the_users_where_they_are_set(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    with bounded_requests(retries=0, timeout_seconds=10):
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_wait_that_is_no_number_is_refused_by_name(text, monkeypatch):
    monkeypatch.setenv("OSFT_MLFLOW_WAIT_SECONDS", text)
    with pytest.raises(ValueError, match="OSFT_MLFLOW_WAIT_SECONDS must be a number of seconds"):
        runs.last_wait_seconds()
