"""Whether there are nodes for the pods: allocatable GPUs, CPUs and memory, labels, taints and what tolerates them.

What is allocatable may be in use; affinity is left to the scheduler.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from osft.doctor.configuration import Configuration
from osft.doctor.finding import Finding, error, ok, warning
from osft.doctor.subject import Subject

_AUTOSCALER = "unless an autoscaler adds nodes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """Pods that are alike."""

    who: str
    pods: int
    requests: Mapping[str, str]
    """Resource -> quantity, of each pod."""
    selector: Mapping[str, Any]
    tolerations: list[dict[str, Any]]
    setting: str
    """Where tolerations and node selector are set."""


def demands(configuration: Configuration) -> list[Demand]:
    """What the pods of a round ask for; steps that ask for as much as another one are left out."""
    text = configuration.text
    found = []
    for who, gpus, kind in (
        ("precompute_svd", "svd_gpus", "model"),
        ("evaluate_model", "evaluation_gpus", "model"),
        ("train_osft", "training_gpus", "training"),
        ("the other steps", "", "step"),
    ):
        requests = {"cpu": text(f"{kind}_cpu"), "memory": text(f"{kind}_memory")}
        if gpus and text(gpus) not in ("", "0"):
            requests[text("gpu_resource")] = text(gpus)
        found.append(
            Demand(
                who=who,
                pods=1,
                requests={name: amount for name, amount in requests.items() if amount},
                selector=configuration.values.get("node_selector") or {},
                tolerations=configuration.values.get("tolerations") or [],
                setting="the pipeline's parameters",
            )
        )
    if configuration.launcher != "local":
        job = configuration.job
        requests = {"cpu": job.cpu, "memory": job.memory}
        requests |= {job.gpu_resource: str(job.gpus)} if job.gpus else {}
        found.append(
            Demand(
                who="the job's pods",
                pods=job.num_workers,
                requests=requests,
                selector=job.node_selector,
                tolerations=job.tolerations,
                setting="the settings of the job",
            )
        )
    return found


def check_nodes(subject: Subject) -> Iterator[Finding]:
    """Is there a node for each kind of pod: GPUs, CPUs, memory, labels, taints?"""
    configuration, cluster = subject.configuration, subject.cluster
    nodes = [node for node in cluster.items("/api/v1/nodes") if not node["spec"].get("unschedulable")]
    for demand in demands(configuration):
        yield place(demand, nodes)


def place(demand: Demand, nodes: list[dict[str, Any]]) -> Finding:
    """Whether pods find nodes, and if not what keeps them off."""
    wanted = ", ".join(f"{amount} {name}" for name, amount in demand.requests.items())
    labelled = [node for node in nodes if _has_labels(node, demand.selector)]
    if not labelled:
        labels = ", ".join(f"{key}={value}" for key, value in demand.selector.items()) or "none"
        text = f"no node that takes pods has the labels {labels}" if demand.selector else "no node takes pods"
        remedy = f"Correct node_selector in {demand.setting} (kubectl get nodes --show-labels)"
        return error(demand.who, f"{text}, {_AUTOSCALER}", remedy)
    large = [node for node in labelled if _fits(node, demand.requests)]
    if not large:
        most = ", ".join(f"{_most(labelled, name)} {name}" for name in demand.requests)
        text = f"each pod asks for {wanted}, and no node has as much (the most of each: {most}), {_AUTOSCALER}"
        return error(
            demand.who, text, f"Ask for less in {demand.setting}, or add nodes; GPUs: is the device plugin there?"
        )
    reachable = [node for node in large if not _repelling(node, demand.tolerations)]
    if not reachable:
        taint = _repelling(large[0], demand.tolerations)[0]
        toleration = {key: taint[key] for key in ("key", "value", "effect") if taint.get(key)}
        toleration["operator"] = "Equal" if taint.get("value") else "Exists"
        names = ", ".join(node["metadata"]["name"] for node in large[:3])
        text = (
            f"the nodes that are large enough ({names}) have the taint {_shown(taint)}, which the pods do not tolerate"
        )
        return error(demand.who, text, f"Add to tolerations in {demand.setting}: {toleration}")
    room = sum(_times(node, demand.requests) for node in reachable)
    if room < demand.pods:
        text = f"all {len(reachable)} nodes together hold {room} of {demand.pods} pods with {wanted}, {_AUTOSCALER}"
        return warning(demand.who, text, "Lower num_workers or gpus of the job, or add nodes: it would wait for ever")
    return ok(demand.who, f"{demand.pods} x ({wanted}) on {len(reachable)} of {len(nodes)} nodes")


def _has_labels(node: dict[str, Any], selector: Mapping[str, Any]) -> bool:
    labels = node["metadata"].get("labels", {})
    return all(labels.get(key) == value for key, value in selector.items())


def _amount(text: Any) -> Any:
    from kubernetes.utils.quantity import parse_quantity

    return parse_quantity(text)


def _allocatable(node: dict[str, Any], name: str) -> Any:
    return _amount(node.get("status", {}).get("allocatable", {}).get(name, "0"))


def _fits(node: dict[str, Any], requests: Mapping[str, str]) -> bool:
    return all(_allocatable(node, name) >= _amount(amount) for name, amount in requests.items())


def _times(node: dict[str, Any], requests: Mapping[str, str]) -> int:
    """How many such pods an empty node holds."""
    counted = {name: amount for name, amount in requests.items() if _amount(amount)}
    return min((int(_allocatable(node, name) // _amount(amount)) for name, amount in counted.items()), default=0)


def _most(nodes: list[dict[str, Any]], name: str) -> str:
    found = [node.get("status", {}).get("allocatable", {}).get(name, "0") for node in nodes]
    return str(max(found, key=_amount))


def _repelling(node: dict[str, Any], tolerations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The taints of a node that keep pods off."""
    hard = [taint for taint in node["spec"].get("taints", []) if taint["effect"] in ("NoSchedule", "NoExecute")]
    return [taint for taint in hard if not any(tolerates(toleration, taint) for toleration in tolerations)]


def tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    """As the scheduler decides it: no effect means each, no key with Exists means each."""
    if toleration.get("effect") and toleration["effect"] != taint["effect"]:
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return not toleration.get("key") or toleration["key"] == taint["key"]
    return bool(toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", ""))


def _shown(taint: Mapping[str, Any]) -> str:
    value = f"={taint['value']}" if taint.get("value") else ""
    return f"{taint['key']}{value}:{taint['effect']}"
