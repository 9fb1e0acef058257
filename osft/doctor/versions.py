"""What the cluster is made of: Kubernetes, the operators behind each launcher, and which of their APIs are served."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from osft.doctor.cluster_view import ClusterView
from osft.doctor.finding import Finding, NotChecked, error, not_checked, ok, warning
from osft.doctor.subject import Subject, Unreachable

OLDEST_KUBERNETES = (1, 27)
"""Since then a server refuses a field that it does not know, where asked to, and keeps PodSecurity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """What a launcher needs on the cluster."""

    launcher: str
    product: str
    """As a person calls it."""
    group: str
    version: str
    resource: str
    needs: tuple[str, ...] = ()
    """Groups of other products that it works with."""
    deployment: str
    """A pattern for the name of the controller's Deployment."""
    oldest: tuple[int, int]
    """The oldest release whose objects osft writes."""


BACKENDS = (
    Backend(
        launcher="pytorchjob",
        product="Kubeflow's training operator",
        group="kubeflow.org",
        version="v1",
        resource="pytorchjobs",
        deployment=r"training-operator",
        oldest=(1, 9),
    ),
    Backend(
        launcher="trainjob",
        product="Kubeflow Trainer",
        group="trainer.kubeflow.org",
        version="v1alpha1",
        resource="trainjobs",
        needs=("jobset.x-k8s.io",),
        deployment=r"trainer-controller-manager|^kubeflow-trainer",
        oldest=(2, 2),
    ),
)


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
    problems = {backend.launcher: _unserved(cluster, backend) for backend in BACKENDS}
    for backend in BACKENDS:
        problem = problems[backend.launcher]
        if not problem:
            yield ok(backend.product, f"serves {backend.resource}.{backend.group}/{backend.version}")
            yield from _controller(cluster, backend, wanted=wanted == backend.launcher)
        elif wanted != backend.launcher:
            yield ok(backend.product, f"is not usable, and the launcher {wanted!r} does not need it: {problem}")
        else:
            others = [other for other in BACKENDS if not problems[other.launcher]]
            instead = "".join(f", or set launcher: {one.launcher}, for which {one.product} is there" for one in others)
            yield error(
                backend.product,
                f"launcher {wanted!r} cannot work: {problem}",
                f"Install {backend.product} {backend.oldest[0]}.{backend.oldest[1]} or newer{instead}",
            )


def _unserved(cluster: ClusterView, backend: Backend) -> str:
    """Why a backend's objects cannot be made; "" if they can."""
    served = cluster.served(backend.group)
    if backend.resource in served.get(backend.version, set()):
        lacking = [group for group in backend.needs if not cluster.served(group)]
        return f"it needs the API group {lacking[0]}, which the cluster does not serve" if lacking else ""
    others = [version for version, resources in served.items() if backend.resource in resources]
    if others:
        return f"the cluster serves {backend.resource} as {', '.join(others)} only, and osft writes {backend.version}"
    return f"the cluster does not serve {backend.resource}.{backend.group}"


def _controller(cluster: ClusterView, backend: Backend, *, wanted: bool) -> Iterator[Finding]:
    """Of the Deployment that does the work, where it may be read."""
    about = f"controller of {backend.product}"
    try:
        deployments = cluster.items("/apis/apps/v1/deployments")
    except NotChecked as reason:
        yield not_checked(about, f"{reason}. Whether it runs is seen when the first job is taken up")
        return
    found = [one for one in deployments if re.search(backend.deployment, one["metadata"]["name"])]
    if not found:
        yield not_checked(about, "no Deployment has its usual name")
        return
    for deployment in found:
        name = f"{deployment['metadata']['namespace']}/{deployment['metadata']['name']}"
        image = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
        version = version_of(image_tag(image))
        if wanted and not deployment.get("status", {}).get("availableReplicas"):
            remedy = f"See why: kubectl -n {name.replace('/', ' describe deployment ')}"
            yield error(about, f"{name} ({image}) has no pod that is ready: no job would be taken up", remedy)
        elif wanted and version is not None and version < backend.oldest:
            oldest = ".".join(map(str, backend.oldest))
            yield warning(about, f"{name} runs {image}, older than {oldest}", f"Upgrade it to {oldest} or newer")
        else:
            yield ok(about, f"{name} runs {image}")


def init_container_template(cluster: ClusterView) -> bool | None:
    """Whether the training operator is given a template of its own for its init container; None if it is unknown."""
    try:
        deployments = cluster.items("/apis/apps/v1/deployments")
    except NotChecked:
        return None
    for deployment in deployments:
        if re.search(BACKENDS[0].deployment, deployment["metadata"]["name"]):
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
