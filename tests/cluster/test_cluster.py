"""What real clusters do, and osft relies on, is what the stand-in does (seen with the training operator 1.9).

The jobs are put past the API: test_launcher.py shows that.
"""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.schema import job_problems, metadata_problems

cluster_test = pytest.mark.cluster
SLEEP = "sleep 60"
# Says that it was asked to stop, and takes its time.
SLOW_TO_STOP = "trap 'sleep 0.5; exit {code}' TERM; touch {ready}; while true; do sleep 0.05; done"


def pytorch_job(master: str, worker: str = "", *, container: dict[str, Any] | None = None, **spec: Any) -> Any:
    """`master` and `worker`: scripts for `sh -c`. `container`: further fields of it; `spec`: of the job's."""

    def replica(script: str) -> dict[str, Any]:
        main = {"name": "pytorch", "image": "stand-in", "command": ["sh", "-c", script], **(container or {})}
        pod = {"containers": [main], "terminationGracePeriodSeconds": 2}
        return {"replicas": 1, "restartPolicy": "ExitCode", "template": {"spec": pod}}

    replicas = {"Master": replica(master)} | ({"Worker": replica(worker)} if worker else {})
    return {"metadata": {"name": "job"}, "spec": {"pytorchReplicaSpecs": replicas, **spec}}


def conditions(cluster: Cluster) -> dict[str, str]:
    (job,) = cluster.jobs()
    return {found["type"]: found["status"] for found in job.get("status", {}).get("conditions", [])}


def wait_for(cluster: Cluster, condition: str) -> None:
    cluster.wait_until(lambda: conditions(cluster).get(condition) == "True")


def state_of_master(cluster: Cluster) -> dict[str, Any]:
    (pod, *_) = cluster.pods()
    (status,) = pod["status"]["containerStatuses"]
    return status["state"]


@pytest.mark.parametrize(
    ("replica", "spec", "problem"),
    [
        ({}, {"runPolicy": {"ttlSecondsAfterFinish": 1}}, "'ttlSecondsAfterFinish' was unexpected"),
        ({}, {"runPolicy": {"cleanPodPolicy": "Some"}}, "'Some' is not one of"),
        ({"restartPolicy": "Sometimes"}, {}, "'Sometimes' is not one of"),
        ({"replicas": "one"}, {}, "'one' is not of type"),
        ({"replicas": 2}, {}, "Master.replicas: must be 1"),
        ({"template": {"spec": {"containers": [], "nodeSelectors": {}}}}, {}, "nodeSelectors"),
        ({"template": {"spec": {"containers": [{"name": "main", "image": "i"}]}}}, {}, "with name pytorch"),
        ({"template": {"spec": {"containers": [{"name": "pytorch"}]}}}, {}, "no image"),
        (
            {"template": {"spec": {"containers": [{"name": "pytorch", "env": [{"name": "A", "value": 1}]}]}}},
            {},
            "1 is not of type 'string'",
        ),
    ],
)
def test_job_that_a_server_refuses_is_refused_with_the_field(replica, spec, problem):
    assert job_problems(pytorch_job("true")) == []
    job = pytorch_job("true", **spec)
    job["spec"]["pytorchReplicaSpecs"]["Master"] |= replica
    (told,) = job_problems(job)
    assert problem in told


@pytest.mark.parametrize(("name", "problem"), [("7job", "DNS-1035"), ("j" * 55, "over 63 characters")])
def test_name_that_no_pod_could_bear_is_refused(name, problem):
    (told,) = job_problems(pytorch_job("true") | {"metadata": {"name": name}})
    assert problem in told


@pytest.mark.parametrize(
    "metadata",
    [
        {"labels": {"run": "a b"}},
        {"labels": {"-": "a"}},
        {"annotations": {"a": 1}},
        {"ownerReferences": [{"uid": "u"}]},
    ],
)
def test_metadata_that_no_server_takes_is_refused(metadata):
    assert metadata_problems({"name": "job"} | metadata)


@cluster_test
def test_pods_have_the_operators_names_labels_and_environment(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET_OF_THE_TEST", "1")
    script = f"env > {tmp_path}/env-$RANK"
    cluster.add("pytorchjobs", pytorch_job(f"{script}; {SLEEP}", f"{script}; {SLEEP}", nprocPerNode="4"))
    cluster.wait_until(lambda: all((tmp_path / f"env-{rank}").exists() for rank in (0, 1)))
    master, worker = cluster.pods()
    (job,) = cluster.jobs()
    labels = {"job-name": "job", "operator-name": "pytorchjob-controller", "replica-index": "0"}
    labels = {f"training.kubeflow.org/{name}": value for name, value in labels.items()}
    role, kind = "training.kubeflow.org/job-role", "training.kubeflow.org/replica-type"
    for pod, name, more in (
        (master, "job-master-0", {role: "master", kind: "master"}),
        (worker, "job-worker-0", {kind: "worker"}),
    ):
        assert pod["metadata"]["name"] == name
        assert pod["metadata"]["labels"] == labels | more
        assert pod["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
        assert pod["spec"]["restartPolicy"] == "Never"
        values = {one["name"]: one["value"] for one in pod["spec"]["containers"][0]["env"]}
        rank = str(int(pod is worker))
        assert values == {
            "MASTER_ADDR": "job-master-0",
            "MASTER_PORT": "23456",
            "WORLD_SIZE": "8",
            "RANK": rank,
            "PYTHONUNBUFFERED": "1",
            "PET_MASTER_ADDR": "job-master-0",
            "PET_MASTER_PORT": "23456",
            "PET_NNODES": "2",
            "PET_NPROC_PER_NODE": "4",
            "PET_NODE_RANK": rank,
        }
        assert "A_SECRET_OF_THE_TEST" not in (tmp_path / f"env-{rank}").read_text()


@cluster_test
def test_masters_success_ends_the_job_and_the_workers_that_still_run(cluster):
    cluster.add("pytorchjobs", pytorch_job("sleep 0.2", SLEEP, runPolicy={"cleanPodPolicy": "Running"}))
    wait_for(cluster, "Succeeded")
    assert conditions(cluster) == {"Created": "True", "Running": "False", "Succeeded": "True"}
    cluster.wait_until(lambda: [pod["metadata"]["name"] for pod in cluster.pods()] == ["job-master-0"])
    assert cluster.processes() == []


@cluster_test
def test_program_error_fails_the_job_with_the_last_lines_in_the_pods_status(cluster):
    job = pytorch_job(
        "seq 100; echo why >&2; exit 127", container={"terminationMessagePolicy": "FallbackToLogsOnError"}
    )
    cluster.add("pytorchjobs", job)
    wait_for(cluster, "Failed")
    ended = state_of_master(cluster)["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (127, "Error")
    assert ended["message"].splitlines() == [str(number) for number in range(22, 101)] + ["why"]


@cluster_test
def test_signal_has_the_pod_recreated_and_restarting_takes_the_place_of_running(cluster):
    cluster.add("pytorchjobs", pytorch_job(SLEEP))
    wait_for(cluster, "Running")
    (first,) = cluster.pods()
    cluster.never_schedule()  # the new pod stays away, so that the state can be seen
    cluster.kill_pod("job-master-0")
    wait_for(cluster, "Restarting")
    assert conditions(cluster) == {"Created": "True", "Restarting": "True"}
    assert "Pod: kubeflow-user.job-master-0 exited with code 137" in [one["message"] for one in cluster.events()]
    cluster.recover()
    wait_for(cluster, "Running")
    assert cluster.pods()[0]["metadata"]["uid"] != first["metadata"]["uid"]


@cluster_test
@pytest.mark.parametrize(("code", "condition"), [(0, "Succeeded"), (1, "Failed"), (143, "Running")])
def test_drained_pod_is_judged_by_its_exit_code(code, condition, cluster, tmp_path):
    ready = tmp_path / "ready"
    cluster.add("pytorchjobs", pytorch_job(SLOW_TO_STOP.format(code=code, ready=ready)))
    cluster.wait_until(ready.exists)
    (first,) = cluster.pods()
    cluster.delete_pod("job-master-0")
    cluster.wait_until(lambda: first["metadata"]["uid"] not in [pod["metadata"]["uid"] for pod in cluster.pods()])
    wait_for(cluster, condition)
    assert len(cluster.pods()) == (condition == "Running")


@cluster_test
def test_deletion_in_the_foreground_shows_the_job_until_its_processes_are_gone(cluster, tmp_path):
    """SIGTERM is for the main process only; all are killed after the grace period."""
    child = f"trap 'touch {tmp_path}/child-was-told' TERM; touch {tmp_path}/ready; while true; do sleep 0.05; done"
    main = f"sh -c \"{child}\" & trap 'touch {tmp_path}/main-was-told' TERM; while true; do sleep 0.05; done"
    cluster.add("pytorchjobs", pytorch_job(main))
    cluster.wait_until((tmp_path / "ready").exists)
    cluster.delete("pytorchjobs", "job", propagation="Foreground")
    began = time.monotonic()
    while jobs := cluster.jobs():
        assert "deletionTimestamp" in jobs[0]["metadata"]
    assert 1.9 < time.monotonic() - began < 4  # the grace period is 2 s
    assert cluster.pods() == []
    assert cluster.processes() == []
    assert (tmp_path / "main-was-told").exists()
    assert not (tmp_path / "child-was-told").exists()


@cluster_test
def test_deletion_in_the_background_leaves_pods_for_which_those_of_a_new_job_wait(cluster, tmp_path):
    ready = tmp_path / "ready"
    cluster.add("pytorchjobs", pytorch_job(SLOW_TO_STOP.format(code=0, ready=ready)))
    cluster.wait_until(ready.exists)
    (old,) = cluster.pods()
    cluster.delete("pytorchjobs", "job")
    assert cluster.jobs() == []
    cluster.add("pytorchjobs", pytorch_job(SLEEP))
    time.sleep(0.1)
    assert [pod["metadata"]["uid"] for pod in cluster.pods()] == [old["metadata"]["uid"]]
    wait_for(cluster, "Running")


@cluster_test
def test_job_in_a_queue_is_suspended_until_it_is_admitted(cluster):
    job = pytorch_job(SLEEP)
    job["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "gpus"}
    cluster.add("pytorchjobs", job)
    wait_for(cluster, "Suspended")
    assert cluster.pods() == []
    cluster.admit("job")
    wait_for(cluster, "Running")
    assert conditions(cluster)["Suspended"] == "False"


@cluster_test
def test_leaving_the_cluster_kills_every_process(tmp_path: Path):
    with Cluster(tmp_path) as cluster:
        cluster.add("pytorchjobs", pytorch_job("trap '' TERM; setsid sleep 60 & sleep 60"))
        cluster.wait_until(lambda: len(cluster.processes()) == 3)
    assert cluster.processes() == []
