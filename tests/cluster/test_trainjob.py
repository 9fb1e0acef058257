"""What only a TrainJob's life has: a runtime of its own, JobSets that cannot be made, restarts of all pods together."""

import re

import pytest

from osft.kubernetes.training_job import KINDS
from osft.training.job import Phase
from tests.cluster.launched import NAME, assert_nothing_left, assert_only_job

pytestmark = pytest.mark.cluster


@pytest.fixture
def kind():
    return next(kind for kind in KINDS if kind.launcher == "trainjob")


def runtimes(cluster):
    with cluster.store.lock:
        return [found["metadata"]["name"] for found in cluster.store.objects("trainingruntimes")]


def test_step_brings_its_runtime_once(cluster, launch):
    launch().run()
    first = runtimes(cluster)
    cluster.delete("trainjobs", NAME)
    launch("echo again").run()
    assert runtimes(cluster) == first
    assert_only_job(cluster, "Succeeded")


def test_runtime_that_another_step_makes_at_the_same_time_is_taken(cluster, launch):
    running = launch()
    runtime = running.runtime
    cluster.add("trainingruntimes", runtime)
    cluster.refuse(404, "get", "trainingruntimes", message="not found", details=runtime["metadata"]["name"])
    running.run()
    assert runtimes(cluster) == [runtime["metadata"]["name"]]


def test_jobset_that_cannot_be_made_is_told_with_its_reason(cluster, launch):
    """The dash in the rule's name is refused when the JobSet is made, not before: no condition tells it."""
    running = launch("sleep 60", max_queued_minutes=0.03)
    (rule,) = running.runtime["spec"]["template"]["spec"]["failurePolicy"]["rules"]
    rule["name"] = "program-error"
    with pytest.raises(RuntimeError, match=r"max_queued_minutes.*TrainJobResourcesCreationFailed.*program-error"):
        running.run()
    assert_nothing_left(cluster)


def test_older_kubeflow_trainer_is_refused_with_the_version_that_is_needed(cluster, launch):
    cluster.api.older_trainer = True
    with pytest.raises(ValueError, match=r"unknown field .*runtimePatches.*Kubeflow Trainer 2.2 or newer is needed"):
        launch().run()
    assert cluster.jobs() == []


def test_object_that_a_webhook_denies_is_no_lack_of_rights(cluster, launch):
    running = launch()
    running.manifest["spec"]["trainer"]["env"].append({"name": "PET_NNODES", "value": "3"})
    with pytest.raises(ValueError, match=r"refused the TrainJob \(403\).*PET_NNODES is reserved"):
        running.run()
    assert cluster.jobs() == []


def test_one_killed_pod_restarts_all_with_new_pods_and_counts_once(cluster, launch):
    running = launch("exec sleep 60")
    running.launcher.submit()
    running.status(lambda status: status.phase is Phase.RUNNING)
    before = {pod["metadata"]["uid"] for pod in cluster.pods()}
    cluster.kill_pod(min(pod["metadata"]["name"] for pod in cluster.pods()))
    running.status(lambda status: "exit code 137" in status.failure)
    again = running.status(lambda status: status.restarts and status.phase is Phase.RUNNING)
    assert again.restarts == 1
    assert launch("exec sleep 60").launcher.status().restarts == 1, "a retried step counts on"
    assert before.isdisjoint(pod["metadata"]["uid"] for pod in cluster.pods())
    running.launcher.cancel()
    assert_nothing_left(cluster)


def test_node_that_only_lost_its_peer_is_replaced_and_counts_as_a_restart(cluster, launch, tmp_path):
    script = f"if [ $PET_NODE_RANK = 1 ] && mkdir {tmp_path}/was-here; then exit 141; fi; sleep 2; echo done"
    running = launch(script)
    running.launcher.submit()
    assert running.status(lambda status: status.restarts).restarts == 1
    attempts = {pod["metadata"]["labels"]["jobset.sigs.k8s.io/restart-attempt"] for pod in cluster.pods()}
    assert attempts == {"0"}
    assert "done" in running.run()
    assert_only_job(cluster, "Succeeded")


def test_pods_have_the_names_and_labels_of_jobset(cluster, launch):
    launch("exec sleep 60").launcher.submit()
    cluster.wait_until(lambda: len(cluster.pods()) == 2)
    for rank, pod in enumerate(sorted(cluster.pods(), key=lambda pod: pod["metadata"]["name"])):
        labels = pod["metadata"]["labels"]
        assert re.fullmatch(rf"{NAME}-node-0-{rank}-\w{{5}}", pod["metadata"]["name"])
        assert labels["jobset.sigs.k8s.io/jobset-name"] == NAME
        assert labels["jobset.sigs.k8s.io/restart-attempt"] == "0"
        assert labels["batch.kubernetes.io/job-name"] == f"{NAME}-node-0"
        assert labels["batch.kubernetes.io/job-completion-index"] == str(rank)
    cluster.wait_until(lambda: [counts["active"] for counts in cluster.jobs()[0]["status"]["jobsStatus"]] == [1])
    assert "conditions" not in cluster.jobs()[0]["status"], "none says that it runs"


def test_namespace_that_is_restricted_admits_every_node(cluster, launch):
    """There is no init container."""
    cluster.restrict()
    launch().run()
    assert_only_job(cluster, "Succeeded")


def test_pods_find_one_another_by_what_torchrun_reads(cluster, launch, tmp_path):
    """Unlike a PyTorchJob's they have no RANK, WORLD_SIZE or MASTER_ADDR."""
    launch(f"env > {tmp_path}/env-$PET_NODE_RANK", num_procs_per_worker=4).run()
    for rank in ("0", "1"):
        values = dict(line.split("=", 1) for line in (tmp_path / f"env-{rank}").read_text().splitlines())
        assert (values["PET_NNODES"], values["PET_NPROC_PER_NODE"], values["PET_NODE_RANK"]) == ("2", "4", rank)
        assert values["JOB_COMPLETION_INDEX"] == rank
        assert values.keys().isdisjoint({"RANK", "WORLD_SIZE", "MASTER_ADDR"})
