"""Kubeflow Trainer of the stand-in: TrainJobs to JobSets, and the fate of those to conditions (v2.3).

It does what a job of osft has it do: a namespaced runtime with one replicated job `node`, patches, suspension. Left
out: services, cluster runtimes, deadlines, the snapshot as an object of its own.
"""

import copy
from typing import Any

from tests.cluster.store import ApiError, Object, Store, timestamp

MASTER_PORT = "29500"
RESERVED = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
INDEX = "batch.kubernetes.io/job-completion-index"
PATCHED_SPEC = (
    "affinity",
    "imagePullSecrets",
    "nodeSelector",
    "securityContext",
    "serviceAccountName",
    "terminationGracePeriodSeconds",
    "tolerations",
    "volumes",
)


class Trainer:
    """Reconcile every TrainJob of the store on each `sync()`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._snapshots: dict[str, Object] = {}  # of the runtimes, by the job's uid: later edits do not reach it

    def sync(self) -> None:
        for job in self._store.objects("trainjobs"):
            if "deletionTimestamp" not in job["metadata"] and not is_true(job, "Complete", "Failed"):
                self._reconcile(job)

    def _reconcile(self, job: Object) -> None:
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        if uid not in self._snapshots:
            runtime = self._store.get("trainingruntimes", job["spec"]["runtimeRef"]["name"])
            self._snapshots[uid] = copy.deepcopy(runtime)
        jobset = self._store.find("jobsets", name)
        if jobset is None:
            try:
                jobset = self._store.create("jobsets", jobset_of(job, self._snapshots[uid]))
            except ApiError as error:
                message = f"Failed to create resources: {error}"
                self._store.record(job, "TrainJobResourcesCreationFailed", message, warning=True)
                return
        if jobset["metadata"]["ownerReferences"][0]["uid"] != uid:
            return  # of the job that had this name before
        suspended = job["spec"]["suspend"]
        jobset["spec"]["suspend"] = suspended
        if suspended:
            set_condition(job, "Suspended", reason="Suspended")
        elif is_true(job, "Suspended"):
            set_condition(job, "Suspended", value=False, reason="Resumed")
        status = job.setdefault("status", {})
        status["jobsStatus"] = copy.deepcopy(jobset.get("status", {}).get("replicatedJobsStatus", []))
        for kind, ours in (("Completed", "Complete"), ("Failed", "Failed")):
            for found in jobset.get("status", {}).get("conditions", []):
                if found["type"] == kind and found["status"] == "True":
                    set_condition(job, ours, found["message"], reason=found["reason"])


def admission_problem(job: Object, store: Store) -> str:
    """What the webhook denies of a TrainJob."""
    reference = job["spec"]["runtimeRef"]
    if reference.get("kind") != "TrainingRuntime" or store.find("trainingruntimes", reference["name"]) is None:
        return f"spec.runtimeRef: {reference['name']} not found: specified training runtime must be created before"
    for entry in job["spec"].get("trainer", {}).get("env", []):
        if entry["name"] in RESERVED:
            return f"spec.trainer.env: {entry['name']} is reserved"
    for patch in job["spec"].get("runtimePatches", []):
        if "/" not in patch["manager"]:
            return f"spec.runtimePatches: {patch['manager']} must be a domain-prefixed path"
        for container in _patched_pod(patch).get("spec", {}).get("containers", []):
            if "env" in container:
                return "spec.runtimePatches: env of the container node must be in spec.trainer.env"
    return ""


def _patched_pod(patch: Object) -> Object:
    """The pod template of the replicated job `node` in a patch."""
    spec = patch.get("trainingRuntimeSpec", {}).get("template", {}).get("spec", {})
    (node,) = (one for one in spec.get("replicatedJobs", [{"name": "node"}]) if one["name"] == "node")
    found: Object = node.get("template", {}).get("spec", {}).get("template", {})
    return found


def jobset_of(job: Object, runtime: Object) -> Object:
    name, trainer = job["metadata"]["name"], job["spec"].get("trainer", {})
    spec = copy.deepcopy(runtime["spec"]["template"]["spec"])
    labels = dict(runtime["spec"]["template"].get("metadata", {}).get("labels", {}))
    (node,) = spec["replicatedJobs"]
    job_spec = node["template"]["spec"]
    pod = job_spec["template"]
    (container,) = (one for one in pod["spec"]["containers"] if one["name"] == "node")
    nodes = trainer.get("numNodes", runtime["spec"]["mlPolicy"]["numNodes"])
    for field in ("image", "command", "args", "env"):
        if field in trainer:
            container[field] = copy.deepcopy(trainer[field])
    if "resourcesPerNode" in trainer:
        container["resources"] = copy.deepcopy(trainer["resourcesPerNode"])
    for patch in job["spec"].get("runtimePatches", []):
        labels |= patch.get("trainingRuntimeSpec", {}).get("template", {}).get("metadata", {}).get("labels", {})
        _apply(pod, _patched_pod(patch))
    environment: dict[str, Any] = {
        "PET_NNODES": str(nodes),
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_NODE_RANK": {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}},
        "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
        "PET_MASTER_PORT": MASTER_PORT,
    }
    container["env"] = container.get("env", []) + [
        {"name": key, "value": value} if isinstance(value, str) else {"name": key, "valueFrom": value}
        for key, value in environment.items()
    ]
    node["replicas"] = 1
    job_spec |= {"parallelism": nodes, "completions": nodes, "completionMode": "Indexed"}
    metadata = {"name": name, "labels": labels, "ownerReferences": [owner_of(job)]}
    return {"metadata": metadata, "spec": spec | {"suspend": job["spec"]["suspend"]}}


def _apply(pod: Object, patch: Object) -> None:
    """A strategic merge, as far as it is used."""
    for field in ("labels", "annotations"):
        given = patch.get("metadata", {}).get(field, {})
        pod.setdefault("metadata", {}).setdefault(field, {}).update(given)
    for field in PATCHED_SPEC:
        if field in patch.get("spec", {}):
            pod["spec"][field] = copy.deepcopy(patch["spec"][field])
    for patched in patch.get("spec", {}).get("containers", []):
        (container,) = (one for one in pod["spec"]["containers"] if one["name"] == patched["name"])
        container |= copy.deepcopy(patched)


def owner_of(found: Object) -> Object:
    """A reference to the controller `found`."""
    reference = {key: found[key] for key in ("apiVersion", "kind")}
    reference |= {"name": found["metadata"]["name"], "uid": found["metadata"]["uid"]}
    return reference | {"controller": True, "blockOwnerDeletion": True}


def is_true(found: Object, *kinds: str) -> bool:
    conditions = found.get("status", {}).get("conditions", [])
    return any(one["type"] in kinds and one["status"] == "True" for one in conditions)


def set_condition(found: Object, kind: str, message: str = "", *, value: bool = True, reason: str) -> None:
    """Its time is that of the last change."""
    conditions = found.setdefault("status", {}).setdefault("conditions", [])
    status = "True" if value else "False"
    if any((old["type"], old["status"]) == (kind, status) for old in conditions):
        return
    new = {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": timestamp()}
    found["status"]["conditions"] = [*(old for old in conditions if old["type"] != kind), new]
