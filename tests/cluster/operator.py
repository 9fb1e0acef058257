"""The training operator of the stand-in: PyTorchJobs to pods, and the fate of pods to conditions (kubeflow v1.9).

Left out: services, gang scheduling, horizontal scaling, and the operator's metrics.
"""

import copy
import json
import time
from typing import Any

from tests.cluster.environment import operator_environment
from tests.cluster.errors import ApiError
from tests.cluster.event_recorder import EventRecorder
from tests.cluster.faults import Faults
from tests.cluster.job_status import KIND, count_pods, is_finished, is_true, set_condition
from tests.cluster.kubelet import INIT_CONTAINER
from tests.cluster.schema import CONTAINER, PORT, PORT_NAME
from tests.cluster.store import Object, Store
from tests.cluster.timestamps import parse_seconds, seconds_text

LABEL = "training.kubeflow.org/"
NO_EXIT_CODE = 0xBEEF  # what the operator takes for the code of a pod that has none: it is worth a new try
RETRYABLE_FROM = 128


class Operator:
    """Reconcile every job of the store on each `sync()`; `active` False stands for an operator that is down."""

    def __init__(self, store: Store, faults: Faults) -> None:
        self.active = True
        self._store, self._faults = store, faults
        self._events = EventRecorder(store, "pytorchjob-controller")

    def sync(self) -> None:
        for job in self._store.objects("pytorchjobs"):
            if "deletionTimestamp" in job["metadata"]:
                continue
            before = json.dumps(job.get("status"))
            self._reconcile(job)
            # The job may have been deleted by its time to live.
            present = self._store.find("pytorchjobs", job["metadata"]["namespace"], job["metadata"]["name"])
            if present is job and json.dumps(job.get("status")) != before:
                self._store.changed(job)

    def pods(self, job: Object) -> list[Object]:
        uid = job["metadata"]["uid"]
        return [
            pod
            for pod in self._store.objects("pods", job["metadata"]["namespace"])
            if any(
                owner["uid"] == uid and owner.get("controller")
                for owner in pod["metadata"].get("ownerReferences") or []
            )
        ]

    def _reconcile(self, job: Object) -> None:
        name, policy, pods = job["metadata"]["name"], job["spec"].get("runPolicy") or {}, self.pods(job)
        if "status" not in job:
            set_condition(job, "Created", f"PyTorchJob {name} is created.")
        if is_finished(job):
            self._clean_up(job, policy, pods)
        elif policy.get("suspend"):
            self._suspend(job, pods)
        else:
            if is_true(job, "Suspended"):
                message = f"PyTorchJob {name} is resumed."
                set_condition(job, "Suspended", message, value=False, reason="Resumed")
                job["status"]["startTime"] = seconds_text()
                self._events.record(job, f"{KIND}Resumed", message)
            failure = self._exceeded_limit(job, policy, pods)
            if failure:
                job["status"].setdefault("completionTime", seconds_text())
                for pod in pods:
                    self._delete(job, pod)
                self._events.record(job, f"{KIND}Failed", failure)
                set_condition(job, "Failed", failure)
            else:
                self._reconcile_replicas(job)

    def _clean_up(self, job: Object, policy: dict[str, Any], pods: list[Object]) -> None:
        clean = policy.get("cleanPodPolicy", "None")
        for pod in pods:
            unfinished = pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")
            if clean == "All" or (clean == "Running" and unfinished):
                self._delete(job, pod)
        if is_true(job, "Succeeded"):
            for counts in job["status"].get("replicaStatuses", {}).values():
                active = counts.pop("active", 0)
                if active:
                    counts["succeeded"] = counts.get("succeeded", 0) + active
        # A job that failed by an exit code has no completion time: the operator never deletes it then.
        keep_seconds, completed = policy.get("ttlSecondsAfterFinished"), job["status"].get("completionTime")
        if keep_seconds is not None and completed and time.time() > parse_seconds(completed) + keep_seconds:
            self._store.delete(job)

    def _suspend(self, job: Object, pods: list[Object]) -> None:
        for pod in pods:
            self._delete(job, pod)
        for counts in job["status"].get("replicaStatuses", {}).values():
            counts.pop("active", None)
        message = f"PyTorchJob {job['metadata']['name']} is suspended."
        if is_true(job, "Running"):
            set_condition(job, "Running", message, value=False, reason="Suspended")
        if not is_true(job, "Suspended"):
            set_condition(job, "Suspended", message)
            self._events.record(job, f"{KIND}Suspended", message)

    def _exceeded_limit(self, job: Object, policy: dict[str, Any], pods: list[Object]) -> str:
        """Why the job is to fail at once, empty if it is not."""
        name, limit, status = job["metadata"]["name"], policy.get("backoffLimit"), job["status"]
        if limit is not None:
            phases = [pod.get("status", {}).get("phase") for pod in pods]
            known = sum(counts.get("failed", 0) for counts in status.get("replicaStatuses", {}).values())
            active = sum(
                phase not in ("Succeeded", "Failed") and "deletionTimestamp" not in pod["metadata"]
                for pod, phase in zip(pods, phases, strict=True)
            )
            wanted = sum(spec.get("replicas", 1) for spec in job["spec"]["pytorchReplicaSpecs"].values())
            # The operator counts no tries of its own, so a pod that it would make anew is held to a limit of 0 only.
            new_failure = phases.count("Failed") > known and active != wanted and limit < 1
            restarts = sum(self._restarts(job, pod) for pod in pods)
            if new_failure or (restarts >= limit if limit else restarts > 0):
                return f"Job {name} has failed because it has reached the specified backoff limit"
        seconds, started = policy.get("activeDeadlineSeconds"), status.get("startTime")
        if seconds is not None and started and time.time() >= parse_seconds(started) + seconds:
            return f"Job {name} has failed because it was active longer than specified deadline"
        return ""

    def _restarts(self, job: Object, pod: Object) -> int:
        replica = pod["metadata"]["labels"][f"{LABEL}replica-type"].capitalize()
        if restart_policy(job, replica) == "Never" or pod.get("status", {}).get("phase") != "Running":
            return 0
        return sum(container["restartCount"] for container in pod["status"].get("containerStatuses") or [])

    def _reconcile_replicas(self, job: Object) -> None:
        status = job["status"]
        counts = {}
        for replica, spec in job["spec"]["pytorchReplicaSpecs"].items():
            pods = [
                pod for pod in self.pods(job) if pod["metadata"]["labels"][f"{LABEL}replica-type"] == replica.lower()
            ]
            present = {int(pod["metadata"]["labels"][f"{LABEL}replica-index"]): pod for pod in pods}
            for index in range(spec.get("replicas", 1)):
                if index not in present and not self._create_pod(job, replica, spec, index):
                    return
            for index, pod in present.items():
                if index >= spec.get("replicas", 1):
                    self._delete(job, pod)
                self._judge(job, replica, pod)
            counts[replica] = count_pods(job, replica, pods)
        status.setdefault("startTime", seconds_text())
        for replica, number in counts.items():
            self._conclude(job, replica, number)

    def _judge(self, job: Object, replica: str, pod: Object) -> None:
        """What a failed pod means, by the replica's restart policy."""
        if pod.get("status", {}).get("phase") != "Failed":
            return
        metadata, exit_code = job["metadata"], NO_EXIT_CODE
        for container in pod["status"].get("containerStatuses") or []:
            if container["name"] == CONTAINER and "terminated" in container["state"]:
                exit_code = container["state"]["terminated"]["exitCode"]
                message = f"Pod: {metadata['namespace']}.{pod['metadata']['name']} exited with code {exit_code}"
                self._events.record(job, "ExitedWithCode", message)
        policy = restart_policy(job, replica)
        if policy in ("OnFailure", "Always") or (policy == "ExitCode" and exit_code >= RETRYABLE_FROM):
            self._delete(job, pod)
            message = f"job {metadata['name']} is restarting because {replica} replica(s) failed."
            self._events.record(job, f"{KIND}Restarting", message, warning=True)
            set_condition(job, "Restarting", message)
        elif policy == "ExitCode":
            message = f'job "{metadata["name"]}" is failing because "{replica}" replica(s) failed.'
            self._events.record(job, f"{KIND}Failed", message, warning=True)
            set_condition(job, "Failed", message)

    def _conclude(self, job: Object, replica: str, counts: dict[str, int]) -> None:
        name, replicas = job["metadata"]["name"], job["spec"]["pytorchReplicaSpecs"]
        wanted = replicas[replica].get("replicas", 1)
        if replica == "Master" or "Master" not in replicas:
            if counts["active"]:
                set_condition(job, "Running", f"PyTorchJob {name} is running.")
            if counts["succeeded"] == wanted:
                message = f"PyTorchJob {name} is successfully completed."
                self._events.record(job, f"{KIND}Succeeded", message)
                job["status"].setdefault("completionTime", seconds_text())
                set_condition(job, "Succeeded", message)
                return
        if counts["failed"] and wanted > counts["succeeded"] + counts["active"]:
            number = counts["failed"]
            if restart_policy(job, replica) != "Never":
                message = f"PyTorchJob {name} is restarting because {number} {replica} replica(s) failed."
                set_condition(job, "Restarting", message)
            elif not is_true(job, "Failed"):
                message = f"PyTorchJob {name} is failed because {number} {replica} replica(s) failed."
                self._events.record(job, f"{KIND}Failed", message)
                job["status"].setdefault("completionTime", seconds_text())
                set_condition(job, "Failed", message)

    def _create_pod(self, job: Object, replica: str, spec: dict[str, Any], index: int) -> bool:
        pod = self._pod(job, replica, spec, index)
        name = pod["metadata"]["name"]
        try:
            if self._faults.quota_message:
                raise ApiError(403, f'pods "{name}" is forbidden: {self._faults.quota_message}')
            check_mounts(pod)
            self._store.create("pods", pod, job["metadata"]["namespace"])
        except ApiError as error:
            if error.reason != "AlreadyExists":  # the old pod of the name is still being stopped
                self._events.record(job, "FailedCreatePod", f"Error creating: {error.message}", warning=True)
            return False
        self._events.record(job, "SuccessfulCreatePod", f"Created pod: {name}")
        return True

    def _pod(self, job: Object, replica: str, spec: dict[str, Any], index: int) -> Object:
        template, metadata = copy.deepcopy(spec["template"]), job["metadata"]
        labels = {
            f"{LABEL}job-name": metadata["name"],
            f"{LABEL}operator-name": "pytorchjob-controller",
            f"{LABEL}replica-type": replica.lower(),
            f"{LABEL}replica-index": str(index),
        }
        if replica == "Master":
            labels[f"{LABEL}job-role"] = "master"
        given = template.get("metadata") or {}
        pod_spec = template["spec"]
        policy = restart_policy(job, replica)
        pod_spec["restartPolicy"] = "Never" if policy == "ExitCode" else policy
        for container in pod_spec["containers"]:
            container["env"] = (container.get("env") or []) + operator_environment(job, replica, index)
            ports = container.setdefault("ports", [])
            if container["name"] == CONTAINER and all(port.get("name") != PORT_NAME for port in ports):
                ports.append({"name": PORT_NAME, "containerPort": PORT, "protocol": "TCP"})
        if replica == "Worker" and "Master" in job["spec"]["pytorchReplicaSpecs"]:
            command = ["sh", "-c", f"until nslookup {metadata['name']}-master-0; do sleep 2; done"]
            limits = {"limits": {"cpu": "100m", "memory": "20Mi"}, "requests": {"cpu": "50m", "memory": "10Mi"}}
            init = {"name": INIT_CONTAINER, "image": "alpine:3.10", "command": command, "resources": limits}
            pod_spec.setdefault("initContainers", []).append(init)
        owner = {"apiVersion": job["apiVersion"], "kind": KIND, "name": metadata["name"], "uid": metadata["uid"]}
        return {
            "metadata": {
                "name": f"{metadata['name']}-{replica.lower()}-{index}",
                "labels": (given.get("labels") or {}) | labels,
                "annotations": given.get("annotations") or {},
                "ownerReferences": [owner | {"controller": True, "blockOwnerDeletion": True}],
            },
            "spec": pod_spec,
        }

    def _delete(self, job: Object, pod: Object) -> None:
        if "deletionTimestamp" not in pod["metadata"]:
            self._store.delete(pod)
            self._events.record(job, "SuccessfulDeletePod", f"Deleted pod: {pod['metadata']['name']}")


def restart_policy(job: Object, replica: str) -> str:
    return job["spec"]["pytorchReplicaSpecs"][replica].get("restartPolicy") or "OnFailure"


def check_mounts(pod: Object) -> None:
    """Raises ApiError (422) for a mount of a volume that the pod does not define."""
    volumes = {volume["name"] for volume in pod["spec"].get("volumes") or []}
    for number, container in enumerate(pod["spec"]["containers"]):
        for position, mount in enumerate(container.get("volumeMounts") or []):
            if mount["name"] not in volumes:
                at = f"spec.containers[{number}].volumeMounts[{position}].name"
                raise ApiError(422, f'Pod "{pod["metadata"]["name"]}" is invalid: {at}: Not found: "{mount["name"]}"')
