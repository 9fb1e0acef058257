"""All checks, in the order in which they are made and shown."""

from collections.abc import Iterator, Sequence

from osft.doctor.admission import check_job, check_namespace, check_pods, check_quotas
from osft.doctor.finding import Check, Finding
from osft.doctor.images import check_images
from osft.doctor.inputs import check_data, check_model
from osft.doctor.machine import check_gpus, check_memory, check_packages
from osft.doctor.mlflow_server import check_mlflow
from osft.doctor.nodes import check_nodes
from osft.doctor.object_store import check_object_store
from osft.doctor.pipelines_server import check_pipelines
from osft.doctor.queues import check_gang_scheduler, check_queue
from osft.doctor.references import check_account, check_claims, check_secrets
from osft.doctor.rights import check_rights
from osft.doctor.storage_folder import check_storage_folder
from osft.doctor.subject import Subject
from osft.doctor.versions import check_api_server, check_launchers

CHECKS = (
    Check("cluster", "API server", check_api_server),
    Check("cluster", "launchers", check_launchers),
    Check("cluster", "namespace", check_namespace),
    Check("cluster", "rights", check_rights),
    Check("pods", "dry run of the job", check_job),
    Check("pods", "dry run of its pods", check_pods),
    Check("pods", "quotas", check_quotas),
    Check("pods", "claims", check_claims),
    Check("pods", "secrets and config maps", check_secrets),
    Check("pods", "account and priority", check_account),
    Check("pods", "nodes", check_nodes),
    Check("pods", "Kueue", check_queue),
    Check("pods", "gang scheduler", check_gang_scheduler),
    Check("pods", "images", check_images),
    Check("services", "Pipelines server", check_pipelines),
    Check("services", "MLflow", check_mlflow),
    Check("services", "object store", check_object_store),
    Check("inputs", "storage folder", check_storage_folder),
    Check("inputs", "model", check_model),
    Check("inputs", "data", check_data),
    Check("machine", "packages", check_packages),
    Check("machine", "GPUs", check_gpus),
    Check("machine", "memory and disk", check_memory),
)
AREAS = tuple(dict.fromkeys(check.area for check in CHECKS))


def examine(subject: Subject, areas: Sequence[str] = AREAS) -> Iterator[Finding]:
    """The findings of all checks of the areas, as they are made. Never raises for what a check met."""
    for check in CHECKS:
        if check.area in areas:
            yield from check.findings(subject)
