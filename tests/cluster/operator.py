"""The training operator of the stand-in: PyTorchJobs to pods, and the fate of pods to conditions (kubeflow v1.9).

It does what a job of osft has it do: restart policy ExitCode, a Master, clean-up of pods that still run. Left out:
services, gang scheduling, elastic jobs, times to live and deadlines.
"""

import copy
from typing import Any

import yaml

from tests.cluster.environment import operator_environment
from tests.cluster.installation import refuse_unrestricted
from tests.cluster.kubelet import INIT_CONTAINER
from tests.cluster.store import ApiError, Object, Store, timestamp

LABEL = "training.kubeflow.org/"
RETRYABLE_FROM = 128
INIT_TEMPLATE = f"""
- name: {INIT_CONTAINER}
  image: {{{{.InitContainerImage}}}}
  command: [sh, -c, "for i in $(seq {{{{.MaxTries}}}}); do nslookup {{{{.MasterAddr}}}} && exit; sleep 2; done; exit 1"]
"""
EXCEEDED_QUOTA = (
    "exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=8, "
    "limited: requests.nvidia.com/gpu=8"
)


class Operator:
    """Reconcile every job of the store on each `sync()`."""

    def __init__(self, store: Store) -> None:
        self.quota_exceeded = False
        """Whether pods cannot be made."""
        self.restricted = False
        """Whether the namespace enforces PodSecurity "restricted"."""
        self.init_container = INIT_TEMPLATE
        """The template of what Workers get, which --pytorch-init-container-template-file replaces."""
        self._store = store

    def sync(self) -> None:
        for job in self._store.objects("pytorchjobs"):
            if "deletionTimestamp" not in job["metadata"]:
                self._reconcile(job)

    def _reconcile(self, job: Object) -> None:
        if "status" not in job:
            _set_condition(job, "Created")
        if is_true(job, "Succeeded") or is_true(job, "Failed"):
            self._clean_up(job)
        elif job["spec"]["runPolicy"]["suspend"]:
            for pod in self._store.owned_by(job):
                self._delete(pod)
            if is_true(job, "Running"):
                _set_condition(job, "Running", value=False)
            _set_condition(job, "Suspended")
        else:
            if is_true(job, "Suspended"):
                _set_condition(job, "Suspended", value=False)
            self._reconcile_pods(job)

    def _clean_up(self, job: Object) -> None:
        for pod in self._store.owned_by(job):
            if job["spec"]["runPolicy"].get("cleanPodPolicy") == "Running" and not _phase_is(
                pod, "Succeeded", "Failed"
            ):
                self._delete(pod)

    def _reconcile_pods(self, job: Object) -> None:
        present = {pod["metadata"]["name"]: pod for pod in self._store.owned_by(job)}
        for replica, spec in job["spec"]["pytorchReplicaSpecs"].items():
            for index in range(spec.get("replicas", 1)):
                pod = present.get(f"{job['metadata']['name']}-{replica.lower()}-{index}")
                if pod is None:
                    self._create_pod(job, replica, spec, index)
                elif _phase_is(pod, "Failed"):
                    self._judge(job, replica, pod)
        master = present.get(f"{job['metadata']['name']}-master-0")
        if master is not None and _phase_is(master, "Running") and "deletionTimestamp" not in master["metadata"]:
            _set_condition(job, "Running")
        elif master is not None and _phase_is(master, "Succeeded"):
            _set_condition(job, "Succeeded")

    def _judge(self, job: Object, replica: str, pod: Object) -> None:
        """What a failed pod means: a new one after a signal or without an exit code, else the job's end."""
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        exit_code = None
        for container in pod["status"].get("containerStatuses") or []:
            exit_code = container["state"]["terminated"]["exitCode"]
            self._store.record(job, "ExitedWithCode", f"Pod: {namespace}.{name} exited with code {exit_code}")
        if exit_code is not None and exit_code < RETRYABLE_FROM:
            message = f'job "{job["metadata"]["name"]}" is failing because "{replica}" replica(s) failed.'
            self._store.record(job, "PyTorchJobFailed", message, warning=True)
            _set_condition(job, "Failed", message)
        else:
            self._delete(pod)
            message = f"job {job['metadata']['name']} is restarting because {replica} replica(s) failed."
            self._store.record(job, "PyTorchJobRestarting", message, warning=True)
            _set_condition(job, "Restarting", message)

    def _create_pod(self, job: Object, replica: str, spec: dict[str, Any], index: int) -> None:
        pod = _pod(job, replica, spec, index, self.init_container)
        try:
            if self.quota_exceeded:
                raise ApiError(403, f'pods "{pod["metadata"]["name"]}" is forbidden: {EXCEEDED_QUOTA}')
            if self.restricted:
                refuse_unrestricted(pod)
            self._store.create("pods", pod)
        except ApiError as error:
            if error.status != 409:  # the pod of the job that had this name before is still being stopped
                self._store.record(job, "FailedCreatePod", f"Error creating: {error}", warning=True)

    def _delete(self, pod: Object) -> None:
        if "deletionTimestamp" not in pod["metadata"]:
            self._store.delete(pod)


def _pod(job: Object, replica: str, spec: dict[str, Any], index: int, init_container: str) -> Object:
    template, metadata = copy.deepcopy(spec["template"]), job["metadata"]
    labels = {
        f"{LABEL}job-name": metadata["name"],
        f"{LABEL}operator-name": "pytorchjob-controller",
        f"{LABEL}replica-type": replica.lower(),
        f"{LABEL}replica-index": str(index),
    }
    if replica == "Master":
        labels[f"{LABEL}job-role"] = "master"
    given, pod_spec = template.get("metadata") or {}, template["spec"]
    pod_spec["restartPolicy"] = "Never"  # of ExitCode
    for container in pod_spec["containers"]:
        container["env"] = (container.get("env") or []) + operator_environment(job, replica, index)
    if replica == "Worker":
        given_to_template = {
            "MasterAddr": f"{metadata['name']}-master-0",
            "InitContainerImage": "alpine:3.10",
            "MaxTries": "100",
        }
        for name, value in given_to_template.items():
            init_container = init_container.replace(f"{{{{.{name}}}}}", value)
        pod_spec.setdefault("initContainers", []).extend(yaml.safe_load(init_container))
    owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": metadata["name"], "uid": metadata["uid"]}
    return {
        "metadata": {
            "name": f"{metadata['name']}-{replica.lower()}-{index}",
            "labels": (given.get("labels") or {}) | labels,
            "annotations": given.get("annotations") or {},
            "ownerReferences": [owner | {"controller": True, "blockOwnerDeletion": True}],
        },
        "spec": pod_spec,
    }


def _phase_is(pod: Object, *phases: str) -> bool:
    return pod.get("status", {}).get("phase") in phases


def is_true(job: Object, kind: str) -> bool:
    conditions = job.get("status", {}).get("conditions") or []
    return any(found["type"] == kind and found["status"] == "True" for found in conditions)


def _set_condition(job: Object, kind: str, message: str = "", *, value: bool = True) -> None:
    """Running and Restarting replace each other; Succeeded and Failed make Running false; Failed is the last word."""
    conditions = job.setdefault("status", {}).setdefault("conditions", [])
    status = "True" if value else "False"
    if is_true(job, "Failed") or any((old["type"], old["status"]) == (kind, status) for old in conditions):
        return
    kept = [old for old in conditions if old["type"] != kind and {old["type"], kind} != {"Running", "Restarting"}]
    if kind in ("Succeeded", "Failed"):
        kept = [old | {"status": "False"} if old["type"] == "Running" else old for old in kept]
    new = {"type": kind, "status": status, "message": message, "lastTransitionTime": timestamp()}
    job["status"]["conditions"] = [*kept, new]
