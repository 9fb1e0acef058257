"""Which server is asked, and with which credentials; none of them is ever printed."""

import sys

import pytest

from osft.orchestration import connect, list_schedules, newest_runs, submit
from osft.orchestration.connection import IN_CLUSTER_HOST

SECRET = "eyJhbGciOi.secret.token"


@pytest.fixture
def token_file(tmp_path):
    file = tmp_path / "token"
    file.write_text(SECRET)
    return file


def sent(server, name: str) -> list[str | None]:
    return [headers.get(name) for headers in server.headers]


def test_token_file_is_read_again_for_each_request(server, token_file):
    client = connect(server.address, token_file=token_file)
    newest_runs(client)
    token_file.write_text("renewed")
    newest_runs(client)
    assert sent(server, "authorization")[-2:] == [f"Bearer {SECRET}", "Bearer renewed"]


@pytest.mark.parametrize(
    ("environment", "given", "token"),
    [
        ({"KFP_EXISTING_TOKEN": "of-the-environment"}, False, "of-the-environment"),
        ({"KF_PIPELINES_SA_TOKEN_PATH": "mounted"}, False, SECRET),
        ({"KFP_EXISTING_TOKEN": "of-the-environment"}, True, SECRET),
    ],
    ids=["environment", "mounted by the cluster", "file before environment"],
)
def test_token_that_is_sent(server, token_file, monkeypatch, environment, given, token):
    for name, value in environment.items():
        monkeypatch.setenv(name, str(token_file) if value == "mounted" else value)
    newest_runs(connect(server.address, token_file=token_file if given else None))
    assert sent(server, "authorization")[-1] == f"Bearer {token}"


def test_cookies(server):
    newest_runs(connect(server.address, cookies="session=1"))
    assert sent(server, "cookie")[-1] == "session=1"


def test_missing_token_file_is_named(server, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no token file .*/nothing"):
        connect(server.address, token_file=tmp_path / "nothing")


@pytest.mark.parametrize("name", ["KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT"])
def test_host_of_the_environment(server, monkeypatch, name):
    monkeypatch.setenv(name, server.address)
    assert newest_runs(connect()) == []


def test_no_host_says_how_to_give_one():
    with pytest.raises(ValueError, match="--host"):
        connect()


def test_in_a_pod_the_service_is_the_host(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    client = connect(namespace="team")  # with a namespace it asks nothing yet
    assert client._existing_config.host == IN_CLUSTER_HOST


def test_namespace_is_in_every_list(server, pipeline):
    server.multi_user = True
    client = connect(server.address, namespace="team")
    newest_runs(client)
    list_schedules(client)
    submit(client, pipeline, {"data_uri": "x"})
    assert [one["namespace"] for one in server.experiments.values()] == ["team"]


@pytest.mark.parametrize(("code", "error"), [(401, PermissionError), (403, PermissionError), (503, ConnectionError)])
def test_refused_and_failed_requests_are_told_apart_without_the_token(server, token_file, code, error):
    client = connect(server.address, token_file=token_file)
    server.fail = lambda method, path: code
    with pytest.raises(error, match="the server is not well") as caught:
        newest_runs(client)
    assert SECRET not in str(caught.value)


def test_refusal_at_the_first_request_is_told_at_once(server):
    server.fail = lambda method, path: 401
    with pytest.raises(PermissionError, match="Check the token"):
        connect(server.address)
    assert len(server.requests) == 1


def test_server_that_is_not_there(server):
    with pytest.raises(ConnectionError, match="does not answer"):
        newest_runs(connect("http://127.0.0.1:9", namespace="team"))


def test_without_kfp_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kfp", None)
    with pytest.raises(ValueError, match=r"pip install 'osft\[pipelines\]'"):
        connect("http://127.0.0.1:9")
