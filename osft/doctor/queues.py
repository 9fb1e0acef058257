"""Whether the queue that admits the training job exists and admits: Kueue's, or a gang scheduler's."""

from collections.abc import Iterator
from typing import Any

from osft.doctor.cluster_view import ClusterView
from osft.doctor.finding import Finding, NotChecked, error, not_checked, ok
from osft.doctor.subject import Subject
from osft.kubernetes.settings import JobSettings

_KUEUE = "kueue.x-k8s.io"
_VERSIONS = ("v1beta2", "v1beta1")
"""Of Kueue's API, the newest that the manifests are written for first."""
_GANG_SCHEDULERS = {"scheduling.volcano.sh": "Volcano", "scheduling.x-k8s.io": "scheduler-plugins"}


def check_queue(subject: Subject) -> Iterator[Finding]:
    """Does the LocalQueue of Kueue exist, and is it active? Does its ClusterQueue have what the job asks for?"""
    configuration, cluster = subject.job_wanted(), subject.job_cluster
    job = configuration.job
    if not job.kueue_queue:
        yield ok("Kueue", "the job names no queue of Kueue's")
        return
    about = f"LocalQueue {job.kueue_queue}"
    served = cluster.served(_KUEUE)
    version = next((one for one in _VERSIONS if "localqueues" in served.get(one, set())), None)
    if version is None:
        remedy = "Install Kueue, or take kueue_queue out of the settings of the job"
        yield error(about, "the cluster serves no LocalQueues: Kueue is not installed", remedy)
        return
    api = f"{_KUEUE}/{version}"
    queue = cluster.get(cluster.path("localqueues", job.kueue_queue, api=api))
    if queue is None:
        there = [one["metadata"]["name"] for one in cluster.items(cluster.path("localqueues", api=api))]
        remedy = (
            f"Set kueue_queue of the job to one of: {', '.join(there)}"
            if there
            else "kubectl apply -k pipelines/continual_learning/manifests/overlays/kueue"
        )
        yield error(about, f"does not exist in namespace {cluster.namespace}: the job would stay suspended", remedy)
        return
    inactive = _inactive(queue)
    if inactive:
        remedy = (
            f"See why: kubectl describe localqueue {job.kueue_queue}, and clusterqueue {queue['spec']['clusterQueue']}"
        )
        yield error(about, f"admits nothing: {inactive}", remedy)
    else:
        yield ok(about, f"is active ({api}), {queue.get('status', {}).get('pendingWorkloads', 0)} workloads wait in it")
    yield _cluster_queue(cluster, api, str(queue["spec"]["clusterQueue"]), job)


def _cluster_queue(cluster: ClusterView, api: str, name: str, job: JobSettings) -> Finding:
    about = f"ClusterQueue {name}"
    try:
        queue = cluster.get(cluster.path("clusterqueues", name, api=api, namespaced=False))
    except NotChecked as reason:
        return not_checked(about, str(reason))
    if queue is None:
        return error(about, "does not exist", "Have the administrator apply manifests/overlays/kueue/queues.yaml")
    if inactive := _inactive(queue):
        return error(about, f"admits nothing: {inactive}", f"See why: kubectl describe clusterqueue {name}")
    covered = {one for group in queue["spec"].get("resourceGroups", []) for one in group.get("coveredResources", [])}
    wanted = {"cpu", "memory"} | ({job.gpu_resource} if job.gpus else set())
    if lacking := sorted(wanted - covered):
        text = f"has no quota of {', '.join(lacking)}, which the job asks for: it would never be admitted"
        return error(about, text, f"Add {', '.join(lacking)} to its resourceGroups")
    return ok(about, f"is active and has quotas of {', '.join(sorted(wanted))}")


def _inactive(queue: dict[str, Any]) -> str:
    """Why a queue admits nothing; "" if it does."""
    if queue["spec"].get("stopPolicy", "None") != "None":
        return f"its stopPolicy is {queue['spec']['stopPolicy']}"
    for condition in queue.get("status", {}).get("conditions", []):
        if condition["type"] == "Active" and condition["status"] != "True":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}"
    return ""


def check_gang_scheduler(subject: Subject) -> Iterator[Finding]:
    """Is the gang scheduler there that the job asks for?"""
    configuration, cluster = subject.job_wanted(), subject.cluster
    job = configuration.job
    if not (job.gang_scheduling or job.gang_queue):
        yield ok("gang scheduler", "the job asks for none")
        return
    there = [
        name for group, name in _GANG_SCHEDULERS.items() if "podgroups" in set().union(*cluster.served(group).values())
    ]
    if there:
        yield ok("gang scheduler", f"{' and '.join(there)} is there")
    else:
        remedy = "Install Volcano or scheduler-plugins and tell the operator of it, or set gang_scheduling: false"
        yield error(
            "gang scheduler", "the cluster serves no PodGroups: the job's pods would never be scheduled", remedy
        )
