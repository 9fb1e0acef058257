"""The manifest of a PyTorchJob, from settings.

What is set deliberately, and why:

restartPolicy ExitCode          A training process that was killed, evicted or has lost a peer ends its pod with a code
                                of 128 or more, and the operator recreates the pod: it resumes from the saved state. A
                                program error (1 to 127) fails the job at once; repeating it would only burn GPUs.
backoffLimit                    As max_restarts. The operator counts container restarts only, which this policy does not
                                make; that the pods are not recreated for ever is the launcher's doing.
cleanPodPolicy Running          Pods that still run when the job ends are ended; those that have ended keep their logs.
ttlSecondsAfterFinished         A day, so that a retried step finds the job and people find the logs. (Operator v1.9
                                notes no completion time for a job that an exit code failed, and keeps it for longer.)
activeDeadlineSeconds           None: it would count the time in the queue.
terminationGracePeriodSeconds   Long enough to save the training state.
terminationMessagePolicy        FallbackToLogsOnError: the last lines of a failed pod are in its status, even if its log
                                cannot be read any more.

Training runs as a user that is not root, without capabilities, privilege escalation or a token of the API, under the
runtime's default seccomp profile, and without Istio's proxy. That it is not root is said of the container, not of the
pod: the operator gives Workers an init container that runs as root, and the kubelet would never start it. Nothing
secret is written here: credentials are references to secrets.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import kubernetes.client as k8s
from kubeflow.training import (
    KubeflowOrgV1PyTorchJob,
    KubeflowOrgV1PyTorchJobSpec,
    KubeflowOrgV1ReplicaSpec,
    KubeflowOrgV1RunPolicy,
    KubeflowOrgV1SchedulingPolicy,
)
from kubeflow.training.constants import constants

from osft.kubernetes.settings import PyTorchJobSettings
from osft.process import logs
from osft.training import lease

SPEC_HASH = "osft/spec-hash"
"""Annotation with the SHA-256 of the spec, by which a retried step recognizes its job."""

APP_LABEL = {"app.kubernetes.io/name": "osft-training"}
_SCRATCH = "/scratch"
_LOCK_SECONDS = 180  # a dead pod's folder is free after a minute without a sign of life (osft.storage.lock)


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


def build_manifest(
    identity: JobIdentity, settings: PyTorchJobSettings, *, image: str, command: list[str], storage: Storage
) -> dict[str, Any]:
    """The PyTorchJob, as it is sent to the API server.

    Raises ValueError for a part of the settings that Kubernetes does not know.
    """
    spec = _plain(_job_spec(identity, settings, image=image, command=command, storage=storage))
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
    job = KubeflowOrgV1PyTorchJob(
        api_version=f"{constants.GROUP}/{constants.VERSION}", kind=constants.PYTORCHJOB_KIND, metadata=metadata
    )
    return {**_plain(job), "spec": spec}


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


def _job_spec(
    identity: JobIdentity, settings: PyTorchJobSettings, *, image: str, command: list[str], storage: Storage
) -> KubeflowOrgV1PyTorchJobSpec:
    # Older Istio reads the annotation, newer the label.
    istio = {} if settings.istio_sidecar else {"sidecar.istio.io/inject": "false"}
    template = k8s.V1PodTemplateSpec(
        metadata=k8s.V1ObjectMeta(labels=APP_LABEL | identity.labels | istio, annotations=istio or None),
        spec=_pod_spec(identity, settings, image=image, command=command, storage=storage),
    )

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
    return KubeflowOrgV1PyTorchJobSpec(
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


def _pod_spec(
    identity: JobIdentity, settings: PyTorchJobSettings, *, image: str, command: list[str], storage: Storage
) -> k8s.V1PodSpec:
    volumes, mounts = _volumes(settings, storage)
    requests = {"cpu": settings.cpu, "memory": settings.memory}
    limits = {"memory": settings.memory} | ({"cpu": settings.cpu_limit} if settings.cpu_limit else {})
    if settings.gpus:
        requests[settings.gpu_resource] = limits[settings.gpu_resource] = str(settings.gpus)
    env_from = [*settings.env_from, *([{"secret": storage.secret}] if storage.secret else [])]
    container = k8s.V1Container(
        name=constants.JOB_PARAMETERS[constants.PYTORCHJOB_KIND]["container"],
        image=image,
        image_pull_policy=settings.image_pull_policy,
        command=[argument.replace("$", "$$") for argument in command],  # $(NAME) would be expanded, $$ halved
        env=[
            k8s.V1EnvVar(name="OSFT_LOCK_SECONDS", value=str(_LOCK_SECONDS)),
            k8s.V1EnvVar(name=lease.MINUTES, value=f"{settings.lease_minutes:g}"),
            *([k8s.V1EnvVar(name=logs.CONTEXT, value=identity.log_context)] if identity.log_context else []),
            *([] if storage.claim else [k8s.V1EnvVar(name="OSFT_SCRATCH", value=_SCRATCH)]),
            *(_env(name, reference) for name, reference in settings.env.items()),
        ],
        env_from=[_env_from(reference) for reference in env_from],
        resources=k8s.V1ResourceRequirements(requests=requests, limits=limits),
        volume_mounts=mounts,
        termination_message_policy="FallbackToLogsOnError",
        security_context=k8s.V1SecurityContext(
            run_as_non_root=True,
            run_as_user=settings.run_as_user,
            allow_privilege_escalation=False,
            capabilities=k8s.V1Capabilities(drop=["ALL"]),
        ),
    )
    return k8s.V1PodSpec(
        containers=[container],
        volumes=volumes,
        automount_service_account_token=False,
        service_account_name=settings.service_account,
        image_pull_secrets=[k8s.V1LocalObjectReference(name=name) for name in settings.image_pull_secrets] or None,
        node_selector=settings.node_selector or None,
        tolerations=[typed("V1Toleration", t, f"tolerations[{i}]") for i, t in enumerate(settings.tolerations)] or None,
        affinity=typed("V1Affinity", settings.affinity, "affinity") if settings.affinity else None,
        priority_class_name=settings.priority_class,
        termination_grace_period_seconds=settings.termination_grace_seconds,
        security_context=k8s.V1PodSecurityContext(
            fs_group=settings.fs_group,
            seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault"),
        ),
    )


def _volumes(settings: PyTorchJobSettings, storage: Storage) -> tuple[list[k8s.V1Volume], list[k8s.V1VolumeMount]]:
    """Shared memory, the storage (or scratch space for what comes from an object store), further claims."""
    memory = k8s.V1EmptyDirVolumeSource(medium="Memory", size_limit=settings.shared_memory)
    volumes = [k8s.V1Volume(name="shared-memory", empty_dir=memory)]
    mounts = [k8s.V1VolumeMount(name="shared-memory", mount_path="/dev/shm")]
    claims = [{"claim": storage.claim, "mount_path": settings.storage_mount}] if storage.claim else []
    for number, volume in enumerate([*claims, *settings.volumes]):
        read_only = bool(volume.get("read_only"))
        source = k8s.V1PersistentVolumeClaimVolumeSource(claim_name=volume["claim"], read_only=read_only)
        volumes.append(k8s.V1Volume(name=f"claim-{number}", persistent_volume_claim=source))
        mounts.append(k8s.V1VolumeMount(name=f"claim-{number}", mount_path=volume["mount_path"], read_only=read_only))
    if not storage.claim:
        volumes.append(k8s.V1Volume(name="scratch", empty_dir=k8s.V1EmptyDirVolumeSource()))
        mounts.append(k8s.V1VolumeMount(name="scratch", mount_path=_SCRATCH))
    return volumes, mounts


def _env(name: str, reference: dict[str, Any]) -> k8s.V1EnvVar:
    key = reference["key"]
    if "secret" in reference:
        selector = k8s.V1SecretKeySelector(name=reference["secret"], key=key)
        return k8s.V1EnvVar(name=name, value_from=k8s.V1EnvVarSource(secret_key_ref=selector))
    selector = k8s.V1ConfigMapKeySelector(name=reference["config_map"], key=key)
    return k8s.V1EnvVar(name=name, value_from=k8s.V1EnvVarSource(config_map_key_ref=selector))


def _env_from(reference: dict[str, Any]) -> k8s.V1EnvFromSource:
    if "secret" in reference:
        return k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name=reference["secret"]))
    return k8s.V1EnvFromSource(config_map_ref=k8s.V1ConfigMapEnvSource(name=reference["config_map"]))


def typed(kind: str, value: Any, where: str) -> Any:
    """A part of a pod's spec in Kubernetes' JSON, as the client's object `kind`.

    Raises ValueError for a field that Kubernetes does not have; its API server would drop it silently.
    """
    if kind.startswith("list["):
        if not isinstance(value, list):
            raise ValueError(f"pytorchjob {where} must be a list")
        return [typed(kind[5:-1], item, f"{where}[{i}]") for i, item in enumerate(value)]
    model = getattr(k8s, kind, None)
    if model is None:
        return value
    if not isinstance(value, dict):
        raise ValueError(f"pytorchjob {where} must be a dict, got {value!r}")
    fields = {json_name: name for name, json_name in model.attribute_map.items()}
    for key in value:
        if key not in fields:
            raise ValueError(f"pytorchjob {where}: Kubernetes knows no field {key!r} there, but {', '.join(fields)}")
    try:
        return model(**{fields[k]: typed(model.openapi_types[fields[k]], v, f"{where}.{k}") for k, v in value.items()})
    except ValueError as error:
        raise ValueError(str(error) if "pytorchjob" in str(error) else f"pytorchjob {where}: {error}") from None


def _plain(value: Any) -> Any:
    """A client object as JSON values."""
    return k8s.ApiClient().sanitize_for_serialization(value)
