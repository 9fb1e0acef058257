"""Pipelines, MLflow and object stores: healthy ones are ok, each fault is found with its remedy."""

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import kfp
import pytest

from osft import storage
from osft.doctor.finding import Check, Finding
from osft.doctor.mlflow_server import check_mlflow
from osft.doctor.object_store import check_object_store
from osft.doctor.pipelines_server import check_pipelines
from osft.storage import locations
from tests.doctor.conftest import subject
from tests.pipelines.kfp_server import KfpServer


def found(check: Any, parameters: dict[str, Any] | None = None, **given: Any) -> list[Finding]:
    return list(Check("services", "it", check).findings(subject(parameters, **given)))


def fault(check: Any, parameters: dict[str, Any] | None = None, **given: Any) -> tuple[str, str, str]:
    """The one fault: level, text and remedy."""
    (one,) = [one for one in found(check, parameters, **given) if one.level in ("warning", "error")]
    return one.level, one.text, one.remedy


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", "/nonexistent/context.json")
    with KfpServer() as server:
        yield server


def test_pipelines_server_tells_its_release(pipelines):
    (one,) = found(check_pipelines, host=pipelines.address)
    assert one.level == "ok"
    assert one.text.startswith("is release 2.17.0, the client here 2.")


@pytest.mark.parametrize(
    ("release", "level", "told"),
    [("1.8.22", "error", "cannot run what is compiled here"), ("2.5.0", "warning", "when no round runs")],
)
def test_older_pipelines_server_is_a_fault(pipelines, release, level, told):
    pipelines.release = release
    got, text, remedy = fault(check_pipelines, host=pipelines.address)
    assert (got, told in remedy, release in text) == (level, True, True)


def test_pipelines_server_of_several_users_wants_a_namespace(pipelines):
    pipelines.multi_user = True
    assert "--namespace" in fault(check_pipelines, host=pipelines.address)[2]
    assert [one.level for one in found(check_pipelines, host=pipelines.address, namespace="team-a")] == ["ok"]


def test_pipelines_server_that_is_away_or_unknown():
    level, text, remedy = fault(check_pipelines, host="http://127.0.0.1:9")
    assert level == "error"
    assert "does not answer" in text
    assert "KFP_ENDPOINT" in remedy
    assert [one.level for one in found(check_pipelines)] == ["not checked"]


class Mlflow(http.server.BaseHTTPRequestHandler):
    """The two answers of a tracking server that the check asks for."""

    release = "3.17.2"
    status = 200

    def do_GET(self) -> None:
        self._answer(self.release.encode(), 200 if self.path == "/version" else self.status)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(b'{"experiments": []}' if self.status == 200 else b"You are not authenticated.", self.status)

    def _answer(self, content: bytes, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mlflow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_mlflow_that_answers_is_ok(address):
    release, access = found(check_mlflow, {"mlflow_tracking_uri": address})
    assert (release.level, access.level) == ("ok", "ok")
    assert release.text.startswith("is release 3.17.2")


@pytest.mark.parametrize(("release", "level"), [("1.30.0", "error"), ("2.22.1", "warning"), ("4.0.1", "warning")])
def test_mlflow_of_another_release_is_a_fault(address, monkeypatch, release, level):
    monkeypatch.setattr(Mlflow, "release", release)
    got, text, remedy = fault(check_mlflow, {"mlflow_tracking_uri": address})
    assert got == level
    assert release in text
    assert "Upgrade" in remedy


def test_mlflow_that_does_not_take_the_credentials_is_an_error(address, monkeypatch):
    monkeypatch.setattr(Mlflow, "status", 401)
    level, text, remedy = fault(check_mlflow, {"mlflow_tracking_uri": address})
    assert level == "error"
    assert "MLFLOW_TRACKING_USERNAME" in remedy, text


@pytest.mark.parametrize(
    ("uri", "told", "remedy"),
    [
        ("http://127.0.0.1:9", "does not answer", "correct mlflow_tracking_uri"),
        ("mlflow.example:5000", "has no scheme", "http://mlflow.example:5000"),
        ("/data/mlruns", "is a folder", "sqlite:///"),
    ],
)
def test_address_that_is_no_mlflow_is_an_error(uri, told, remedy):
    level, text, says = fault(check_mlflow, {"mlflow_tracking_uri": uri})
    assert (level, told in text, remedy in says) == ("error", True, True)


@pytest.mark.parametrize("host", ["mlflow.kubeflow.svc", "mlflow.kubeflow.invalid"])
def test_mlflow_that_has_a_name_in_the_cluster_only_is_an_error_in_a_pod_only(host, monkeypatch):
    parameters = {"mlflow_tracking_uri": f"http://{host}:5000"}
    assert [one.level for one in found(check_mlflow, parameters)] == ["not checked"]
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert fault(check_mlflow, parameters)[0] == "error"


def test_default_database_is_ok_here_and_an_error_in_a_pod(monkeypatch):
    assert [one.level for one in found(check_mlflow)] == ["ok"]
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    level, _, remedy = fault(check_mlflow)
    assert (level, "MLFLOW_TRACKING_URI" in remedy) == ("error", True)


def test_object_store_without_a_tracking_server_is_an_error():
    assert fault(check_mlflow, {"storage_root": "s3://bucket/a"})[0] == "error"


def test_object_store_that_does_all_is_ok_and_keeps_nothing(bucket, object_store):
    (one,) = found(check_object_store, {"storage_root": f"{bucket}/root"})
    assert (one.level, one.text) == ("ok", "creates exclusively, reads, lists and deletes")
    assert object_store.names(bucket) == set()


def test_object_store_that_ignores_if_none_match_is_an_error(bucket, object_store, monkeypatch):
    monkeypatch.setattr(locations, "_made", lambda store, path, content: store.pipe_file(path, content) or True)
    level, text, remedy = fault(check_object_store, {"storage_root": bucket})
    assert level == "error"
    assert "ignores If-None-Match" in text
    assert "Amazon S3" in remedy


def test_bucket_that_is_not_there_is_an_error(bucket):
    level, text, remedy = fault(check_object_store, {"storage_root": "s3://no-such-bucket-here"})
    assert (level, "no bucket" in text, "Create it" in remedy) == ("error", True, True)


def test_object_store_that_refuses_is_an_error(bucket, object_store):
    with object_store.failing(lambda method, path: 403):
        level, text, remedy = fault(check_object_store, {"storage_root": bucket})
    assert (level, "refuses access" in text, "AWS_ACCESS_KEY_ID" in remedy) == ("error", True, True)


def test_object_that_cannot_be_deleted_is_an_error(bucket, monkeypatch):
    monkeypatch.setattr(storage, "remove", lambda place: None)
    assert "still has what was deleted" in fault(check_object_store, {"storage_root": bucket})[1]


def test_object_store_is_not_looked_at_without_credentials(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert [one.level for one in found(check_object_store, {"storage_root": "s3://bucket"})] == ["not checked"]
