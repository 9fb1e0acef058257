"""What a user sets of a training job on a cluster, as one validated structure: the pipeline's parameter `job`."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from osft.settings.base import Settings, refuse_unknown
from osft.settings.values import Boolean, Integer, Number, Text, Texts, WholeNumbers
from osft.training.job import Limits

LAUNCHERS = ("local", "pytorchjob", "trainjob")
"""Where training runs: in processes of the step, in pods of one kind of job or the other."""
_NOT_IN_A_TRAINJOB = ("gang_scheduling", "gang_queue")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


def _quantity(value: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?", value):
        raise ValueError(f"must be a Kubernetes quantity such as 4, 500m or 16Gi, got {value!r}")
    return value


Quantity = Annotated[str, AfterValidator(_quantity)]


class JobSettings(Settings):
    """The pods that train, and how long they may. Every field has a default that works on a cluster with GPUs."""

    num_workers: Annotated[Integer, Field(ge=1, le=1000)] = 1
    """Pods that train together: a PyTorchJob's Master and Workers, a TrainJob's nodes."""

    num_procs_per_worker: Annotated[Integer | None, Field(ge=1)] = None
    """Training processes in each pod. None: one for each of its GPUs, or one without."""

    gpus: Annotated[Integer, Field(ge=0)] = 1
    """GPUs of each pod."""

    gpu_resource: Text = "nvidia.com/gpu"
    """The resource that the cluster counts GPUs by, such as "amd.com/gpu" or "nvidia.com/mig-3g.40gb"."""

    cpu: Quantity = "4"
    """CPUs of each pod, as a Kubernetes quantity. It is the request."""

    cpu_limit: Quantity | None = None
    """Limit of them, which a namespace with a ResourceQuota of limits.cpu asks for. None: no limit, which would only
    throttle."""

    memory: Quantity = "32Gi"
    """Memory of each pod: request and limit."""

    shared_memory: Quantity = "2Gi"
    """/dev/shm of each pod, which NCCL and gloo use. What is used of it counts as memory."""

    image: Text | None = None
    """Image of the pods. None: the training image that the pipeline was compiled with."""

    image_pull_secrets: Texts = []  # noqa: RUF012 (pydantic copies it)
    """Names of secrets that hold a registry's credentials."""

    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """Always, IfNotPresent or Never. None: the cluster's default."""

    env: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies it)
    """Environment variables, by reference only, so that no value stands in a manifest:
    {"HF_TOKEN": {"secret": "osft-huggingface", "key": "HF_TOKEN"}}; with "config_map" in place of "secret" likewise."""

    env_from: list[dict[str, Any]] = []  # noqa: RUF012 (pydantic copies it)
    """Whole secrets and config maps as environment: [{"secret": "osft-s3"}, {"config_map": "nccl"}]."""

    volumes: list[dict[str, Any]] = []  # noqa: RUF012 (pydantic copies it)
    """Further claims: [{"claim": "datasets", "mount_path": "/mnt/datasets", "read_only": true}]."""

    node_selector: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies it)
    """Labels that a node must have."""

    tolerations: Annotated[list[dict[str, Any]], WholeNumbers] = []  # noqa: RUF012 (pydantic copies it)
    """As in a pod's spec: [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]."""

    affinity: Annotated[dict[str, Any], WholeNumbers] = {}  # noqa: RUF012 (pydantic copies it)
    """As in a pod's spec: nodeAffinity, podAffinity, podAntiAffinity."""

    priority_class: Text | None = None
    """PriorityClass of the pods."""

    service_account: Text | None = None
    """Service account of the pods; its token is not mounted, as training talks to no API. None: the namespace's
    default."""

    run_as_user: Annotated[Integer | None, Field(ge=1)] = None
    """User id of the processes. None: the image's, 1000; on OpenShift the one that it picks. Never root."""

    fs_group: Annotated[Integer | None, Field(ge=0)] = None
    """Group that volumes are made writable for, where the storage supports that."""

    istio_sidecar: Boolean = False
    """Let Istio inject its proxy. A job with it never ends, and gloo and NCCL do not pass through it."""

    kueue_queue: Text | None = None
    """LocalQueue of Kueue that admits the job."""

    gang_scheduling: Boolean = False
    """Ask the operator's gang scheduler (Volcano, scheduler-plugins) to start all pods or none. Not with a TrainJob."""

    gang_queue: Text | None = None
    """Queue of the gang scheduler. Not with a TrainJob."""

    max_queued_minutes: Annotated[Number | None, Field(ge=0)] = None
    """Give up if the pods do not start within this time. None: wait, and report for what."""

    max_running_minutes: Annotated[Number | None, Field(ge=0)] = None
    """End the job if it runs longer, counted from the last (re)start of its pods. None: no limit."""

    heartbeat_minutes: Annotated[Number | None, Field(ge=0)] = 60.0
    """End the job if it runs but makes no training step for so long. None: no limit."""

    lease_minutes: Annotated[Number, Field(gt=0)] = 30.0
    """The job saves its state and ends if the step that follows it is gone for so long, and no retried one came."""

    max_restarts: Annotated[Integer, Field(ge=0)] = 5
    """How often pods that died of a signal, an eviction or a lost peer are restarted; they resume from the last
    saved state. A program error (exit codes 1 to 127) fails the job at once."""

    ttl_seconds_after_finished: Annotated[Integer, Field(ge=0)] = 86_400
    """The finished job and its logs stay for so long, of a TrainJob the pods. A retried step has to find it."""

    active_deadline_seconds: Annotated[Integer | None, Field(ge=1)] = None
    """The operator's own limit, which holds even if the step that watches the job is gone. Of a PyTorchJob it counts
    the time in the queue too, so there is none unless asked for."""

    termination_grace_seconds: Annotated[Integer, Field(ge=1)] = 150
    """Between SIGTERM and SIGKILL: time to save the training state in."""

    namespace: Text | None = None
    """Namespace of the job. None: that of the step."""

    storage_mount: Text = "/mnt/osft"
    """Where the storage claim is mounted: the same path as in the pipeline's steps."""

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        for name, reference in self.env.items():
            _check_reference(f"env[{name!r}]", reference, {"key"})
        for position, reference in enumerate(self.env_from):
            _check_reference(f"env_from[{position}]", reference, set())
        for position, volume in enumerate(self.volumes):
            _check_volume(f"volumes[{position}]", volume)
        return self

    @classmethod
    def from_parameters(cls, given: Mapping[str, Any]) -> "JobSettings":
        """The settings from named values. Raises ValueError for an unknown name and for what cannot be."""
        return cls(**{name: value for name, value in given.items() if value is not None})

    def check_possible(self, launcher: str) -> None:
        """Raise ValueError for a setting that the launcher's kind of job cannot have."""
        for name in _NOT_IN_A_TRAINJOB if launcher == "trainjob" else ():
            if getattr(self, name):
                raise ValueError(
                    f"{name} cannot be had with launcher=trainjob: its runtime has no gang scheduler. Leave it out, "
                    "let Kueue admit the job as a whole (kueue_queue), or use launcher=pytorchjob"
                )

    @property
    def procs_per_worker(self) -> int:
        """Training processes in each pod."""
        return self.num_procs_per_worker or max(1, self.gpus)

    @property
    def limits(self) -> Limits:
        """How long the job may wait, run and be silent."""
        return Limits(
            queued_minutes=self.max_queued_minutes,
            running_minutes=self.max_running_minutes,
            heartbeat_minutes=self.heartbeat_minutes,
            lease_minutes=self.lease_minutes,
            max_restarts=self.max_restarts,
        )


def check_launcher(launcher: object) -> None:
    """Raise ValueError for what trains nowhere."""
    if launcher not in LAUNCHERS:
        raise ValueError(f"launcher must be one of {', '.join(LAUNCHERS)}, got {launcher!r}")


def job_parameters(job: Mapping[str, Any] | None, pytorchjob: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What is given of `job` or, as it was called before, of `pytorchjob`. Raises ValueError if both are."""
    if job and pytorchjob:
        raise ValueError("job and pytorchjob are the same parameter, the latter by its former name: give job alone")
    return job or pytorchjob or {}


def _check_reference(where: str, reference: Any, more_keys: set[str]) -> None:
    """Raise ValueError unless it names a secret or a config map. Never shows what was given: it may be a secret."""
    kinds = {"secret", "config_map"}
    if not (isinstance(reference, Mapping) and len(kinds & set(reference)) == 1):
        raise ValueError(
            f"job {where} must refer to a secret or a config map, like {{'secret': 'name'"
            f"{', ' + repr('key') + ': ...' if more_keys else ''}}}. Values are refused: they would stand in the "
            "manifest for everyone to read"
        )
    refuse_unknown(reference, [*sorted(kinds), *sorted(more_keys)])
    missing = more_keys - set(reference)
    if missing:
        raise ValueError(f"job {where} has no {missing.pop()!r}")
    (name,) = (reference[kind] for kind in kinds & set(reference))
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(f"job {where} does not hold the name of a secret or config map")


def _check_volume(where: str, volume: Mapping[str, Any]) -> None:
    refuse_unknown(volume, ["claim", "mount_path", "read_only"])
    for key in ("claim", "mount_path"):
        if not isinstance(volume.get(key), str):
            raise ValueError(f"job {where} has no {key!r}")
    if not volume["mount_path"].startswith("/"):
        raise ValueError(f"job {where}: mount_path must be absolute, got {volume['mount_path']!r}")
