"""Whether the cluster would admit the training job and its pods: tried on the server, which keeps nothing.

A pod is admitted when its controller makes it, not with the job, so the pods are tried, too: PodSecurity, quotas, limit
ranges and webhooks speak only then.
"""

import re
from collections.abc import Iterator

from osft.doctor.cluster_view import ClusterView, Refused
from osft.doctor.finding import Finding, NotChecked, error, ok, warning
from osft.doctor.subject import Subject
from osft.doctor.trial_job import TrialJob, trial_job, with_init_container
from osft.doctor.versions import init_container_template

_ENFORCE = "pod-security.kubernetes.io/enforce"
_REMEDIES = (
    (r"violates PodSecurity", "Use a namespace whose pod-security.kubernetes.io/enforce admits the pod"),
    (r"must specify (\S*,)?limits\.cpu", "Set cpu_limit in the settings of the job: the namespace's quota asks for it"),
    (r"exceeded quota", "Ask for less (num_workers, gpus, cpu, memory), or have the ResourceQuota raised"),
    (r"must specify", "Set what the namespace's ResourceQuota asks for in the settings of the job"),
    (r"(maximum|minimum) \S+ usage", "Keep to the namespace's LimitRange: change cpu, cpu_limit or memory of the job"),
    (r"(?i)serviceaccount", "Create the service account, or correct service_account in the settings of the job"),
    (r"(?i)priorityclass", "Create the PriorityClass, or correct priority_class in the settings of the job"),
    (r"unknown field", "Upgrade the operator: its CRD does not know a field that osft writes"),
    (r"admission webhook", "Ask who runs that webhook what it wants, or use another namespace"),
)


def check_namespace(subject: Subject) -> Iterator[Finding]:
    """Is the namespace there, and which PodSecurity level does it enforce?"""
    cluster = subject.cluster
    about = f"namespace {cluster.namespace}"
    found = cluster.get(f"/api/v1/namespaces/{cluster.namespace}")
    if found is None:
        yield error(
            about, "does not exist", f"kubectl create namespace {cluster.namespace}, or give another one: --namespace"
        )
        return
    if found.get("status", {}).get("phase") == "Terminating":
        yield error(about, "is being deleted: nothing can be made in it", "Give another one: --namespace")
        return
    level = found["metadata"].get("labels", {}).get(_ENFORCE)
    yield ok(
        about, f"enforces PodSecurity {level!r}" if level else "has no PodSecurity label; the cluster's default holds"
    )


def check_job(subject: Subject) -> Iterator[Finding]:
    """Does the server take the job, and what it needs, as they would be sent?"""
    cluster, job = subject.cluster, _job(subject)
    resources = [*job.kind.needs, job.kind.resource]
    absent = False
    for resource, manifest in zip(resources, job.manifests, strict=True):
        about = f"dry run of the {resource.kind}"
        path = f"/apis/{resource.api_version}/namespaces/{job.namespace}/{resource.plural}"
        try:
            cluster.try_create(path, manifest)
        except Refused as refusal:
            if refusal.status == 409:
                yield ok(about, "is there already")
            elif absent and job.manifests[0]["metadata"]["name"] in str(refusal):
                yield ok(about, f"cannot be tried before the {resources[0].kind} that the step brings along is there")
            else:
                remedy = job.kind.refusal_hint(str(refusal)) or remedy_for(str(refusal))
                yield error(about, f"the server refuses it ({refusal.status}): {refusal}", remedy)
        else:
            absent = True
            yield ok(about, "the server accepts it, strictly")


def check_pods(subject: Subject) -> Iterator[Finding]:
    """Would the job's pods be admitted: PodSecurity, quotas, limit ranges, webhooks?"""
    cluster, job = subject.cluster, _job(subject)
    about = "dry run of a pod of the job"
    try:
        cluster.try_create(_pods(job), job.pod)
    except Refused as refusal:
        yield error(about, f"it would be refused ({refusal.status}): {refusal}", remedy_for(str(refusal)))
        return
    yield ok(about, "it would be admitted")
    if job.gets_init_container:
        yield from _init_container(cluster, job)


def _init_container(cluster: ClusterView, job: TrialJob) -> Iterator[Finding]:
    """The training operator adds one to Workers, which a restricted namespace refuses unless it has a template."""
    about = "init container of the training operator"
    try:
        cluster.try_create(_pods(job), with_init_container(job.pod))
    except Refused as refusal:
        hint = job.kind.refusal_hint(str(refusal)) or remedy_for(str(refusal))
        remedy = f"{hint}; or set launcher: trainjob, whose pods have none"
        template = init_container_template(cluster)
        text = f"a Worker with it, as the operator makes it by itself, would be refused: {refusal}"
        if template:
            yield warning(about, f"{text}. The operator is given a template for it, which is not known here", remedy)
        elif template is None:
            yield warning(about, f"{text}. Whether the operator has a template for it may not be read", remedy)
        else:
            yield error(about, text, remedy)
    else:
        yield ok(about, "a Worker with it would be admitted")


def check_quotas(subject: Subject) -> Iterator[Finding]:
    """Is there room in the namespace's quotas now?"""
    cluster = subject.cluster
    quotas = cluster.items(cluster.path("resourcequotas"))
    if not quotas:
        yield ok("quotas", f"namespace {cluster.namespace} has none")
    for quota in quotas:
        about = f"ResourceQuota {quota['metadata']['name']}"
        status = quota.get("status", {})
        used, hard = status.get("used", {}), status.get("hard", {})
        full = [name for name in hard if used.get(name) == hard[name] != "0"]
        if full:
            shown = ", ".join(f"{name} {used[name]} of {hard[name]}" for name in full)
            yield warning(about, f"is used up: {shown}", "Wait for other work to end, or have the quota raised")
        else:
            yield ok(about, ", ".join(f"{name} {used.get(name, '0')} of {limit}" for name, limit in hard.items()))


def remedy_for(message: str) -> str:
    """What to do about an admission's refusal."""
    found = (remedy for pattern, remedy in _REMEDIES if re.search(pattern, message))
    return next(found, "Correct the settings of the job as the message says")


def _job(subject: Subject) -> TrialJob:
    configuration = subject.job_wanted()
    try:
        return trial_job(configuration, subject.cluster.namespace)
    except ValueError as reason:
        raise NotChecked(f"no job can be made of the parameters: {reason}") from None


def _pods(job: TrialJob) -> str:
    return f"/api/v1/namespaces/{job.namespace}/pods"
