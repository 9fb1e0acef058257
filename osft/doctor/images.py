"""Whether the images of a round can be pulled. Only a pod shows that, and one is started only with --pull-images."""

import time
import uuid
from collections.abc import Iterator
from typing import Any

from osft.doctor.cluster_view import ClusterView, Refused
from osft.doctor.finding import Finding, error, not_checked, ok, warning
from osft.doctor.subject import Subject

PULL_SECONDS = 600.0
"""How long an image may take; of the training image there are gigabytes."""
_POLL_SECONDS = 0.5
_FAILED = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
_LOCAL = ("localhost/", "localhost:", "127.0.0.1")


def check_images(subject: Subject) -> Iterator[Finding]:
    """Can the nodes pull the images of the steps and of the job?"""
    configuration, cluster = subject.configuration, subject.cluster
    for image in configuration.images:
        about = f"image {image}"
        if image.startswith(_LOCAL) and not subject.pull_images:
            remedy = (
                "Push the images, and compile with their names: make compile IMAGE=registry/… TRAINING_IMAGE=registry/…"
            )
            yield warning(about, "names this machine, so that a cluster's nodes hardly find it", remedy)
        elif subject.pull_images:
            secrets = configuration.job.image_pull_secrets if image == configuration.job_image else []
            yield pull(cluster, image, secrets)
        else:
            yield not_checked(
                about, "whether nodes can pull it shows only a pod: --pull-images starts one for a moment"
            )


def pull(cluster: ClusterView, image: str, secrets: list[str], *, seconds: float = PULL_SECONDS) -> Finding:
    """Start a pod that does nothing with the image, see whether its container is made, and delete it."""
    about, name = f"image {image}", f"osft-doctor-{uuid.uuid4().hex[:8]}"
    path = cluster.path("pods")
    try:
        cluster.create(path, _pod(name, image, secrets))
    except Refused as refusal:
        return not_checked(about, f"a pod for it is refused: {refusal}")
    try:
        reason = "its pod is gone"
        deadline = time.monotonic() + seconds
        while pod := cluster.get(f"{path}/{name}"):
            done, reason = _state(pod)
            if done or time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
    finally:
        cluster.delete(f"{path}/{name}")
    if not pod or not done:
        return not_checked(about, f"no answer within {seconds:.0f} s: {reason}")
    if not reason:
        return ok(about, "was pulled by a node")
    remedy = (
        "Push it, or correct its name (make compile IMAGE=… TRAINING_IMAGE=…, image of the job), or give the job "
        "image_pull_secrets and the steps' account its imagePullSecrets"
    )
    return error(about, f"cannot be pulled: {reason}", remedy)


def _pod(name: str, image: str, secrets: list[str]) -> dict[str, Any]:
    """A pod that every PodSecurity level admits, ends at once and is not restarted."""
    closed = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True}
    small = {"cpu": "10m", "memory": "64Mi"}
    container = {
        "name": "pull",
        "image": image,
        "imagePullPolicy": "Always",
        "command": ["true"],
        "securityContext": closed,
        "resources": {"requests": small, "limits": small},
    }
    spec = {
        "containers": [container],
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "activeDeadlineSeconds": int(PULL_SECONDS),
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "imagePullSecrets": [{"name": secret} for secret in secrets],
    }
    metadata = {"name": name, "labels": {"app.kubernetes.io/name": "osft-doctor"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _state(pod: dict[str, Any]) -> tuple[bool, str]:
    """Whether it is known now, and why the image could not be pulled or what the pod waits for; "" if it was."""
    for status in pod.get("status", {}).get("containerStatuses", []):
        waiting = status.get("state", {}).get("waiting")
        if not waiting:
            return True, ""  # it ran, or its program was missing: either way the image is there
        text = f"{waiting.get('reason', '')}: {waiting.get('message', '')}".rstrip(": ")
        if waiting.get("reason") in _FAILED:
            return True, text
        if waiting.get("reason") in ("CreateContainerConfigError", "CreateContainerError"):
            return True, ""  # comes after the pull
        return False, text
    conditions = pod.get("status", {}).get("conditions", [])
    return False, next((one.get("message", "") for one in conditions if one["status"] == "False"), "it has not started")
