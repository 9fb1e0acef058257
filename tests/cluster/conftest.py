"""The stand-in cluster and clients of it as fixtures."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubeflow.training import TrainingClient
from kubernetes.client import CoreV1Api

from tests.cluster.cluster import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "cluster") as running:
        yield running


@pytest.fixture
def client(cluster: Cluster) -> TrainingClient:
    return TrainingClient(config_file=str(cluster.kubeconfig), namespace=cluster.namespace)


@pytest.fixture
def core(client: TrainingClient) -> CoreV1Api:
    return client.core_api


@pytest.fixture
def create(cluster: Cluster, client: TrainingClient) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """POST a job as a dict; what the server answers."""

    def post(job: dict[str, Any]) -> dict[str, Any]:
        return client.custom_api.create_namespaced_custom_object(
            "kubeflow.org", "v1", cluster.namespace, "pytorchjobs", job
        )

    return post
