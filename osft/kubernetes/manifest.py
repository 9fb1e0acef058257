"""What every job on a cluster is given, whatever its kind: a name, labels, an owner, the hash of its spec.

The manifests themselves are made in `osft.kubernetes.pytorchjob` and `osft.kubernetes.trainjob`, their pods in
`osft.kubernetes.pod_template`.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import kubernetes.client as k8s

from osft.kubernetes.settings import JobSettings

SPEC_HASH = "osft/spec-hash"
"""Annotation with the SHA-256 of the spec, by which a retried step recognizes its job."""

APP_LABEL = {"app.kubernetes.io/name": "osft-training"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """What the pods read from and write to."""

    claim: str | None = None
    """Claim that is mounted at the settings' storage_mount. None: an object store."""
    secret: str | None = None
    """Secret with the object store's credentials, as environment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOwner:
    """The object with which the job is deleted: the workflow of the pipeline run, or the step's pod."""

    api_version: str
    kind: str
    name: str
    uid: str


@dataclass(frozen=True, kw_only=True, slots=True)
class JobIdentity:
    """What the job is called, and what it belongs to."""

    name: str
    namespace: str
    labels: dict[str, str] = field(default_factory=dict)
    """Of the job and its pods: the pipeline run, the MLflow run."""
    owner: JobOwner | None = None
    log_context: str = ""
    """What the lines of its log say of the step and the run (`osft.process.logs`)."""


def job_name(pipeline_run_id: str, task: str) -> str:
    """The name of the job of one task of one pipeline run: the same for each attempt, and short enough for its pods.

    Operators make `<name>-worker-<i>` of it, which is a host name and so has at most 63 characters.
    """
    digest = hashlib.sha256(f"{pipeline_run_id}/{task}".encode()).hexdigest()[:8]
    readable = "".join(c if c.isascii() and c.isalnum() else "-" for c in pipeline_run_id.lower())[:24].strip("-")
    return "-".join(part for part in ("osft", readable, digest) if part)


def label_value(text: str) -> str:
    """`text` as the value of a label: at most 63 letters, digits, dashes, dots and underscores."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "-._") else "-" for c in text)
    return kept[:63].strip("-._")


def job_metadata(identity: JobIdentity, settings: JobSettings, spec: dict[str, Any]) -> dict[str, Any]:
    """The metadata of the job with that spec."""
    queue = {"kueue.x-k8s.io/queue-name": settings.kueue_queue} if settings.kueue_queue else {}
    metadata = k8s.V1ObjectMeta(
        name=identity.name,
        namespace=identity.namespace,
        labels=APP_LABEL | identity.labels | queue,
        annotations={SPEC_HASH: spec_hash(spec)},
    )
    if identity.owner:
        # The owner's deletion deletes the job; it does not wait for that.
        owner = identity.owner
        metadata.owner_references = [
            k8s.V1OwnerReference(
                api_version=owner.api_version,
                kind=owner.kind,
                name=owner.name,
                uid=owner.uid,
                controller=False,
                block_owner_deletion=False,
            )
        ]
    found: dict[str, Any] = plain(metadata)
    return found


def spec_hash(spec: dict[str, Any]) -> str:
    """SHA-256 of a spec's JSON."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def differences(wanted: Any, found: Any, path: str = "spec") -> list[str]:
    """Where `found` is not as `wanted`, one line each. What only the server has set is no difference."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [line for key in wanted for line in differences(wanted[key], found.get(key), f"{path}.{key}")]
    if isinstance(wanted, list) and isinstance(found, list):
        if all(isinstance(item, str) for item in wanted + found):  # a command: what is there on one side only
            gone = [item for item in found if item not in wanted]
            new = [item for item in wanted if item not in found]
            return [f"{path}: {', '.join(gone) or 'nothing'} there, {', '.join(new) or 'nothing'} now"] * bool(
                gone + new
            )
        if len(wanted) == len(found):
            return [
                line
                for i, (ours, theirs) in enumerate(zip(wanted, found, strict=True))
                for line in differences(ours, theirs, f"{path}[{i}]")
            ]
    return [] if wanted == found else [f"{path}: {found!r} there, {wanted!r} now"]


def plain(value: Any) -> Any:
    """A client object as JSON values."""
    return k8s.ApiClient().sanitize_for_serialization(value)
