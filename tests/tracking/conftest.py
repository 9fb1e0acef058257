"""A server that can be away, over the database that all tests share."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.tracking.server import TrackingServer
from tests.tracking.waiting import LeavingClient


@pytest.fixture
def leaving(mlflow: Any) -> LeavingClient:
    return LeavingClient(tracking_uri=mlflow.tracking_uri, registry_uri=mlflow.tracking_uri)


@pytest.fixture(scope="session")
def server() -> Iterator[TrackingServer]:
    with TrackingServer() as running:
        yield running


@pytest.fixture
def address(server: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's, which takes this process's credentials."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", server.user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.password)
    return server.address
