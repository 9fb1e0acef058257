"""The environment of pods: what the operator adds to a template, and what the kubelet makes of a container's."""

import base64
import re
from collections.abc import Mapping
from typing import Any

from tests.cluster.store import Object, Store

PORT = "23456"
ANNOTATION = re.compile(r"metadata\.annotations\['(.+)'\]")
REFERENCE = re.compile(r"\$(\$|\(([A-Za-z_][\w.-]*)\))")


class ConfigError(Exception):
    """A container that cannot be made: CreateContainerConfigError."""


def operator_environment(job: Object, replica: str, index: int) -> list[dict[str, str]]:
    """What the operator v1.9 appends to every container. `replica`: Master or Worker, `index` of the pod in it."""
    name, spec = job["metadata"]["name"], job["spec"]
    pods = sum(found.get("replicas", 1) for found in spec["pytorchReplicaSpecs"].values())
    processes = spec.get("nprocPerNode", "")
    rank = str(index + 1 if replica == "Worker" else index)
    values = {"PYTHONUNBUFFERED": "1", "MASTER_PORT": PORT, "PET_MASTER_PORT": PORT}
    values |= {"MASTER_ADDR": f"{name}-master-0", "PET_MASTER_ADDR": f"{name}-master-0"}
    values |= {"WORLD_SIZE": str(pods * int(processes or 1)), "RANK": rank}  # RANK is the pod's, not a process's
    values |= {"PET_NODE_RANK": rank, "PET_NNODES": str(pods)}
    values |= {"PET_NPROC_PER_NODE": processes} if processes else {}
    return [{"name": key, "value": value} for key, value in values.items()]


def expand(text: str, values: Mapping[str, str]) -> str:
    """`$(NAME)` of a value, a command or an argument; `$$` stands for one dollar, an unknown name stays as it is."""

    def replaced(match: re.Match[str]) -> str:
        return "$" if match[1] == "$" else values.get(match[2], match[0])

    return REFERENCE.sub(replaced, text)


def container_environment(container: dict[str, Any], pod: Object, store: Store) -> dict[str, str]:
    """`envFrom` and `env` of a pod's container, the later over the earlier. Raises ConfigError for what is missing."""
    values: dict[str, str] = {}
    for source in container.get("envFrom") or []:
        values |= _data(source, "Ref", store)
    for entry in container.get("env") or []:
        if "valueFrom" not in entry:
            values[entry["name"]] = expand(entry.get("value") or "", values)
            continue
        ((source, reference),) = entry["valueFrom"].items()
        if source == "fieldRef":
            (annotation,) = ANNOTATION.findall(reference["fieldPath"])
            values[entry["name"]] = pod["metadata"]["annotations"][annotation]
            continue
        data = _data(entry["valueFrom"], "KeyRef", store)
        if reference["key"] not in data:
            raise ConfigError(f"couldn't find key {reference['key']} in {reference['name']}")
        values[entry["name"]] = data[reference["key"]]
    return values


def _data(source: dict[str, Any], suffix: str, store: Store) -> dict[str, str]:
    """What the secret or the config map holds that is referred to."""
    ((field, reference),) = source.items()
    kind = field.removesuffix(suffix).lower()  # secret, configmap
    found = store.find(f"{kind}s", reference["name"])
    if found is None:
        raise ConfigError(f'{kind} "{reference["name"]}" not found')
    if kind == "configmap":
        return dict(found["data"])
    return {key: base64.b64decode(text).decode() for key, text in found["data"].items()}
