"""The pods that train, as both kinds of jobs have them: container, environment, volumes, rights, places.

Training runs as a user that is not root, without capabilities, privilege escalation or a token of the API, under the
runtime's default seccomp profile, and without Istio's proxy. That it is not root is said of the container, not of the
pod: the training operator gives Workers an init container that runs as root, and the kubelet would never start it.
Nothing secret is written here: credentials are references to secrets.

terminationGracePeriodSeconds   Long enough to save the training state.
terminationMessagePolicy        FallbackToLogsOnError: the last lines of a failed pod are in its status, even if its log
                                cannot be read any more.
"""

from typing import Any

import kubernetes.client as k8s

from osft.kubernetes.manifest import APP_LABEL, JobIdentity, Storage
from osft.kubernetes.settings import JobSettings
from osft.process import logs
from osft.training import lease

_SCRATCH = "/scratch"
_LOCK_SECONDS = 180  # a dead pod's folder is free after a minute without a sign of life (osft.storage.lock)


def pod_template(
    container_name: str,
    identity: JobIdentity,
    settings: JobSettings,
    *,
    image: str,
    command: list[str],
    storage: Storage,
) -> k8s.V1PodTemplateSpec:
    """The pods. Raises ValueError for a part of the settings that Kubernetes does not know."""
    # Older Istio reads the annotation, newer the label.
    istio = {} if settings.istio_sidecar else {"sidecar.istio.io/inject": "false"}
    return k8s.V1PodTemplateSpec(
        metadata=k8s.V1ObjectMeta(labels=APP_LABEL | identity.labels | istio, annotations=istio or None),
        spec=_pod_spec(container_name, identity, settings, image=image, command=command, storage=storage),
    )


def _pod_spec(
    container_name: str,
    identity: JobIdentity,
    settings: JobSettings,
    *,
    image: str,
    command: list[str],
    storage: Storage,
) -> k8s.V1PodSpec:
    volumes, mounts = _volumes(settings, storage)
    requests = {"cpu": settings.cpu, "memory": settings.memory}
    limits = {"memory": settings.memory} | ({"cpu": settings.cpu_limit} if settings.cpu_limit else {})
    if settings.gpus:
        requests[settings.gpu_resource] = limits[settings.gpu_resource] = str(settings.gpus)
    env_from = [*settings.env_from, *([{"secret": storage.secret}] if storage.secret else [])]
    container = k8s.V1Container(
        name=container_name,
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


def _volumes(settings: JobSettings, storage: Storage) -> tuple[list[k8s.V1Volume], list[k8s.V1VolumeMount]]:
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
            raise ValueError(f"job {where} must be a list")
        return [typed(kind[5:-1], item, f"{where}[{i}]") for i, item in enumerate(value)]
    model = getattr(k8s, kind, None)
    if model is None:
        return value
    if not isinstance(value, dict):
        raise ValueError(f"job {where} must be a dict, got {value!r}")
    fields = {json_name: name for name, json_name in model.attribute_map.items()}
    for key in value:
        if key not in fields:
            raise ValueError(f"job {where}: Kubernetes knows no field {key!r} there, but {', '.join(fields)}")
    try:
        return model(**{fields[k]: typed(model.openapi_types[fields[k]], v, f"{where}.{k}") for k, v in value.items()})
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith("job ") else f"job {where}: {error}") from None
