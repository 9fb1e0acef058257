"""The training job of a configuration, made only to be tried: what the API server says of it, and of its pods."""

from dataclasses import dataclass
from typing import Any

from osft.doctor.configuration import Configuration
from osft.kubernetes.kinds import JobKind
from osft.kubernetes.manifest import JobIdentity, plain
from osft.kubernetes.pod_template import pod_template
from osft.kubernetes.training_job import KINDS

NAME = "osft-doctor-trial"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialJob:
    """A job that is not created."""

    kind: JobKind
    namespace: str
    manifests: list[dict[str, Any]]
    """What has to be there before it, and last the job."""
    pod: dict[str, Any]
    """One of its pods, but for what its controller adds."""
    gets_init_container: bool
    """Whether the controller adds one that runs as root: the training operator does so to Workers."""


def kind_of(launcher: str) -> JobKind | None:
    """The kind of job that a launcher makes; None if this release has no such launcher."""
    return next((kind for kind in KINDS if kind.launcher == launcher), None)


def trial_job(configuration: Configuration, namespace: str) -> TrialJob:
    """The job. Raises ValueError for settings that cannot be."""
    settings, kind = configuration.job, kind_of(configuration.launcher)
    if kind is None:
        raise ValueError(f"launcher must be one of {', '.join(one.launcher for one in KINDS)}")
    if not configuration.job_image:
        raise ValueError("the job has no image, and the pipeline was compiled without one. Set its image")
    identity = JobIdentity(name=NAME, namespace=settings.namespace or namespace)
    how: dict[str, Any] = {
        "image": configuration.job_image,
        "command": ["true"],
        "storage": configuration.storage,
    }
    template = plain(pod_template(kind.container, identity, settings, **how))
    return TrialJob(
        kind=kind,
        namespace=identity.namespace,
        manifests=kind.manifests(identity, settings, **how),
        pod={
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**template["metadata"], "name": f"{NAME}-0"},
            "spec": {**template["spec"], "restartPolicy": "Never"},
        },
        gets_init_container=kind.launcher == "pytorchjob" and settings.num_workers > 1,
    )


def with_init_container(pod: dict[str, Any]) -> dict[str, Any]:
    """A Worker as the training operator makes it: with an init container that waits for the Master, as root."""
    limits = {"cpu": "100m", "memory": "20Mi"}
    init = {"name": "init-pytorch", "image": "alpine:3.10", "resources": {"limits": limits}}
    return {**pod, "spec": {**pod["spec"], "initContainers": [init]}}
