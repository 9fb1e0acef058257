"""What the pods refer to by name: claims, secrets, config maps, an account, a priority. Only whether it is there.

Of a secret nothing but its metadata is asked for, so no value reaches this process.
"""

from collections.abc import Iterator
from typing import Any

from osft.doctor.cluster_view import ClusterView
from osft.doctor.finding import Finding, NotChecked, error, not_checked, ok, warning
from osft.doctor.subject import Subject

OPTIONAL_SECRETS = {
    "osft-huggingface": "models and data of the hub that ask for a login",
    "osft-mlflow": "an MLflow server that asks for a login",
}
"""Secrets that the compiled pipeline's steps use where they are there -> what for."""


def check_claims(subject: Subject) -> Iterator[Finding]:
    """Are the claims there, bound, and mountable on several nodes at once?"""
    configuration, cluster = subject.configuration, subject.cluster
    claim = configuration.storage.claim
    if claim is None:
        yield ok("claims", f"none is needed for {configuration.storage_root}")
    else:
        yield _claim(cluster, claim, "storage_claim", read_only=False)
    if configuration.launcher == "local":
        return
    of_job = subject.job_cluster
    if claim and of_job.namespace != cluster.namespace:
        yield _claim(of_job, claim, "namespace of the job", read_only=False)
    for volume in configuration.job.volumes:
        yield _claim(of_job, volume["claim"], "volumes of the job", read_only=bool(volume.get("read_only")))


def _claim(cluster: ClusterView, name: str, parameter: str, *, read_only: bool) -> Finding:
    about = f"claim {name}"
    found = cluster.get(cluster.path("persistentvolumeclaims", name))
    if found is None:
        remedy = f"kubectl apply -k pipelines/continual_learning/manifests/base, or correct {parameter}"
        return error(about, f"does not exist in namespace {cluster.namespace}", remedy)
    modes, phase = found["spec"].get("accessModes", []), found.get("status", {}).get("phase")
    enough = {"ReadWriteMany", "ReadOnlyMany"} if read_only else {"ReadWriteMany"}
    if not enough & set(modes):
        remedy = (
            "Make it anew with accessModes: [ReadWriteMany], of a storage class that can do it (NFS, CephFS, EFS, "
            "Filestore); access modes cannot be changed. Or keep everything in an object store (storage_root: s3://…)"
        )
        return error(about, f"has {', '.join(modes)}: pods on other nodes could not mount it", remedy)
    if phase == "Lost":
        return error(about, "its volume is gone (Lost)", "Restore the volume, or make the claim anew")
    if phase != "Bound":
        return _unbound(cluster, about, found)
    size = found["status"].get("capacity", {}).get("storage", "?")
    return ok(about, f"Bound, {', '.join(modes)}, {size}")


def _unbound(cluster: ClusterView, about: str, claim: dict[str, Any]) -> Finding:
    """Of a claim that waits for a volume: some storage classes bind it to the first pod only."""
    kind = claim["spec"].get("storageClassName")
    try:
        found = cluster.get(f"/apis/storage.k8s.io/v1/storageclasses/{kind}") if kind else None
    except NotChecked:
        remedy = f"See why: kubectl describe pvc {about.removeprefix('claim ')}"
        return warning(about, f"is not bound yet (storage class {kind}, which may not be read)", remedy)
    if found and found.get("volumeBindingMode") == "WaitForFirstConsumer":
        return ok(about, f"is bound when the first pod mounts it (storage class {kind})")
    reason = f"its storage class {kind} does not exist" if kind and not found else f"storage class {kind or 'none'}"
    remedy = (
        "Give the claim a storage class that makes ReadWriteMany volumes (kubectl get storageclass), or make a volume "
        "for it"
    )
    return error(about, f"is {claim.get('status', {}).get('phase', 'Pending')}, not Bound: {reason}", remedy)


def check_secrets(subject: Subject) -> Iterator[Finding]:
    """Are the secrets and config maps there that the pods get their environment from?"""
    configuration, cluster = subject.configuration, subject.cluster
    wanted: dict[tuple[str, str], str] = {}
    if configuration.storage.secret:
        wanted["secrets", configuration.storage.secret] = "storage_secret"
    if configuration.launcher != "local":
        job = configuration.job
        for where, reference in [*((f"env {k} of the job", v) for k, v in job.env.items()), *_env_from(job.env_from)]:
            kind = "secrets" if "secret" in reference else "configmaps"
            wanted.setdefault((kind, reference.get("secret") or reference["config_map"]), where)
        for name in job.image_pull_secrets:
            wanted.setdefault(("secrets", name), "image_pull_secrets of the job")
    of_pods = cluster if configuration.launcher == "local" else subject.job_cluster
    for (kind, name), where in wanted.items():
        yield _existence(of_pods, kind, name, where)
    for name, purpose in OPTIONAL_SECRETS.items():
        if ("secrets", name) not in wanted:
            yield _optional_secret(cluster, name, purpose)


def _env_from(references: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [("env_from of the job", reference) for reference in references]


def _existence(cluster: ClusterView, kind: str, name: str, where: str) -> Finding:
    word = {"secrets": "secret", "configmaps": "config map", "serviceaccounts": "service account"}[kind]
    about = f"{word} {name}"
    try:
        there = cluster.exists(kind, name)
    except NotChecked as reason:
        return not_checked(about, str(reason))
    if there:
        return ok(about, f"exists ({where}); its content is not read")
    verb = {"secrets": "secret generic", "configmaps": "configmap", "serviceaccounts": "serviceaccount"}[kind]
    remedy = f"kubectl -n {cluster.namespace} create {verb} {name}, or correct {where}"
    return error(about, f"does not exist in namespace {cluster.namespace} ({where}): no pod would start", remedy)


def _optional_secret(cluster: ClusterView, name: str, purpose: str) -> Finding:
    about = f"secret {name}"
    try:
        there = cluster.exists("secrets", name)
    except NotChecked as reason:
        return not_checked(about, str(reason))
    return ok(about, "exists; its content is not read" if there else f"is not there; only {purpose} need it")


def check_account(subject: Subject) -> Iterator[Finding]:
    """Are the service account and the priority class of the job's pods there?"""
    configuration, cluster = subject.job_wanted(), subject.job_cluster
    job = configuration.job
    if job.service_account:
        yield _existence(cluster, "serviceaccounts", job.service_account, "service_account of the job")
    if job.priority_class:
        about = f"PriorityClass {job.priority_class}"
        if cluster.exists("priorityclasses", job.priority_class, api="scheduling.k8s.io/v1", namespaced=False):
            yield ok(about, "exists")
        else:
            yield error(about, "does not exist", "Create it, or correct priority_class of the job")
    if not job.service_account and not job.priority_class:
        yield ok("account and priority", "the namespace's defaults")
