"""A server, a client of it, and a small pipeline with a parameter of each type."""

from collections.abc import Callable, Iterator
from pathlib import Path

import kfp
import pytest
from click.testing import Result
from kfp import compiler, dsl
from typer.testing import CliRunner

from osft.cli import app
from osft.orchestration import CompiledPipeline, UploadedPipeline, connect, upload
from tests.pipelines.kfp_server import KfpServer


@dsl.component
def learn(data_uri: str, rate: float, epochs: int, shuffle: bool, anchors: list, job: dict):
    print(data_uri)


@dsl.pipeline(name="tiny")
def tiny(
    data_uri: str,
    learning_rate: float = 1e-3,
    epochs: int = 1,
    shuffle: bool = True,
    anchors: list = [],  # noqa: B006
    job: dict = {},  # noqa: B006
):
    learn(data_uri=data_uri, rate=learning_rate, epochs=epochs, shuffle=shuffle, anchors=anchors, job=job)


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT", "KFP_EXISTING_TOKEN", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", "/nonexistent/context.json")


@pytest.fixture(scope="session")
def yaml_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pipeline") / "tiny.yaml"
    compiler.Compiler().compile(tiny, str(file))
    return file


@pytest.fixture
def server() -> Iterator[KfpServer]:
    with KfpServer() as server:
        yield server


@pytest.fixture
def client(server: KfpServer) -> kfp.Client:
    return connect(server.address)


@pytest.fixture
def pipeline(client: kfp.Client, yaml_file: Path) -> UploadedPipeline:
    return upload(client, CompiledPipeline.read(yaml_file))


@pytest.fixture
def osft(server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`osft …`, against the server."""
    monkeypatch.setenv("KFP_ENDPOINT", server.address)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))
