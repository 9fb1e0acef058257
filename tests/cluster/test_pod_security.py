"""PodSecurity "restricted": the pods of a job fit it, and what the operator adds to them is told from that."""

import time
from pathlib import Path

import pytest
import yaml

from osft.kubernetes.api import ClusterApi
from osft.kubernetes.launcher import JobLauncher
from osft.kubernetes.manifest import JobIdentity, Storage
from osft.kubernetes.pytorchjob import PyTorchJob
from osft.kubernetes.settings import JobSettings
from osft.training.job import Limits, run_job
from tests.cluster.cluster import Cluster
from tests.cluster.training_step import ROLE

pytestmark = pytest.mark.cluster

TEMPLATE = ROLE.parents[1] / "examples" / "init_container.yaml"


def follow(cluster: Cluster, output: Path, *, num_workers: int = 2) -> None:
    """A job whose pods have nothing to do, from its submission to its end."""
    settings = JobSettings(gpus=0, num_workers=num_workers)
    manifests = PyTorchJob().manifests(
        JobIdentity(name="osft-restricted", namespace=cluster.namespace),
        settings,
        image="registry.example/osft:1",
        command=["sh", "-c", "sleep 3"],
        storage=Storage(claim="osft-storage"),
    )
    launcher = JobLauncher(ClusterApi(cluster.namespace), PyTorchJob(), manifests, poll_seconds=0.1)
    run_job(launcher, limits=Limits(), output=output, poll_seconds=0.1)


def assert_succeeded(cluster: Cluster) -> None:
    (job,) = cluster.jobs()
    assert [found["type"] for found in job["status"]["conditions"] if found["status"] == "True"][-1] == "Succeeded"


def test_job_whose_worker_is_refused_is_deleted_at_once_with_the_remedy(cluster, tmp_path):
    cluster.restrict()
    with pytest.raises(RuntimeError, match=r'cannot start: .*PodSecurity "restricted.*"init-pytorch"') as refused:
        follow(cluster, tmp_path)
    assert "--pytorch-init-container-template-file" in str(refused.value)
    assert 'pytorch" must set' not in str(refused.value).replace("init-pytorch", ""), "the pods themselves fit"
    assert cluster.jobs() == []
    assert not cluster.processes(), "the Master holds nothing"


def test_example_of_a_template_is_admitted_by_the_next_attempt(cluster, tmp_path):
    cluster.restrict()
    with pytest.raises(RuntimeError, match="cannot start"):
        follow(cluster, tmp_path)
    cluster.operator.init_container = yaml.safe_load(TEMPLATE.read_text())["data"]["initContainer.yaml"]
    time.sleep(1.1)  # times of the API are in seconds
    cluster.restart_operator(1.0)  # meanwhile there is only what was told of the first job
    follow(cluster, tmp_path)
    assert len(cluster.pods()) >= 1
    assert_succeeded(cluster)


def test_job_of_one_pod_has_no_init_container(cluster, tmp_path):
    cluster.restrict()
    follow(cluster, tmp_path, num_workers=1)
    assert_succeeded(cluster)
