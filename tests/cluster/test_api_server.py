"""The contract of the API: versions, selectors, schema, access, watches, logs."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from kubeflow.training import TrainingClient
from kubernetes import watch
from kubernetes.client import CoreV1Api
from kubernetes.client.exceptions import ApiException

from tests.cluster.access import Call
from tests.cluster.api_server import KEPT_REQUESTS
from tests.cluster.cluster import Cluster
from tests.cluster.manifests import pytorch_job

pytestmark = pytest.mark.cluster

Create = Callable[[dict[str, Any]], dict[str, Any]]
JOBS = ("kubeflow.org", "v1", "kubeflow-user", "pytorchjobs")


def test_a_created_job_has_a_uid_a_version_and_the_defaults_of_the_schema(create: Create) -> None:
    job = create(pytorch_job("job", "sleep 60"))
    assert re.fullmatch(r"[0-9a-f-]{36}", job["metadata"]["uid"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", job["metadata"]["creationTimestamp"])
    assert int(job["metadata"]["resourceVersion"]) > 0
    assert job["spec"]["runPolicy"]["suspend"] is False


def test_creating_a_job_twice_is_a_conflict(create: Create) -> None:
    create(pytorch_job("job", "sleep 60"))
    with pytest.raises(ApiException) as caught:
        create(pytorch_job("job", "sleep 60"))
    assert caught.value.status == 409
    assert '"AlreadyExists"' in caught.value.body


def broken_jobs() -> dict[str, dict[str, Any]]:
    def changed(**changes: Any) -> dict[str, Any]:
        return pytorch_job("job", "true", workers=1) | changes

    typo = pytorch_job("job", "true", pod={"nodeSelectors": {}})
    text = pytorch_job("job", "true")
    text["spec"]["pytorchReplicaSpecs"]["Master"]["replicas"] = "one"
    kind = pytorch_job("job", "true")
    kind["spec"]["pytorchReplicaSpecs"]["Server"] = kind["spec"]["pytorchReplicaSpecs"].pop("Master")
    return {
        "nodeSelectors": typo,
        "'one' is not of type": text,
        "Server: not a replica type": kind,
        "container with name pytorch": pytorch_job("job", "true", container={"name": "main"}),
        "'ttlSecondsAfterFinish' was unexpected": pytorch_job("job", "true", run_policy={"ttlSecondsAfterFinish": 1}),
        "restartPolicy: 'Sometimes'": pytorch_job("job", "true", restart_policy="Sometimes"),
        "no DNS-1035 label": pytorch_job("7job", "true"),
        "over 63 characters": pytorch_job("j" * 55, "true"),
        "no label value": pytorch_job("job", "true", labels={"run": "a b"}),
        "is not of type 'string'": pytorch_job("job", "true", container={"env": [{"name": "A", "value": 1}]}),
        "Additional properties": changed(specs={}),
    }


@pytest.mark.parametrize("message", broken_jobs())
def test_a_job_against_the_schema_is_refused_with_the_field(message: str, cluster: Cluster, create: Create) -> None:
    with pytest.raises(ApiException) as caught:
        create(broken_jobs()[message])
    assert caught.value.status == 422
    assert message in caught.value.body
    assert cluster.jobs() == []


def test_a_name_can_be_generated(create: Create) -> None:
    job = pytorch_job("job", "sleep 60")
    job["metadata"] = {"generateName": "job-"}
    assert re.fullmatch(r"job-\w{5}", create(job)["metadata"]["name"])


def test_a_job_that_is_not_there_is_not_found(client: TrainingClient) -> None:
    with pytest.raises(ApiException) as caught:
        client.custom_api.get_namespaced_custom_object(*JOBS, "job")
    assert (caught.value.status, caught.value.reason) == (404, "Not Found")


def test_a_replacement_of_an_older_version_is_a_conflict(client: TrainingClient, create: Create) -> None:
    job = create(pytorch_job("job", "sleep 60", run_policy={"suspend": True}))
    client.custom_api.patch_namespaced_custom_object(*JOBS, "job", {"metadata": {"labels": {"a": "b"}}})
    with pytest.raises(ApiException) as caught:
        client.custom_api.replace_namespaced_custom_object(*JOBS, "job", job)
    assert caught.value.status == 409


def test_a_patch_merges_and_is_checked(client: TrainingClient, create: Create) -> None:
    create(pytorch_job("job", "sleep 60", labels={"a": "1", "b": "2"}, run_policy={"suspend": True}))
    patched = client.custom_api.patch_namespaced_custom_object(*JOBS, "job", {"metadata": {"labels": {"a": None}}})
    assert patched["metadata"]["labels"] == {"b": "2"}
    with pytest.raises(ApiException) as caught:
        client.custom_api.patch_namespaced_custom_object(*JOBS, "job", {"spec": {"runPolicy": {"suspend": "no"}}})
    assert caught.value.status == 422


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("tier=front", {"a"}),
        ("tier==front,run=1", {"a"}),
        ("tier!=front", {"b", "c"}),
        ("tier", {"a", "b"}),
        ("!tier", {"c"}),
        ("tier in (front, back),run=1", {"a", "b"}),
        ("tier notin (back)", {"a", "c"}),
        ("tier=nowhere", set()),
        (None, {"a", "b", "c"}),
    ],
)
def test_a_list_keeps_to_its_label_selector(
    selector: str | None, names: set[str], cluster: Cluster, core: CoreV1Api
) -> None:
    for name, labels in (("a", {"tier": "front"}), ("b", {"tier": "back"}), ("c", {})):
        cluster.add("pods", {"metadata": {"name": name, "labels": {**labels, "run": "1"}}, "spec": {"containers": []}})
    given = {"label_selector": selector} if selector else {}
    assert {pod.metadata.name for pod in core.list_namespaced_pod(cluster.namespace, **given).items} == names


def test_events_are_found_by_what_they_are_about(cluster: Cluster, core: CoreV1Api, create: Create) -> None:
    create(pytorch_job("job", "sleep 60"))
    cluster.wait_for("job", "Running")
    about = "involvedObject.name=job,involvedObject.kind=PyTorchJob"
    events = core.list_namespaced_event(cluster.namespace, field_selector=about).items
    assert [(event.reason, event.message) for event in events] == [("SuccessfulCreatePod", "Created pod: job-master-0")]


def test_a_field_that_nobody_can_select_by_is_a_bad_request(cluster: Cluster, core: CoreV1Api) -> None:
    with pytest.raises(ApiException) as caught:
        core.list_namespaced_pod(cluster.namespace, field_selector="spec.restart=Never")
    assert caught.value.status == 400


def test_a_wrong_token_is_unauthorized(cluster: Cluster, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(cluster.kubeconfig.read_text().replace(cluster.api.token, "guessed"))
    client = TrainingClient(config_file=str(other), namespace=cluster.namespace)
    with pytest.raises(ApiException) as caught:
        client.core_api.list_namespaced_pod(cluster.namespace)
    assert caught.value.status == 401


def test_a_client_in_another_process_finds_the_cluster_by_its_kubeconfig(cluster: Cluster) -> None:
    cluster.add("pods", {"metadata": {"name": "pod"}, "spec": {"containers": []}})
    script = (
        "from kubernetes import client, config; config.load_kube_config(); "
        "namespace = config.list_kube_config_contexts()[1]['context']['namespace']; "
        "print([pod.metadata.name for pod in client.CoreV1Api().list_namespaced_pod(namespace).items])"
    )
    environment = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig)}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout == "['pod']\n"


def test_calls_are_told_in_the_words_of_rbac(
    cluster: Cluster, client: TrainingClient, core: CoreV1Api, create: Create
) -> None:
    create(pytorch_job("job", "sleep 60"))
    cluster.wait_for("job", "Running")
    core.list_namespaced_pod(cluster.namespace)
    core.read_namespaced_pod_log("job-master-0", cluster.namespace)
    list(watch.Watch().stream(core.list_namespaced_event, cluster.namespace, timeout_seconds=1))
    client.update_job({"metadata": {"labels": {}}}, "job")
    client.delete_job("job")
    assert cluster.calls == [
        Call("create", "kubeflow.org", "pytorchjobs"),
        Call("list", "", "pods"),
        Call("get", "", "pods/log"),
        Call("watch", "", "events"),
        Call("patch", "kubeflow.org", "pytorchjobs"),
        Call("delete", "kubeflow.org", "pytorchjobs"),
    ]


def test_a_role_bounds_what_is_served(
    cluster: Cluster, client: TrainingClient, core: CoreV1Api, create: Create
) -> None:
    cluster.api.role = {
        "rules": [
            {"apiGroups": ["kubeflow.org"], "resources": ["pytorchjobs"], "verbs": ["create", "get"]},
            {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
        ]
    }
    create(pytorch_job("job", "sleep 60"))
    cluster.wait_for("job", "Running")
    core.read_namespaced_pod_log("job-master-0", cluster.namespace)
    refused = [
        lambda: core.list_namespaced_pod(cluster.namespace),
        lambda: core.read_namespaced_pod("job-master-0", cluster.namespace),
        lambda: client.custom_api.delete_namespaced_custom_object(*JOBS, "job"),
        lambda: client.custom_api.get_namespaced_custom_object("kubeflow.org", "v1", "other", "pytorchjobs", "job"),
    ]
    for call in refused:
        with pytest.raises(ApiException) as caught:
            call()
        assert caught.value.status == 403


def test_only_the_latest_requests_are_kept(cluster: Cluster, core: CoreV1Api) -> None:
    for _ in range(60):
        core.list_namespaced_pod(cluster.namespace)
    assert (len(list(cluster.api)), len(cluster.calls)) == (KEPT_REQUESTS, 60)


def test_a_watch_tells_of_a_job_from_creation_to_deletion(
    cluster: Cluster, client: TrainingClient, create: Create
) -> None:
    seen: list[str] = []

    def follow() -> None:
        for event in watch.Watch().stream(client.custom_api.list_namespaced_custom_object, *JOBS):
            seen.append(event["type"])
            if event["type"] == "DELETED":
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    create(pytorch_job("job", "sleep 60"))
    cluster.wait_for("job", "Running")
    client.delete_job("job")
    thread.join(5)
    assert (seen[0], seen[-1], "MODIFIED" in seen) == ("ADDED", "DELETED", True)


def test_a_watch_takes_up_where_a_list_ended(cluster: Cluster, core: CoreV1Api) -> None:
    cluster.add("pods", {"metadata": {"name": "before"}, "spec": {"containers": []}})
    cluster.wait_until(lambda: cluster.phase("before") == "Running")
    version = core.list_namespaced_pod(cluster.namespace).metadata.resource_version
    cluster.add("pods", {"metadata": {"name": "after"}, "spec": {"containers": []}})
    stream = watch.Watch().stream(
        core.list_namespaced_pod, cluster.namespace, resource_version=version, timeout_seconds=1
    )
    assert {event["object"].metadata.name for event in stream} == {"after"}


def test_a_watch_from_a_forgotten_version_has_expired(cluster: Cluster, core: CoreV1Api) -> None:
    cluster.add("pods", {"metadata": {"name": "pod"}, "spec": {"containers": []}})
    with pytest.raises(ApiException) as caught:
        list(watch.Watch().stream(core.list_namespaced_pod, cluster.namespace, resource_version=3))
    assert caught.value.status == 410


def log_lines(core: CoreV1Api, pod: str = "job-master-0", **options: Any) -> list[str]:
    return core.read_namespaced_pod_log(pod, "kubeflow-user", **options).splitlines()


def test_a_followed_log_gives_lines_as_they_come_and_ends_with_the_container(
    cluster: Cluster, core: CoreV1Api, create: Create, tmp_path: Path
) -> None:
    def until(name: str) -> str:
        return f"until test -e {tmp_path / name}; do sleep 0.02; done"

    create(pytorch_job("job", f"echo one; {until('on')}; echo two >&2; {until('end')}"))
    cluster.wait_for("job", "Running")
    lines = iter(core.read_namespaced_pod_log("job-master-0", cluster.namespace, follow=True, _preload_content=False))
    assert next(lines) == b"one\n"
    (tmp_path / "on").touch()
    assert next(lines) == b"two\n"
    (tmp_path / "end").touch()
    assert list(lines) == []
    cluster.wait_for("job", "Succeeded")


def test_the_training_client_follows_the_log(
    cluster: Cluster, client: TrainingClient, create: Create, capsys: pytest.CaptureFixture[str]
) -> None:
    create(pytorch_job("job", "echo one; sleep 0.3; echo two"))
    cluster.wait_for("job", "Running")
    assert client.get_job_logs("job", follow=True)[0] == {"job-master-0": "onetwo"}
    assert "[Pod job-master-0]: two" in capsys.readouterr().out


def test_a_log_can_carry_the_time_of_each_line(cluster: Cluster, core: CoreV1Api, create: Create) -> None:
    create(pytorch_job("job", "echo a b; sleep 0.3; echo"))
    cluster.wait_for("job", "Succeeded")
    first, second = log_lines(core, timestamps=True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z a b", first)
    times = [datetime.fromisoformat(line.split(" ")[0]) for line in (first, second)]
    assert timedelta(seconds=0.25) < times[1] - times[0] < timedelta(seconds=2)
    assert datetime.now(UTC) - times[1] < timedelta(seconds=5)


def test_a_log_can_begin_late(cluster: Cluster, core: CoreV1Api, create: Create) -> None:
    create(pytorch_job("job", "echo old; sleep 2.5; echo new"))
    cluster.wait_for("job", "Succeeded")
    assert log_lines(core, since_seconds=2) == ["new"]
    assert log_lines(core, since_seconds=60) == ["old", "new"]


def test_a_log_can_be_cut_to_its_last_lines(cluster: Cluster, core: CoreV1Api, create: Create) -> None:
    create(pytorch_job("job", "seq 10"))
    cluster.wait_for("job", "Succeeded")
    assert log_lines(core, tail_lines=2) == ["9", "10"]


def test_the_log_before_a_restart_is_the_previous_one(
    cluster: Cluster, core: CoreV1Api, create: Create, tmp_path: Path
) -> None:
    script = f"echo $(ls {tmp_path} | grep -c again); test -e {tmp_path}/again || {{ touch {tmp_path}/again; exit 3; }}"
    create(pytorch_job("job", script, restart_policy="OnFailure"))
    cluster.wait_for("job", "Succeeded")
    assert (log_lines(core, previous=True), log_lines(core)) == (["0"], ["1"])


def test_there_is_no_log_of_a_container_that_has_not_started(cluster: Cluster, core: CoreV1Api, create: Create) -> None:
    cluster.image_pull_error()
    create(pytorch_job("job", "true"))
    cluster.wait_until(lambda: cluster.phase("job-master-0") == "Pending")
    with pytest.raises(ApiException) as caught:
        log_lines(core)
    assert caught.value.status == 400
    assert "is waiting to start" in caught.value.body


@pytest.mark.parametrize(
    ("pod", "options", "status"),
    [
        ("job-master-0", {"container": "main"}, 400),
        ("job-master-0", {"previous": True}, 400),
        ("job-master-1", {}, 404),
    ],
)
def test_a_log_that_is_not_there_is_an_error(
    pod: str, options: dict[str, Any], status: int, cluster: Cluster, core: CoreV1Api, create: Create
) -> None:
    create(pytorch_job("job", "sleep 60"))
    cluster.wait_for("job", "Running")
    with pytest.raises(ApiException) as caught:
        log_lines(core, pod, **options)
    assert caught.value.status == status
