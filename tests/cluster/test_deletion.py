"""What deletion waits for, and what it takes along."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kubeflow.training import TrainingClient
from kubernetes.client import V1DeleteOptions, V1Preconditions
from kubernetes.client.exceptions import ApiException

from tests.cluster.cluster import Cluster
from tests.cluster.manifests import pytorch_job

pytestmark = pytest.mark.cluster

Create = Callable[[dict[str, Any]], dict[str, Any]]
FOREGROUND = V1DeleteOptions(propagation_policy="Foreground")
# Says that it was asked to stop, and takes its time.
SLOW_TO_STOP = "trap 'echo stopping; sleep 0.6; exit 0' TERM; echo ready; while true; do sleep 0.05; done"


def ready(cluster: Cluster, count: int = 1) -> bool:
    logs = list((cluster.kubeconfig.parent / "pods").glob("*.log"))
    return len([log for log in logs if "ready" in log.read_text()]) == count


def test_a_foreground_deletion_shows_the_job_until_its_processes_are_gone(
    cluster: Cluster, client: TrainingClient, create: Create
) -> None:
    create(pytorch_job("job", SLOW_TO_STOP, SLOW_TO_STOP, workers=1))
    cluster.wait_until(lambda: ready(cluster, 2))
    client.delete_job("job", delete_options=FOREGROUND)
    seen = set()
    while jobs := cluster.jobs():
        assert "deletionTimestamp" in jobs[0]["metadata"]
        seen.add(len(cluster.processes()) > 0)
    assert True in seen
    assert cluster.processes() == []
    assert cluster.pods() == []


def test_a_background_deletion_leaves_the_pods_stopping(
    cluster: Cluster, client: TrainingClient, create: Create
) -> None:
    create(pytorch_job("job", SLOW_TO_STOP))
    cluster.wait_until(lambda: ready(cluster))
    client.delete_job("job")
    assert cluster.jobs() == []
    cluster.wait_until(lambda: [pod for pod in cluster.pods() if "deletionTimestamp" in pod["metadata"]])
    assert cluster.processes() != []
    cluster.wait_until(lambda: cluster.pods() == [])
    assert cluster.processes() == []


def test_orphans_live_on(cluster: Cluster, client: TrainingClient, create: Create) -> None:
    create(pytorch_job("job", "sleep 60"))
    cluster.wait_for("job", "Running")
    client.delete_job("job", delete_options=V1DeleteOptions(propagation_policy="Orphan"))
    time.sleep(0.1)
    assert cluster.jobs() == []
    assert cluster.phase("job-master-0") == "Running"


def test_the_term_signal_reaches_the_main_process_only(
    cluster: Cluster, client: TrainingClient, create: Create, tmp_path: Path
) -> None:
    child = f"trap 'touch {tmp_path}/child-was-told' TERM; echo ready; while true; do sleep 0.05; done"
    trap = f'trap "touch {tmp_path}/main-was-told; sleep 0.2; exit 0" TERM'
    main = f'sh -c "{child}" & {trap}; while true; do sleep 0.05; done'
    create(pytorch_job("job", main))
    cluster.wait_until(lambda: ready(cluster))
    client.delete_job("job", delete_options=FOREGROUND)
    cluster.wait_until(lambda: cluster.jobs() == [])
    assert (tmp_path / "main-was-told").exists()
    assert not (tmp_path / "child-was-told").exists()


def test_after_the_grace_period_everything_is_killed(cluster: Cluster, client: TrainingClient, create: Create) -> None:
    script = "trap '' TERM; echo ready; while true; do sleep 0.05; done"
    create(pytorch_job("job", script, pod={"terminationGracePeriodSeconds": 1}))
    cluster.wait_until(lambda: ready(cluster))
    client.delete_job("job", delete_options=FOREGROUND)
    asked = time.monotonic()
    cluster.wait_until(lambda: cluster.jobs() == [])
    assert 0.9 < time.monotonic() - asked < 3
    assert cluster.processes() == []


def test_a_pod_without_grace_is_killed_at_once(cluster: Cluster, create: Create) -> None:
    script = "trap '' TERM; echo ready; while true; do sleep 0.05; done"
    create(pytorch_job("job", script, restart_policy="Never", pod={"terminationGracePeriodSeconds": 60}))
    cluster.wait_until(lambda: ready(cluster))
    processes = cluster.processes()
    cluster.delete_pod("job-master-0", grace_seconds=0)
    cluster.wait_until(lambda: not set(cluster.processes()) & set(processes))


def test_a_second_deletion_can_shorten_the_grace(cluster: Cluster, create: Create) -> None:
    script = "trap '' TERM; echo ready; while true; do sleep 0.05; done"
    create(pytorch_job("job", script, restart_policy="Never", pod={"terminationGracePeriodSeconds": 60}))
    cluster.wait_until(lambda: ready(cluster))
    processes = cluster.processes()
    cluster.delete_pod("job-master-0")
    cluster.delete_pod("job-master-0", grace_seconds=1)
    cluster.wait_until(lambda: not set(cluster.processes()) & set(processes))


def test_deleting_the_workflow_takes_the_job_and_its_pods(cluster: Cluster, create: Create) -> None:
    step = cluster.add_step_pod("step", "run")
    create(pytorch_job("job", "sleep 60", owner=step))
    cluster.wait_for("job", "Running")
    cluster.delete("workflows", "run")
    cluster.wait_until(lambda: cluster.jobs() == cluster.pods() == [])
    assert cluster.processes() == []


def test_an_owner_that_does_not_exist_takes_the_job_along(cluster: Cluster, create: Create) -> None:
    step = cluster.add_step_pod("step", "run")
    step["metadata"]["uid"] = "00000000-0000-0000-0000-000000000000"
    create(pytorch_job("job", "sleep 60", owner=step))
    cluster.wait_until(lambda: cluster.jobs() == [])


def test_a_deletion_of_another_incarnation_is_a_conflict(
    cluster: Cluster, client: TrainingClient, create: Create
) -> None:
    uid = create(pytorch_job("job", "sleep 60"))["metadata"]["uid"]
    with pytest.raises(RuntimeError) as caught:
        client.delete_job("job", delete_options=V1DeleteOptions(preconditions=V1Preconditions(uid="another")))
    assert isinstance(caught.value.__cause__, ApiException)
    assert caught.value.__cause__.status == 409
    client.delete_job("job", delete_options=V1DeleteOptions(preconditions=V1Preconditions(uid=uid)))
    assert cluster.jobs() == []


def test_a_name_is_free_again_when_its_job_is_gone(cluster: Cluster, client: TrainingClient, create: Create) -> None:
    first = create(pytorch_job("job", SLOW_TO_STOP))
    cluster.wait_until(lambda: ready(cluster))
    client.delete_job("job", delete_options=FOREGROUND)
    with pytest.raises(ApiException) as caught:
        create(pytorch_job("job", "true"))
    assert caught.value.status == 409
    cluster.wait_until(lambda: cluster.jobs() == [])
    assert create(pytorch_job("job", "true"))["metadata"]["uid"] != first["metadata"]["uid"]
    cluster.wait_for("job", "Succeeded")


def test_pods_of_a_job_made_again_wait_for_those_before(
    cluster: Cluster, client: TrainingClient, create: Create
) -> None:
    create(pytorch_job("job", SLOW_TO_STOP))
    cluster.wait_until(lambda: ready(cluster))
    (old,) = cluster.pods()
    client.delete_job("job")
    create(pytorch_job("job", "sleep 60"))
    time.sleep(0.1)
    assert [pod["metadata"]["uid"] for pod in cluster.pods()] == [old["metadata"]["uid"]]
    cluster.wait_for("job", "Running")
