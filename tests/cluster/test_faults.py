"""Each fault, seen by the clients that the launcher uses."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import urllib3
from kubeflow.training import TrainingClient
from kubernetes import watch
from kubernetes.client import CoreV1Api
from kubernetes.client.exceptions import ApiException

from tests.cluster.access import Call
from tests.cluster.cluster import Cluster
from tests.cluster.faults import EXCEEDED_QUOTA, NO_GPU
from tests.cluster.manifests import pytorch_job

pytestmark = pytest.mark.cluster

Create = Callable[[dict[str, Any]], dict[str, Any]]
JOBS = Call("create", "kubeflow.org", "pytorchjobs")


def scheduled(cluster: Cluster, pod: str) -> dict[str, Any] | None:
    """The condition PodScheduled, without its time."""
    for found in cluster.pods():
        for condition in found.get("status", {}).get("conditions", []):
            if (found["metadata"]["name"], condition["type"]) == (pod, "PodScheduled"):
                return {key: text for key, text in condition.items() if key != "lastTransitionTime"}
    return None


def events_of(cluster: Cluster, name: str) -> dict[str, str]:
    return {event["reason"]: event["message"] for event in cluster.events() if event["involvedObject"]["name"] == name}


def test_a_refused_call_does_nothing_and_says_when_to_try_again(cluster: Cluster, create: Create) -> None:
    cluster.refuse(503, "create", "pytorchjobs", headers={"Retry-After": "7"})
    with pytest.raises(ApiException) as caught:
        create(pytorch_job("job", "true"))
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (503, "7")
    assert cluster.jobs() == []


def test_refusals_end_after_their_number(cluster: Cluster, create: Create) -> None:
    cluster.refuse(500, "create", "pytorchjobs", times=2)
    for _ in range(2):
        with pytest.raises(ApiException):
            create(pytorch_job("job", "true"))
    create(pytorch_job("job", "true"))
    assert cluster.calls == [JOBS] * 3


def test_a_refusal_meets_only_its_verb_and_resource(cluster: Cluster, core: CoreV1Api, create: Create) -> None:
    cluster.refuse(500, "get", "pods/*", times=None)
    create(pytorch_job("job", "true"))
    cluster.wait_for("job", "Succeeded")
    core.read_namespaced_pod("job-master-0", cluster.namespace)
    with pytest.raises(ApiException):
        core.read_namespaced_pod_log("job-master-0", cluster.namespace)
    cluster.recover()
    core.read_namespaced_pod_log("job-master-0", cluster.namespace)


def test_a_delayed_call_is_served_late(cluster: Cluster, core: CoreV1Api) -> None:
    cluster.delay(0.4, "list", "pods")
    began = time.monotonic()
    core.list_namespaced_pod(cluster.namespace)
    late = time.monotonic()
    core.list_namespaced_pod(cluster.namespace)
    assert late - began > 0.4 > time.monotonic() - late


@pytest.mark.parametrize("served", [False, True])
def test_a_cut_connection_loses_the_call_or_only_its_answer(served: bool, cluster: Cluster, create: Create) -> None:
    cluster.cut("create", "pytorchjobs", served=served)
    with pytest.raises(urllib3.exceptions.HTTPError):
        create(pytorch_job("job", "sleep 60"))
    assert len(cluster.jobs()) == served


def test_dropped_streams_break_a_followed_log(cluster: Cluster, core: CoreV1Api, create: Create) -> None:
    create(pytorch_job("job", "while true; do echo line; sleep 0.05; done"))
    cluster.wait_for("job", "Running")
    stream = core.read_namespaced_pod_log("job-master-0", cluster.namespace, follow=True, _preload_content=False)
    lines = iter(stream)
    assert next(lines) == b"line\n"
    cluster.drop_streams()
    with pytest.raises(urllib3.exceptions.ProtocolError):
        list(lines)


def test_a_stalled_log_outlives_its_container(cluster: Cluster, core: CoreV1Api, create: Create) -> None:
    create(pytorch_job("job", "echo line; sleep 0.5; echo more"))
    cluster.wait_for("job", "Running")
    lines = iter(
        core.read_namespaced_pod_log(
            "job-master-0", cluster.namespace, follow=True, _preload_content=False, _request_timeout=(1, 1.5)
        )
    )
    assert next(lines) == b"line\n"
    cluster.stall_streams()
    with pytest.raises(urllib3.exceptions.ReadTimeoutError):
        next(lines)
    assert cluster.wait_for("job", "Succeeded")


def test_dropped_streams_can_end_a_watch_cleanly(cluster: Cluster, core: CoreV1Api) -> None:
    ended = threading.Event()

    def follow() -> None:
        answer = core.list_namespaced_pod(cluster.namespace, watch=True, _preload_content=False)
        assert list(answer) == []
        ended.set()

    threading.Thread(target=follow, daemon=True).start()
    cluster.wait_until(lambda: cluster.api.streams.count == 1)
    cluster.drop_streams(clean=True)
    assert ended.wait(3)


def test_a_watch_begins_again_after_a_drop(cluster: Cluster, core: CoreV1Api) -> None:
    cluster.add("pods", {"metadata": {"name": "first"}, "spec": {"containers": []}})
    cluster.wait_until(lambda: cluster.phase("first") == "Running")
    stream = watch.Watch().stream(core.list_namespaced_pod, cluster.namespace)
    assert next(stream)["object"].metadata.name == "first"
    cluster.drop_streams(clean=True)
    cluster.add("pods", {"metadata": {"name": "second"}, "spec": {"containers": []}})
    assert next(stream)["object"].metadata.name == "second"


def test_unschedulable_pods_say_what_is_lacking(cluster: Cluster, create: Create) -> None:
    cluster.never_schedule()
    create(pytorch_job("job", "true"))
    condition = cluster.wait_until(lambda: scheduled(cluster, "job-master-0"))
    assert condition == {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": NO_GPU}
    assert cluster.phase("job-master-0") == "Pending"
    assert events_of(cluster, "job-master-0") == {"FailedScheduling": NO_GPU}
    assert cluster.conditions("job") == {"Created": "True"}
    cluster.recover()
    cluster.wait_for("job", "Succeeded")


def test_a_missing_claim_keeps_its_pods_from_being_scheduled(cluster: Cluster, create: Create) -> None:
    cluster.missing_claim("work")
    volumes = {"volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "work"}}]}
    create(pytorch_job("job", "true", pod=volumes))
    condition = cluster.wait_until(lambda: scheduled(cluster, "job-master-0"))
    assert condition["reason"] == "Unschedulable"
    assert 'persistentvolumeclaim "work" not found' in condition["message"]
    create(pytorch_job("other", "true"))
    cluster.wait_for("other", "Succeeded")


def test_an_image_that_cannot_be_pulled_keeps_the_pod_waiting(cluster: Cluster, create: Create) -> None:
    cluster.image_pull_error()
    create(pytorch_job("job", "true", container={"image": "registry/absent:1"}))
    status = cluster.wait_until(lambda: cluster.container_status("job-master-0"))
    message = 'Back-off pulling image "registry/absent:1"'
    assert status["state"] == {"waiting": {"reason": "ImagePullBackOff", "message": message}}
    assert cluster.phase("job-master-0") == "Pending"
    assert message in events_of(cluster, "job-master-0")["Failed"]


def test_an_exceeded_quota_makes_no_pods_and_says_so_on_the_job(cluster: Cluster, create: Create) -> None:
    cluster.exceed_quota()
    create(pytorch_job("job", "true"))
    message = cluster.wait_until(lambda: events_of(cluster, "job").get("FailedCreatePod"))
    assert message == f'Error creating: pods "job-master-0" is forbidden: {EXCEEDED_QUOTA}'
    assert cluster.pods() == []
    assert cluster.conditions("job") == {"Created": "True"}
    cluster.recover()
    cluster.wait_for("job", "Succeeded")


def test_an_evicted_pod_has_no_exit_code_and_is_made_anew(cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "sleep 60"))
    cluster.wait_for("job", "Running")
    (first,), processes = cluster.pods(), cluster.processes()
    with cluster.store.lock:  # the operator sees it only afterwards
        cluster.evict_pod("job-master-0")
        (evicted,) = cluster.pods()
    assert (evicted["status"]["phase"], evicted["status"]["reason"]) == ("Failed", "Evicted")
    assert "containerStatuses" not in evicted["status"]
    cluster.wait_until(lambda: cluster.pods() and cluster.pods()[0]["metadata"]["uid"] != first["metadata"]["uid"])
    assert not set(processes) & set(cluster.processes())


def test_a_deleted_pod_is_made_anew(cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "sleep 60"))
    cluster.wait_for("job", "Running")
    (first,) = cluster.pods()
    cluster.delete_pod("job-master-0")
    cluster.wait_until(lambda: cluster.pods() and cluster.pods()[0]["metadata"]["uid"] != first["metadata"]["uid"])
    cluster.wait_for("job", "Running")


@pytest.mark.parametrize(("code", "condition"), [(0, "Succeeded"), (1, "Failed"), (143, "Running")])
def test_a_drained_pod_is_judged_by_its_exit_code(
    code: int, condition: str, cluster: Cluster, core: CoreV1Api, create: Create, tmp_path: Path
) -> None:
    script = f"trap 'exit {code}' TERM; touch {tmp_path}/ready; while true; do sleep 0.05; done"
    create(pytorch_job("job", script))
    cluster.wait_until((tmp_path / "ready").exists)
    (first,) = cluster.pods()
    cluster.delete_pod("job-master-0")
    cluster.wait_until(lambda: first["metadata"]["uid"] not in [pod["metadata"]["uid"] for pod in cluster.pods()])
    cluster.wait_for("job", condition)
    assert len(cluster.pods()) == (condition == "Running")


def test_killing_a_container_takes_all_of_its_processes(cluster: Cluster, create: Create, tmp_path: Path) -> None:
    create(pytorch_job("job", "setsid sleep 60 & sleep 60", restart_policy="Never"))
    cluster.wait_until(lambda: len(cluster.processes()) == 3)
    cluster.kill_pod("job-master-0", signal.SIGKILL)
    assert cluster.processes() == []
    cluster.wait_for("job", "Failed")


def test_a_container_that_does_not_run_cannot_be_killed(cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "true"))
    cluster.wait_for("job", "Succeeded")
    with pytest.raises(LookupError, match="no running container"):
        cluster.kill_pod("job-master-0")


def test_an_operator_that_restarts_takes_up_what_happened_meanwhile(
    cluster: Cluster, client: TrainingClient, create: Create
) -> None:
    create(pytorch_job("job", "sleep 0.3; echo done"))
    cluster.wait_for("job", "Running")
    cluster.restart_operator(1.5)
    began = time.monotonic()
    cluster.wait_until(lambda: cluster.phase("job-master-0") == "Succeeded")
    assert cluster.conditions("job")["Running"] == "True"
    cluster.wait_for("job", "Succeeded")
    assert time.monotonic() - began > 1.4
    assert client.get_job_logs("job")[0] == {"job-master-0": "done\n"}
