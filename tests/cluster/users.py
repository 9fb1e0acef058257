"""As whom a container runs, and what the kubelet refuses to start (`runAsNonRoot`)."""

from typing import Any

from tests.cluster.store import Object

ROOT_IMAGES = ("alpine", "busybox", "debian", "ubuntu", "python")  # images whose user is root; all others': 1000


def root_problem(pod: Object, container: dict[str, Any]) -> str:
    """Why a container must not start as root, in the kubelet's words; "" if it may start.

    What the container's securityContext does not say, the pod's says for all of its containers, init containers too.
    """
    context = {**(pod["spec"].get("securityContext") or {}), **(container.get("securityContext") or {})}
    if not context.get("runAsNonRoot"):
        return ""
    where = f'(pod: "{pod["metadata"]["name"]}_{pod["metadata"]["namespace"]}", container: {container["name"]})'
    user = context.get("runAsUser")
    if user == 0:
        return f"container's runAsUser breaks non-root policy {where}"
    image = container.get("image", "").rsplit("/", 1)[-1].partition(":")[0]
    if user is None and image in ROOT_IMAGES:
        return f"container has runAsNonRoot and image will run as root {where}"
    return ""
