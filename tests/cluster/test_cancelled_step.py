"""A cancelled step as it really ends: killed with its pod up to a second after SIGTERM, whatever it was doing."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from osft.kubernetes.kinds import JobKind
from tests.cluster.cluster import Cluster
from tests.cluster.launched import assert_only_job
from tests.cluster.step_pod import StepPod, why_no_namespace
from tests.cluster.training_step import step_environment

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

LEASE_MINUTES = 0.1
Begin = Callable[..., StepPod]


@pytest.fixture
def begin(cluster: Cluster, tmp_path: Path, kind: JobKind) -> Iterator[Begin]:
    """One attempt of the step after the other."""
    if reason := why_no_namespace():
        pytest.skip(f"no PID namespace for the pod of the step, and without one nothing kills it: {reason}")
    output = tmp_path / "output"
    output.mkdir()
    environment = step_environment(cluster)
    begun: list[StepPod] = []

    def make(outlives_sigterm: float) -> StepPod:
        command = [sys.executable, "-m", "tests.cluster.small_job", "follow", kind.launcher, str(output)]
        begun.append(StepPod([*command, str(LEASE_MINUTES)], environment, outlives_sigterm=outlives_sigterm))
        return begun[-1]

    yield make
    for pod in begun:
        pod.kill()


def log_of_the_job(cluster: Cluster) -> str:
    return "".join(log.path.read_text() for log in cluster.kubelet.logs.values())


def wait_until_followed(cluster: Cluster, step: StepPod) -> None:
    cluster.wait_until(lambda: "begins" in log_of_the_job(cluster) and "begins" in step.log, seconds=120)


def conditions(cluster: Cluster) -> list[str]:
    (job,) = cluster.jobs()
    return [found["type"] for found in job["status"].get("conditions", ()) if found["status"] == "True"]


def deleted(cluster: Cluster) -> bool:
    return any("deletionTimestamp" in job["metadata"] for job in cluster.jobs()) or not cluster.jobs()


def test_its_job_is_deleted_before_it_is_killed(cluster, begin, tmp_path):
    step = begin(outlives_sigterm=1.0)
    wait_until_followed(cluster, step)
    asked = step.terminate()
    cluster.wait_until(lambda: deleted(cluster), seconds=5)
    assert time.monotonic() - asked < 0.5
    assert step.wait(10) == 143, "the launcher died of the signal, and with it the pod"
    cluster.wait_until(lambda: not cluster.jobs() and not cluster.processes(), seconds=60)
    assert (tmp_path / "output" / "state").exists(), "the job's pods had their time to save"


def test_job_that_a_slow_api_did_not_delete_in_time_ends_by_its_lease_and_a_retry_resumes(cluster, begin, tmp_path):
    step = begin(outlives_sigterm=1.0)
    wait_until_followed(cluster, step)
    cluster.slow_down(2.0, "*", "*")
    asked = step.terminate()
    assert step.wait(10) == 143
    cluster.recover()
    assert time.monotonic() - asked < LEASE_MINUTES * 60
    assert not deleted(cluster)
    cluster.wait_until(lambda: "Failed" in conditions(cluster) and not cluster.processes(), seconds=60)
    assert (tmp_path / "output" / "state").read_text() == "saved"
    retried = begin(outlives_sigterm=1.0)
    assert retried.wait(120) == 0, retried.log
    assert "it is recreated and resumes from there" in retried.log
    assert "resumes\n" in retried.log
    assert_only_job(cluster, "Succeeded")
