"""What the stand-in makes of PyTorchJobs: pods, environments, conditions, restarts."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from kubeflow.training import TrainingClient
from kubernetes.client import CoreV1Api

from tests.cluster.cluster import Cluster
from tests.cluster.manifests import pytorch_job

pytestmark = pytest.mark.cluster

Create = Callable[[dict[str, Any]], dict[str, Any]]
LABEL = "training.kubeflow.org/"


def terminated(cluster: Cluster, pod: str) -> dict[str, Any]:
    cluster.wait_until(lambda: cluster.phase(pod) in ("Succeeded", "Failed"))
    return cluster.container_status(pod)["state"]["terminated"]


def spec_environment(pod: Any) -> dict[str, str]:
    return {entry.name: entry.value for entry in pod.spec.containers[0].env}


def test_pods_have_the_names_and_labels_of_the_operator(
    cluster: Cluster, client: TrainingClient, create: Create
) -> None:
    create(pytorch_job("job", "sleep 60", workers=2))
    pods = cluster.wait_until(lambda: len(cluster.pods()) == 3 and client.get_job_pods("job"))
    roles = {
        pod.metadata.name: {key.removeprefix(LABEL): value for key, value in pod.metadata.labels.items()}
        for pod in pods
    }
    common = {"job-name": "job", "operator-name": "pytorchjob-controller"}
    assert roles == {
        "job-master-0": common | {"replica-type": "master", "replica-index": "0", "job-role": "master"},
        "job-worker-0": common | {"replica-type": "worker", "replica-index": "0"},
        "job-worker-1": common | {"replica-type": "worker", "replica-index": "1"},
    }


def test_a_pod_is_owned_and_controlled_by_its_job(cluster: Cluster, create: Create) -> None:
    uid = create(pytorch_job("job", "sleep 60"))["metadata"]["uid"]
    (pod,) = cluster.wait_until(cluster.pods)
    (owner,) = pod["metadata"]["ownerReferences"]
    assert (owner["uid"], owner["kind"], owner["controller"], owner["blockOwnerDeletion"]) == (
        uid,
        "PyTorchJob",
        True,
        True,
    )


def test_pods_are_given_what_torchrun_reads(cluster: Cluster, client: TrainingClient, create: Create) -> None:
    create(pytorch_job("job", "sleep 60", workers=1, nproc_per_node="4"))
    cluster.wait_until(lambda: len(cluster.pods()) == 2)
    common = {
        "MASTER_ADDR": "job-master-0",
        "MASTER_PORT": "23456",
        "PET_MASTER_ADDR": "job-master-0",
        "PET_MASTER_PORT": "23456",
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "4",
        "PYTHONUNBUFFERED": "1",
        "WORLD_SIZE": "8",
    }
    assert {pod.metadata.name: spec_environment(pod) for pod in client.get_job_pods("job")} == {
        "job-master-0": common | {"RANK": "0", "PET_NODE_RANK": "0"},
        "job-worker-0": common | {"RANK": "1", "PET_NODE_RANK": "1"},
    }


def test_an_elastic_job_is_given_a_rendezvous(cluster: Cluster, client: TrainingClient, create: Create) -> None:
    elastic = {"minReplicas": 1, "maxReplicas": 3, "maxRestarts": 5, "rdzvBackend": "c10d"}
    create(pytorch_job("job", "sleep 60", workers=1, elastic=elastic))
    cluster.wait_until(lambda: len(cluster.pods()) == 2)
    values = spec_environment(client.get_job_pods("job")[0])
    assert {
        key: values.get(key) for key in ("PET_RDZV_ENDPOINT", "PET_RDZV_BACKEND", "PET_NNODES", "PET_MAX_RESTARTS")
    } == {
        "PET_RDZV_ENDPOINT": "job-worker-0:23456",
        "PET_RDZV_BACKEND": "c10d",
        "PET_NNODES": "1:3",
        "PET_MAX_RESTARTS": "5",
    }


def test_the_processes_of_a_job_are_sent_to_one_free_local_port(
    cluster: Cluster, client: TrainingClient, create: Create
) -> None:
    script = "echo $MASTER_ADDR:$MASTER_PORT $PET_MASTER_ADDR:$PET_MASTER_PORT"
    create(pytorch_job("job", f"{script}; sleep 0.3", script, workers=1))
    cluster.wait_for("job", "Succeeded")
    logs = client.get_job_logs("job", is_master=False)[0]
    address, same = logs["job-master-0"].split()
    assert address == same
    assert logs["job-worker-0"] == logs["job-master-0"]
    host, port = address.split(":")
    assert (host, port != "23456") == ("127.0.0.1", True)


def test_the_environment_of_the_test_stays_outside(
    cluster: Cluster, client: TrainingClient, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET_OF_THE_TEST", "1")
    create(pytorch_job("job", "env"))
    cluster.wait_for("job", "Succeeded")
    assert "A_SECRET_OF_THE_TEST" not in client.get_job_logs("job")[0]["job-master-0"]


def test_secrets_config_maps_and_fields_become_variables(
    cluster: Cluster, client: TrainingClient, create: Create
) -> None:
    cluster.add_secret("token", {"key": "s3cret", "other": "hidden"})
    cluster.add_config_map("settings", {"LEVEL": "7"})
    container = {
        "envFrom": [{"configMapRef": {"name": "settings"}}, {"secretRef": {"name": "absent", "optional": True}}],
        "env": [
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "token", "key": "key"}}},
            {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "BOTH", "value": "$(POD)/$(LEVEL)"},
        ],
    }
    create(pytorch_job("job", 'echo "$TOKEN $BOTH"', container=container))
    cluster.wait_for("job", "Succeeded")
    assert client.get_job_logs("job")[0] == {"job-master-0": "s3cret job-master-0/7\n"}


def test_a_missing_secret_holds_the_container_back_until_it_is_there(cluster: Cluster, create: Create) -> None:
    container = {"env": [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "token", "key": "key"}}}]}
    create(pytorch_job("job", "echo $TOKEN", container=container))
    cluster.wait_until(lambda: cluster.phase("job-master-0") == "Pending")
    waiting = cluster.wait_until(lambda: cluster.container_status("job-master-0").get("state", {}).get("waiting"))
    assert waiting == {"reason": "CreateContainerConfigError", "message": 'secret "token" not found'}
    cluster.add_secret("token", {"key": "there"})
    cluster.wait_for("job", "Succeeded")


def test_a_mount_of_an_undefined_volume_is_refused_with_an_event(cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "true", container={"volumeMounts": [{"name": "data", "mountPath": "/data"}]}))
    (event,) = cluster.wait_until(cluster.events)
    assert (event["reason"], event["involvedObject"]["kind"]) == ("FailedCreatePod", "PyTorchJob")
    assert 'Not found: "data"' in event["message"]
    assert cluster.pods() == []


def test_a_good_job_ends_with_running_false_and_succeeded_true(
    cluster: Cluster, client: TrainingClient, create: Create
) -> None:
    create(pytorch_job("job", "sleep 0.2", "sleep 0.1", workers=1))
    job = client.wait_for_job_conditions("job", polling_interval=0.05)
    found = [(condition.type, condition.status) for condition in job.status.conditions]
    assert found == [("Created", "True"), ("Running", "False"), ("Succeeded", "True")]
    assert job.metadata.creation_timestamp <= job.status.start_time <= job.status.completion_time


def test_the_success_of_the_master_ends_the_job(cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "sleep 0.3", "sleep 60", workers=1))
    cluster.wait_for("job", "Succeeded")
    assert cluster.phase("job-worker-0") == "Running"
    cluster.wait_until(lambda: cluster.jobs()[0]["status"]["replicaStatuses"]["Worker"].get("succeeded") == 1)


def test_a_worker_waits_for_its_master(cluster: Cluster, create: Create) -> None:
    cluster.never_schedule("*-master-0")
    create(pytorch_job("job", "sleep 60", "sleep 60", workers=1))
    waiting = cluster.wait_until(lambda: cluster.container_status("job-worker-0"))
    assert waiting["state"] == {"waiting": {"reason": "PodInitializing"}}
    cluster.recover()
    cluster.wait_until(lambda: cluster.phase("job-worker-0") == "Running")


@pytest.mark.parametrize("code", [1, 127])
def test_a_small_exit_code_fails_the_job_under_exit_code(code: int, cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", f"exit {code}"))
    job = cluster.wait_for("job", "Failed")
    assert terminated(cluster, "job-master-0")["exitCode"] == code
    assert "completionTime" not in job["status"]  # as in the real operator


def test_an_exit_code_from_128_has_the_pod_made_anew_under_exit_code(
    cluster: Cluster, create: Create, tmp_path: Path
) -> None:
    create(
        pytorch_job("job", f"test -e {tmp_path}/again || {{ touch {tmp_path}/again; sleep 0.1; exit 143; }}; sleep 60")
    )
    (first,) = cluster.wait_until(cluster.pods)
    cluster.wait_until(lambda: cluster.pods() and cluster.pods()[0]["metadata"]["uid"] != first["metadata"]["uid"])
    cluster.wait_for("job", "Running")
    assert "Restarting" not in cluster.conditions("job")
    reasons = [event["reason"] for event in cluster.events()]
    assert {"ExitedWithCode", "PyTorchJobRestarting", "SuccessfulDeletePod"} <= set(reasons)


def test_restarting_takes_the_place_of_running(cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "sleep 60"))
    cluster.wait_for("job", "Running")
    cluster.never_schedule()  # the new pod stays away, so that the state can be seen
    cluster.kill_pod("job-master-0")
    cluster.wait_for("job", "Restarting")
    assert cluster.conditions("job") == {"Created": "True", "Restarting": "True"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_is_an_exit_code_of_128_and_its_number(number: int, cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "sleep 60", restart_policy="Never"))
    cluster.wait_for("job", "Running")
    cluster.kill_pod("job-master-0", number)
    state = terminated(cluster, "job-master-0")
    assert (state["exitCode"], state["reason"]) == (128 + number, "Error")


def test_a_container_out_of_memory_says_so(cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "sleep 60", restart_policy="Never"))
    cluster.wait_for("job", "Running")
    cluster.kill_pod("job-master-0", reason="OOMKilled")
    state = terminated(cluster, "job-master-0")
    assert (state["exitCode"], state["reason"]) == (137, "OOMKilled")


def test_on_failure_restarts_the_container_in_its_pod(cluster: Cluster, create: Create, tmp_path: Path) -> None:
    script = f"test -e {tmp_path}/again || {{ touch {tmp_path}/again; exit 3; }}; sleep 60"
    create(pytorch_job("job", script, restart_policy="OnFailure"))
    (first,) = cluster.wait_until(cluster.pods)

    cluster.wait_until(lambda: cluster.container_status("job-master-0").get("restartCount") == 1)
    cluster.wait_until(lambda: "running" in cluster.container_status("job-master-0")["state"])
    status = cluster.container_status("job-master-0")
    assert status["lastState"]["terminated"]["exitCode"] == 3
    assert cluster.pods()[0]["metadata"]["uid"] == first["metadata"]["uid"]


def test_the_backoff_limit_ends_restarts_in_place(cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "exit 3", restart_policy="OnFailure", run_policy={"backoffLimit": 2}))
    job = cluster.wait_for("job", "Failed")
    assert "backoff limit" in job["status"]["conditions"][-1]["message"]
    assert "completionTime" in job["status"]
    cluster.wait_until(lambda: cluster.pods() == [])


def test_the_backoff_limit_does_not_bound_pods_made_anew(cluster: Cluster, create: Create, tmp_path: Path) -> None:
    script = f"echo >> {tmp_path}/tries; test $(wc -l < {tmp_path}/tries) -ge 4 || exit 130"
    create(pytorch_job("job", script, run_policy={"backoffLimit": 1}))
    cluster.wait_for("job", "Succeeded")


def test_never_fails_the_job_and_leaves_the_pod(cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "exit 200", restart_policy="Never"))
    job = cluster.wait_for("job", "Failed")
    assert "completionTime" in job["status"]
    assert cluster.phase("job-master-0") == "Failed"


@pytest.mark.parametrize(
    ("policy", "left"),
    [("None", {"job-master-0", "job-worker-0"}), ("Running", {"job-master-0"}), ("All", set())],
)
def test_the_clean_pod_policy_says_which_pods_stay(
    policy: str, left: set[str], cluster: Cluster, create: Create
) -> None:
    create(pytorch_job("job", "sleep 0.2", "sleep 60", workers=1, run_policy={"cleanPodPolicy": policy}))
    cluster.wait_for("job", "Succeeded")
    cluster.wait_until(lambda: {pod["metadata"]["name"] for pod in cluster.pods()} == left)
    time.sleep(0.1)
    assert {pod["metadata"]["name"] for pod in cluster.pods()} == left


def test_a_finished_job_lives_for_its_time_to_live(cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "true", run_policy={"ttlSecondsAfterFinished": 1}))
    cluster.wait_for("job", "Succeeded")
    cluster.wait_until(lambda: cluster.jobs() == cluster.pods() == [])


def test_the_active_deadline_fails_the_job_and_stops_its_pods(cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "sleep 60", run_policy={"activeDeadlineSeconds": 1}))
    job = cluster.wait_for("job", "Failed")
    assert "longer than specified deadline" in job["status"]["conditions"][-1]["message"]
    cluster.wait_until(lambda: cluster.pods() == [] and cluster.processes() == [])


def test_a_job_in_a_queue_is_suspended_until_it_is_admitted(cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "sleep 60", labels={"kueue.x-k8s.io/queue-name": "gpus"}))
    cluster.wait_for("job", "Suspended")
    assert cluster.pods() == []
    cluster.admit("job")
    cluster.wait_for("job", "Running")
    assert cluster.conditions("job")["Suspended"] == "False"


def test_suspending_stops_the_pods(cluster: Cluster, client: TrainingClient, create: Create) -> None:
    create(pytorch_job("job", "sleep 60"))
    cluster.wait_for("job", "Running")
    client.update_job({"spec": {"runPolicy": {"suspend": True}}}, "job")
    cluster.wait_for("job", "Suspended")
    cluster.wait_until(lambda: cluster.processes() == [])
    assert cluster.conditions("job")["Running"] == "False"


def test_the_end_of_the_log_becomes_the_message_of_a_failed_container(cluster: Cluster, create: Create) -> None:
    policy = {"terminationMessagePolicy": "FallbackToLogsOnError"}
    create(pytorch_job("job", "seq 100; echo why >&2; exit 1", container=policy))
    message = terminated(cluster, "job-master-0")["message"]
    assert message.splitlines() == [str(number) for number in range(22, 101)] + ["why"]


def test_a_command_that_does_not_exist_is_a_start_error(cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "", container={"command": ["no-such-program"]}, restart_policy="Never"))
    state = terminated(cluster, "job-master-0")
    assert (state["exitCode"], state["reason"]) == (128, "StartError")


def test_what_the_main_process_leaves_behind_dies_with_it(cluster: Cluster, create: Create) -> None:
    create(pytorch_job("job", "setsid sleep 60 & sleep 0.2"))
    cluster.wait_for("job", "Succeeded")
    assert cluster.processes() == []


def test_leaving_the_cluster_kills_every_process(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.add("pytorchjobs", pytorch_job("job", "trap '' TERM; setsid sleep 60 & sleep 60"))
        processes = cluster.wait_until(lambda: len(cluster.processes()) == 3 and cluster.processes())
    living = map(psutil.Process, filter(psutil.pid_exists, processes))
    assert [found for found in living if found.status() != psutil.STATUS_ZOMBIE] == []


def test_a_pod_without_the_container_runs_no_process(cluster: Cluster, core: CoreV1Api) -> None:
    cluster.add_step_pod("step", "run", {"pipeline": "continual"})
    cluster.wait_until(lambda: cluster.phase("step") == "Running")
    pod = core.read_namespaced_pod("step", cluster.namespace)
    assert (pod.metadata.owner_references[0].kind, pod.metadata.labels) == ("Workflow", {"pipeline": "continual"})
    assert cluster.processes() == []
