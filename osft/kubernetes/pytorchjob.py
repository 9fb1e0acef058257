"""The PyTorchJob of Kubeflow's training operator (v1): its manifest from settings, and how it and its pods are read.

What is set deliberately, and why (of the pods: pod_template.py):

restartPolicy ExitCode          A training process that was killed, evicted or has lost a peer ends its pod with a code
                                of 128 or more, and the operator recreates the pod: it resumes from the saved state. A
                                program error (1 to 127) fails the job at once; repeating it would only burn GPUs.
backoffLimit                    As max_restarts. The operator counts container restarts only, which this policy does not
                                make; that the pods are not recreated for ever is the launcher's doing.
cleanPodPolicy Running          Pods that still run when the job ends are ended; those that have ended keep their logs.
ttlSecondsAfterFinished         A day, so that a retried step finds the job and people find the logs. (Operator v1.9
                                notes no completion time for a job that an exit code failed, and keeps it for longer.)
activeDeadlineSeconds           None: it would count the time in the queue.
"""

from collections.abc import Sequence

from kubeflow.training import (
    KubeflowOrgV1PyTorchJobSpec,
    KubeflowOrgV1ReplicaSpec,
    KubeflowOrgV1RunPolicy,
    KubeflowOrgV1SchedulingPolicy,
)
from kubeflow.training.constants import constants

from osft.kubernetes.kinds import Object, Outcome, Resource, condition, ended
from osft.kubernetes.manifest import JobIdentity, Storage, job_metadata, plain
from osft.kubernetes.pod_template import pod_template
from osft.kubernetes.settings import JobSettings
from osft.training.job import Phase


class PyTorchJob:
    """A Master and Workers, whose pods the training operator restarts one by one."""

    resource = Resource(
        constants.GROUP,
        constants.VERSION,
        constants.PYTORCHJOB_PLURAL,
        constants.PYTORCHJOB_KIND,
        "Kubeflow's training operator",
    )
    launcher = "pytorchjob"
    controller = "the training operator"
    container: str = constants.JOB_PARAMETERS[constants.PYTORCHJOB_KIND]["container"]
    needs: tuple[Resource, ...] = ()

    def manifests(
        self, identity: JobIdentity, settings: JobSettings, *, image: str, command: list[str], storage: Storage
    ) -> list[Object]:
        """The PyTorchJob. Raises ValueError for a part of the settings that Kubernetes does not know."""
        template = pod_template(self.container, identity, settings, image=image, command=command, storage=storage)

        def replicas(number: int) -> KubeflowOrgV1ReplicaSpec:
            return KubeflowOrgV1ReplicaSpec(replicas=number, restart_policy="ExitCode", template=template)

        specs = {constants.REPLICA_TYPE_MASTER: replicas(1)}
        if settings.num_workers > 1:
            specs[constants.REPLICA_TYPE_WORKER] = replicas(settings.num_workers - 1)
        scheduling = None
        if settings.gang_scheduling or settings.gang_queue:
            scheduling = KubeflowOrgV1SchedulingPolicy(
                min_available=settings.num_workers, queue=settings.gang_queue, priority_class=settings.priority_class
            )
        spec = plain(
            KubeflowOrgV1PyTorchJobSpec(
                nproc_per_node=str(settings.procs_per_worker),
                pytorch_replica_specs=specs,
                run_policy=KubeflowOrgV1RunPolicy(
                    clean_pod_policy="Running",
                    backoff_limit=settings.max_restarts,
                    ttl_seconds_after_finished=settings.ttl_seconds_after_finished,
                    active_deadline_seconds=settings.active_deadline_seconds,
                    scheduling_policy=scheduling,
                ),
            )
        )
        resource = self.resource
        metadata = job_metadata(identity, settings, spec)
        return [{"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata, "spec": spec}]

    def num_pods(self, manifest: Object) -> int:
        """The Master and the Workers."""
        return sum(spec["replicas"] for spec in manifest["spec"]["pytorchReplicaSpecs"].values())

    def pod_selector(self, name: str) -> str:
        """By the operator's label."""
        return f"{constants.JOB_NAME_LABEL}={name}"

    def node_rank(self, pod: Object) -> int:
        """The Master is 0, the Workers follow."""
        labels = pod["metadata"].get("labels", {})
        is_worker = labels.get(constants.REPLICA_TYPE_LABEL) == "worker"
        return int(labels.get(constants.REPLICA_INDEX_LABEL, 0)) + is_worker

    def attempt(self, pod: Object) -> int:
        """0: each pod is restarted for itself."""
        return 0

    def is_suspended(self, job: Object) -> bool:
        """By its run policy, which Kueue sets."""
        return bool(job["spec"].get("runPolicy", {}).get("suspend"))

    def is_taken_up(self, job: Object) -> bool:
        """The operator begins with the condition Created."""
        return bool(job.get("status", {}).get("conditions"))

    def outcome(self, job: Object) -> Outcome | None:
        """Succeeded is the Master's success."""
        return ended(job, "Succeeded", Phase.SUCCEEDED) or ended(job, "Failed", Phase.FAILED)

    def running_since(self, job: Object, pods: Sequence[Object]) -> str | None:
        """The condition Running is the Master's."""
        running = condition(job, "Running")
        return running.get("lastTransitionTime") if running else None

    def queued_since(self, job: Object, pods: Sequence[Object]) -> list[str | None]:
        """The last restart of a pod."""
        restarting = condition(job, "Restarting")
        return [restarting.get("lastTransitionTime")] if restarting else []

    def event_sources(self, name: str) -> tuple[str, ...]:
        """The job's own: FailedCreatePod."""
        return (name,)

    def refusal_hint(self, message: str) -> str:
        """Of the init container that the operator gives to Workers, which runs as root."""
        if "violates PodSecurity" in message and "init-pytorch" in message:
            return (
                "Give the training operator another init container (--pytorch-init-container-template-file; "
                "pipelines/continual_learning/manifests/examples/init_container.yaml); or use launcher=trainjob, or "
                "train in one pod, with num_workers=1: these have none"
            )
        return ""
