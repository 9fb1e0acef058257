"""The stand-in cluster as a fixture, and the kinds of jobs that a launcher can start on it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from osft.kubernetes.kinds import JobKind
from osft.kubernetes.training_job import KINDS
from tests.cluster.cluster import Cluster
from tests.cluster.launched import Launched


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Running; what this process does with a cluster, it does with this one."""
    with Cluster(tmp_path / "cluster") as running:
        monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig))
        yield running


@pytest.fixture(params=KINDS, ids=lambda kind: kind.launcher)
def kind(request: pytest.FixtureRequest) -> JobKind:
    """Each of them."""
    found: JobKind = request.param
    return found


@pytest.fixture
def launch(cluster: Cluster, kind: JobKind, tmp_path: Path) -> Callable[..., Launched]:
    def make(script: str = "exit 0", patience: float = 30.0, **settings: Any) -> Launched:
        return Launched(cluster, kind, tmp_path, script, settings, patience)

    return make
