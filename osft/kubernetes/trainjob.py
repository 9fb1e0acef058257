"""The TrainJob of Kubeflow Trainer (v2): its manifests from settings, and how it and its pods are read.

Kubeflow Trainer makes a JobSet of it, that one Indexed Job `<name>-node-0`, and that the pods. What a TrainJob cannot
say of its pods stands in a TrainingRuntime, which the step brings along; its name is a hash of its content, so that
jobs with the same settings share it and none is ever changed. Nobody deletes it.

What is set deliberately, and why (of the pods: pod_template.py):

podFailurePolicy                A program error (exit codes 1 to 127) fails the Job, and by the rule programError the
                                JobSet: repeating it would only burn GPUs. A pod that only lost its peer is replaced
                                without failing the Job: that it ended first must not hide why its peer is about to end.
                                (Seen on a stand-in only; the other rules on a real cluster, with Kubeflow Trainer 2.3.)
backoffLimit 0                  Any other end of a pod, by a signal or an eviction, fails the Job at once,
failurePolicy.maxRestarts       whereupon JobSet restarts all pods together, at most max_restarts times: they resume
                                from the saved state. A Job's own retries would restart the one pod after a pause.
ttlSecondsAfterFinished         A day; it deletes the pods with their logs. The TrainJob stays until its owner goes.
activeDeadlineSeconds           None unless asked for. It counts from the start or the last resumption.
numProcPerNode                  Always given: what Kubeflow Trainer would make of none depends on the CPUs.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from osft.kubernetes.kinds import Object, Outcome, Resource, ended
from osft.kubernetes.manifest import JobIdentity, Storage, job_metadata, plain
from osft.kubernetes.pod_template import pod_template
from osft.kubernetes.settings import JobSettings
from osft.process.exit_codes import CONNECTION_LOST, FIRST_RETRYABLE
from osft.training.job import Phase

_GROUP, _VERSION = "trainer.kubeflow.org", "v1alpha1"
_NODE = "node"  # the replicated job and its container have to be called so
_MANAGER = "osft/launcher"  # of the patches: a domain and a path, as for all such names
_JOBSET = "jobset.sigs.k8s.io"
_INDEX = "batch.kubernetes.io/job-completion-index"
_RUNTIME = Resource(_GROUP, _VERSION, "trainingruntimes", "TrainingRuntime", "Kubeflow Trainer")
_POD_OF_RUNTIME = ("automountServiceAccountToken", "priorityClassName")
_CONTAINER_OF_RUNTIME = ("terminationMessagePolicy", "envFrom", "imagePullPolicy")
_CONTAINER_OF_PATCH = ("volumeMounts", "securityContext")


class TrainJob:
    """Nodes that JobSet restarts together."""

    resource = Resource(_GROUP, _VERSION, "trainjobs", "TrainJob", "Kubeflow Trainer")
    launcher = "trainjob"
    controller = "Kubeflow Trainer"
    container = _NODE
    needs: tuple[Resource, ...] = (_RUNTIME,)

    def manifests(
        self, identity: JobIdentity, settings: JobSettings, *, image: str, command: list[str], storage: Storage
    ) -> list[Object]:
        """The TrainingRuntime, the TrainJob. Raises ValueError for settings that a TrainJob or Kubernetes has not."""
        settings.check_possible(self.launcher)
        template = plain(pod_template(_NODE, identity, settings, image=image, command=command, storage=storage))
        pod = template["spec"]
        (container,) = pod.pop("containers")
        runtime = _runtime(
            settings,
            pod={name: pod.pop(name) for name in _POD_OF_RUNTIME if name in pod},
            container={name: container[name] for name in _CONTAINER_OF_RUNTIME if name in container},
        )
        patched = {"name": _NODE} | {name: container[name] for name in _CONTAINER_OF_PATCH}
        spec: Object = {
            "runtimeRef": {"apiGroup": _GROUP, "kind": _RUNTIME.kind, "name": runtime["metadata"]["name"]},
            "trainer": {
                "image": container["image"],
                "command": container["command"],
                "env": container["env"],
                "numNodes": settings.num_workers,
                "numProcPerNode": settings.procs_per_worker,
                "resourcesPerNode": container["resources"],
            },
            "runtimePatches": [
                {
                    "manager": _MANAGER,
                    "trainingRuntimeSpec": {
                        "template": {
                            "metadata": {"labels": identity.labels},
                            "spec": _replicated(
                                {"metadata": template["metadata"], "spec": pod | {"containers": [patched]}}
                            ),
                        }
                    },
                }
            ],
        }
        if settings.active_deadline_seconds:
            spec["activeDeadlineSeconds"] = settings.active_deadline_seconds
        metadata = job_metadata(identity, settings, spec)
        runtime["metadata"]["namespace"] = identity.namespace
        return [
            runtime,
            {"apiVersion": self.resource.api_version, "kind": self.resource.kind, "metadata": metadata, "spec": spec},
        ]

    def num_pods(self, manifest: Object) -> int:
        """One a node."""
        return int(manifest["spec"]["trainer"]["numNodes"])

    def pod_selector(self, name: str) -> str:
        """By the name of the JobSet, which is the job's."""
        return f"{_JOBSET}/jobset-name={name}"

    def node_rank(self, pod: Object) -> int:
        """The pod's index in the Job."""
        return int(pod["metadata"].get("labels", {}).get(_INDEX, 0))

    def attempt(self, pod: Object) -> int:
        """How often JobSet had restarted the pods."""
        return int(pod["metadata"].get("labels", {}).get(f"{_JOBSET}/restart-attempt", 0))

    def is_suspended(self, job: Object) -> bool:
        """By its spec, which Kueue sets."""
        return bool(job["spec"].get("suspend"))

    def is_taken_up(self, job: Object) -> bool:
        """A TrainJob that runs has no condition, but counts of its Jobs."""
        status = job.get("status", {})
        return bool(status.get("jobsStatus") or status.get("conditions"))

    def outcome(self, job: Object) -> Outcome | None:
        """The conditions of the JobSet, copied."""
        return ended(job, "Complete", Phase.SUCCEEDED) or ended(job, "Failed", Phase.FAILED)

    def running_since(self, job: Object, pods: Sequence[Object]) -> str | None:
        """Since the last of the containers started: no condition says it."""
        return max((_started(pod) for pod in pods), default=None)

    def queued_since(self, job: Object, pods: Sequence[Object]) -> list[str | None]:
        """The last restart made new pods."""
        return [pod["metadata"].get("creationTimestamp") for pod in pods if self.attempt(pod)]

    def event_sources(self, name: str) -> tuple[str, ...]:
        """The TrainJob and its JobSet (TrainJobResourcesCreationFailed), and the Job (FailedCreate)."""
        return name, f"{name}-{_NODE}-0"

    def refusal_hint(self, message: str) -> str:
        """What a server of another version says of fields that it does not know."""
        if "runtimePatches" not in message:
            return ""
        return "Kubeflow Trainer 2.2 or newer is needed; update it, or use launcher=pytorchjob"


def _runtime(settings: JobSettings, *, pod: dict[str, Any], container: dict[str, Any]) -> Object:
    """The TrainingRuntime, named by its content. Its image is a placeholder: each TrainJob has its own."""
    program_errors = list(range(1, FIRST_RETRYABLE))
    job_spec = {
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                _on_exit("FailJob", program_errors),
                _on_exit("Ignore", [CONNECTION_LOST]),
            ]
        },
        "template": {
            "spec": {
                "restartPolicy": "Never",
                **pod,
                "containers": [{"name": _NODE, "image": "given-by-the-trainjob", **container}],
            }
        },
    }
    ancestor = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    spec = {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "failurePolicy": {
                    "maxRestarts": settings.max_restarts,
                    # JobSet refuses a dash in the name, and only when it is given the JobSet.
                    "rules": [
                        {"name": "programError", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                    ],
                },
                "ttlSecondsAfterFinished": settings.ttl_seconds_after_finished,
                "replicatedJobs": [
                    {"name": _NODE, "template": {"metadata": {"labels": ancestor}, "spec": job_spec}},
                ],
            }
        },
    }
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:8]
    labels = {"trainer.kubeflow.org/framework": "torch", "app.kubernetes.io/part-of": "osft"}
    return {
        "apiVersion": _RUNTIME.api_version,
        "kind": _RUNTIME.kind,
        "metadata": {"name": f"osft-{digest}", "labels": labels},
        "spec": spec,
    }


def _replicated(template: Object) -> Object:
    """What a patch says of the pods, at its place in the JobSet's spec."""
    return {"replicatedJobs": [{"name": _NODE, "template": {"spec": {"template": template}}}]}


def _on_exit(action: str, codes: list[int]) -> Object:
    return {"action": action, "onExitCodes": {"containerName": _NODE, "operator": "In", "values": codes}}


def _started(pod: Object) -> str:
    status = pod.get("status", {})
    for found in status.get("containerStatuses", []):
        state = found.get("state", {})
        started = (state.get("running") or state.get("terminated") or {}).get("startedAt")
        if found["name"] == _NODE and started:
            return str(started)
    return str(status.get("startTime") or pod["metadata"]["creationTimestamp"])
