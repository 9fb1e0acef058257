"""The training job of a configuration, made only to be tried: what the API server says of it, and of its pods."""

from dataclasses import dataclass
from typing import Any

from osft.doctor.configuration import Configuration
from osft.kubernetes.manifest import JobIdentity, build_manifest

NAME = "osft-doctor-trial"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialJob:
    """A job that is not created."""

    api: str
    """Such as kubeflow.org/v1."""
    resource: str
    manifest: dict[str, Any]
    pods: dict[str, dict[str, Any]]
    """Role in the job -> a pod as its controller would make it, but for what the controller adds."""
    number_of_pods: int


def trial_job(configuration: Configuration, namespace: str) -> TrialJob:
    """The job. Raises ValueError for settings that cannot be."""
    settings = configuration.job
    if not configuration.job_image:
        raise ValueError("the job has no image, and the pipeline was compiled without one. Set its image")
    manifest = build_manifest(
        JobIdentity(name=NAME, namespace=settings.namespace or namespace),
        settings,
        image=configuration.job_image,
        command=["true"],
        storage=configuration.storage,
    )
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    pods = {}
    for role, spec in replicas.items():
        template = spec["template"]
        metadata = {**template["metadata"], "name": f"{NAME}-{role.lower()}-0"}
        pod = {**template["spec"], "restartPolicy": "Never"}
        pods[role] = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod}
    return TrialJob(
        api=manifest["apiVersion"],
        resource="pytorchjobs",
        manifest=manifest,
        pods=pods,
        number_of_pods=settings.num_workers,
    )


def with_init_container(pod: dict[str, Any]) -> dict[str, Any]:
    """A Worker as the training operator makes it: with an init container that waits for the Master, as root."""
    limits = {"cpu": "100m", "memory": "20Mi"}
    init = {"name": "init-pytorch", "image": "alpine:3.10", "resources": {"limits": limits}}
    return {**pod, "spec": {**pod["spec"], "initContainers": [init]}}
