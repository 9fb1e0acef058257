"""What the cluster is made of: Kubernetes, the operators behind each launcher, and which of their APIs are served."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from osft.doctor.cluster_view import ClusterView
from osft.doctor.finding import Finding, NotChecked, error, not_checked, ok, warning
from osft.doctor.subject import Subject, Unreachable
from osft.kubernetes.kinds import JobKind
from osft.kubernetes.training_job import KINDS

OLDEST_KUBERNETES = (1, 27)
"""Since then a server refuses a field that it does not know, where asked to, and keeps PodSecurity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Controller:
    """What makes pods of a kind of job."""

    deployment: str
    """A pattern for the name of its Deployment."""
    oldest: tuple[int, int]
    """The oldest release that takes the objects that osft writes."""
    groups: tuple[str, ...] = ()
    """API groups of other products that it works with."""


CONTROLLERS = {
    "pytorchjob": Controller(deployment=r"training-operator", oldest=(1, 9)),
    "trainjob": Controller(
        deployment=r"trainer-controller-manager|^kubeflow-trainer", oldest=(2, 2), groups=("jobset.x-k8s.io",)
    ),
}
"""Launcher -> what stands behind it on the cluster."""


def check_api_server(subject: Subject) -> Iterator[Finding]:
    """Does the API server answer, and is its Kubernetes new enough?"""
    try:
        cluster = subject.cluster
    except Unreachable as failure:
        yield error("API server", str(failure), "Check KUBECONFIG and the network: kubectl version must answer")
        return
    found = cluster.get("/version") or {}
    about = f"Kubernetes at {cluster.address}"
    version = version_of(f"{found.get('major', '')}.{found.get('minor', '')}")
    if version is None:
        yield not_checked(about, f"the server does not tell its version ({found})")
    elif version < OLDEST_KUBERNETES:
        oldest = ".".join(map(str, OLDEST_KUBERNETES))
        text = (
            f"version {found['gitVersion']} is older than {oldest}: a field that it does not know is dropped silently"
        )
        yield warning(about, text, f"Upgrade the cluster to {oldest} or newer")
    else:
        yield ok(about, f"version {found['gitVersion']}, namespace {cluster.namespace}")


def check_launchers(subject: Subject) -> Iterator[Finding]:
    """Are the API and the controller of the configured launcher there, and those of the others?"""
    cluster = subject.cluster
    wanted = subject.configured.launcher if subject.configured else ""
    problems = {kind.launcher: _unserved(cluster, kind) for kind in KINDS}
    for kind in KINDS:
        problem, about = problems[kind.launcher], kind.resource.brought_by
        if not problem:
            yield ok(about, f"serves {kind.resource.plural} as {kind.resource.api_version}")
            yield from _controller(cluster, kind, wanted=wanted == kind.launcher)
        elif wanted != kind.launcher:
            yield ok(about, f"is not usable{f', and not needed for launcher {wanted!r}' if wanted else ''}: {problem}")
        else:
            others = [other for other in KINDS if not problems[other.launcher]]
            instead = "".join(
                f", or set launcher: {one.launcher}, for which {one.resource.brought_by} is there" for one in others
            )
            oldest = ".".join(map(str, CONTROLLERS[kind.launcher].oldest))
            remedy = f"Install {about} {oldest} or newer{instead}"
            yield error(about, f"launcher {wanted!r} cannot work: {problem}", remedy)


def _unserved(cluster: ClusterView, kind: JobKind) -> str:
    """Why objects of a kind cannot be made; "" if they can."""
    for resource in (*kind.needs, kind.resource):
        served = cluster.served(resource.group)
        if resource.plural in served.get(resource.version, set()):
            continue
        others = [version for version, resources in served.items() if resource.plural in resources]
        if others:
            there = ", ".join(others)
            return f"the cluster serves {resource.plural} as {there} only, and osft writes {resource.version}"
        return f"the cluster does not serve {resource.plural}.{resource.group}"
    lacking = [group for group in CONTROLLERS[kind.launcher].groups if not cluster.served(group)]
    return f"it works with {lacking[0]}, which the cluster does not serve" if lacking else ""


def _controller(cluster: ClusterView, kind: JobKind, *, wanted: bool) -> Iterator[Finding]:
    """Of the Deployment that does the work, where it may be read."""
    about, expected = f"controller of {kind.resource.brought_by}", CONTROLLERS[kind.launcher]
    try:
        deployments = cluster.items("/apis/apps/v1/deployments")
    except NotChecked as reason:
        yield not_checked(about, f"{reason}. Whether it runs is seen when the first job is taken up")
        return
    found = [one for one in deployments if re.search(expected.deployment, one["metadata"]["name"])]
    if not found:
        yield not_checked(about, "no Deployment has its usual name")
    for deployment in found:
        namespace, name = deployment["metadata"]["namespace"], deployment["metadata"]["name"]
        image = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
        version = version_of(image_tag(image))
        if wanted and not deployment.get("status", {}).get("availableReplicas"):
            remedy = f"See why: kubectl -n {namespace} describe deployment {name}"
            yield error(about, f"{name} ({image}) has no pod that is ready: no job would be taken up", remedy)
        elif wanted and version is not None and version < expected.oldest:
            oldest = ".".join(map(str, expected.oldest))
            yield warning(about, f"{name} runs {image}, older than {oldest}", f"Upgrade it to {oldest} or newer")
        else:
            yield ok(about, f"{namespace}/{name} runs {image}")


def init_container_template(cluster: ClusterView) -> bool | None:
    """Whether the training operator is given a template of its own for its init container; None if it is unknown."""
    try:
        deployments = cluster.items("/apis/apps/v1/deployments")
    except NotChecked:
        return None
    for deployment in deployments:
        if re.search(CONTROLLERS["pytorchjob"].deployment, deployment["metadata"]["name"]):
            container = deployment["spec"]["template"]["spec"]["containers"][0]
            given: list[Any] = [*container.get("command", []), *container.get("args", [])]
            return any("--pytorch-init-container-template-file" in str(one) for one in given)
    return None


def image_tag(image: str) -> str:
    """The tag of an image, without a digest; "" if it has none."""
    name = image.partition("@")[0].rpartition("/")[2]
    return name.partition(":")[2]


def version_of(text: str) -> tuple[int, int] | None:
    """The first two numbers of a version such as `v1.9.4`, `1.36+` or `2.17.0-rc1`."""
    found = re.match(r"v?(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None
