"""From a training run's settings to its job on a cluster."""

import logging
import os
from pathlib import PurePosixPath

from osft.kubernetes.api import ClusterApi, own_namespace
from osft.kubernetes.kinds import JobKind
from osft.kubernetes.launcher import JobLauncher
from osft.kubernetes.manifest import JobIdentity, JobOwner, Storage, job_name, label_value
from osft.kubernetes.pytorchjob import PyTorchJob
from osft.kubernetes.settings import JobSettings
from osft.kubernetes.trainjob import TrainJob
from osft.process import logs
from osft.settings.training import TrainConfig
from osft.training.job import train_arguments

logger = logging.getLogger(__name__)

TASK = "train-osft"
"""The pipeline's task that this is the job of."""

KINDS: tuple[JobKind, ...] = (PyTorchJob(), TrainJob())
"""What can train on a cluster."""


def training_job(
    config: TrainConfig,
    settings: JobSettings,
    *,
    launcher: str,
    image: str,
    storage: Storage,
    pipeline_run_id: str,
    mlflow_run_id: str,
) -> JobLauncher:
    """The launcher of the job that trains with `config` in each of its pods. Nothing is created yet.

    `launcher` is the name of its kind, such as "pytorchjob".

    Raises ValueError for settings that cannot work and without a cluster.
    """
    if config.nnodes != 1 or config.nproc_per_node != "auto":
        raise ValueError(
            "nnodes and nproc_per_node are set by the job: give num_workers and num_procs_per_worker there"
        )
    image = settings.image or image
    if not image:
        raise ValueError("the job has no image, and the pipeline was compiled without one. Set job.image")
    if storage.claim:
        mount = PurePosixPath(settings.storage_mount)
        for name in ("model_path", "data_path", "factors", "ckpt_output_dir"):
            path = str(getattr(config, name))
            if mount not in PurePosixPath(os.path.normpath(path)).parents:
                raise ValueError(
                    f"{name} {path} is not below {mount}, where the pods have the claim {storage.claim}. Set "
                    "job.storage_mount to the folder where the steps have it"
                )
    api = ClusterApi(settings.namespace)
    identity = JobIdentity(
        name=job_name(pipeline_run_id, TASK),
        namespace=api.namespace,
        labels={
            "osft/pipeline-run-id": label_value(pipeline_run_id),
            "osft/task": TASK,
            "osft/mlflow-run-id": label_value(mlflow_run_id),
        },
        owner=_owner(api),
        log_context=logs.context_of(TASK, pipeline_run_id),
    )
    command = ["osft", *train_arguments(config)]
    kind = next(kind for kind in KINDS if kind.launcher == launcher)
    manifests = kind.manifests(identity, settings, image=image, command=command, storage=storage)
    return JobLauncher(api, kind, manifests, other_kinds=[other for other in KINDS if other is not kind])


def _owner(api: ClusterApi) -> JobOwner | None:
    """The workflow that this step's pod belongs to, or the pod, or None outside of a cluster.

    The workflow goes before the pod: a retried step has another pod, and the job must outlive the first one.
    """
    if api.namespace != own_namespace():
        return None  # an owner has to be in the namespace of what it owns
    name = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
    try:
        pod = api.pod(name) if name else None
    except PermissionError as error:
        logger.warning(f"train: the job will not be deleted with the pipeline run: {error}")
        return None
    if pod is None:
        return None
    for owner in pod["metadata"].get("ownerReferences", []):
        if owner["kind"] == "Workflow":
            return JobOwner(api_version=owner["apiVersion"], kind="Workflow", name=owner["name"], uid=owner["uid"])
    return JobOwner(api_version="v1", kind="Pod", name=name, uid=pod["metadata"]["uid"])
