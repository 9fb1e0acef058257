"""The environment of pods: what the operator adds to a template, and what the kubelet makes of a container's."""

import base64
import re
from collections.abc import Mapping
from typing import Any

from tests.cluster.schema import CONTAINER, PORT, PORT_NAME
from tests.cluster.store import Object, Store

REFERENCE = re.compile(r"\$(\$|\(([A-Za-z_][\w.-]*)\))")


class ConfigError(Exception):
    """A container that cannot be made: CreateContainerConfigError."""


def operator_environment(job: Object, replica: str, index: int) -> list[dict[str, str]]:
    """What the operator v1.9 appends to every container. `replica`: Master or Worker, `index` of the pod in it."""
    name, spec = job["metadata"]["name"], job["spec"]
    replicas, elastic = spec["pytorchReplicaSpecs"], spec.get("elasticPolicy")
    pods = sum(found.get("replicas", 1) for found in replicas.values())
    processes = str(spec.get("nprocPerNode", ""))
    values = {"PYTHONUNBUFFERED": "1"}
    if "Master" in replicas:
        port = str(container_port(replicas["Master"]))
        rank = str(index + 1 if replica == "Worker" else index)
        values |= {"MASTER_PORT": port, "PET_MASTER_PORT": port}
        values |= {"MASTER_ADDR": f"{name}-master-0", "PET_MASTER_ADDR": f"{name}-master-0"}
        values["WORLD_SIZE"] = str(pods * (int(processes) if processes.isdigit() else 1))
        values |= {"RANK": rank, "PET_NODE_RANK": rank}
    if elastic is not None:
        values |= elastic_environment(name, elastic, replicas)
    else:
        values["PET_NNODES"] = str(pods)
    if processes:
        values["PET_NPROC_PER_NODE"] = processes
    return [{"name": key, "value": value} for key, value in values.items()]


def elastic_environment(name: str, elastic: dict[str, Any], replicas: dict[str, Any]) -> dict[str, str]:
    host = elastic.get("rdzvHost", f"{name}-worker-0")
    port = elastic.get("rdzvPort") or container_port(replicas.get("Worker", {}))
    values = {"PET_RDZV_ENDPOINT": f"{host}:{port}", "PET_RDZV_BACKEND": elastic.get("rdzvBackend", "c10d")}
    least, most = elastic.get("minReplicas"), elastic.get("maxReplicas")
    workers = replicas.get("Worker", {}).get("replicas", 1)
    values["PET_NNODES"] = str(workers) if least is None and most is None else f"{least}:{most}"
    optional = {"PET_MAX_RESTARTS": "maxRestarts", "PET_NPROC_PER_NODE": "nProcPerNode", "PET_RDZV_ID": "rdzvId"}
    values |= {key: str(elastic[field]) for key, field in optional.items() if field in elastic}
    if elastic.get("rdzvConf"):
        values["PET_RDZV_CONF"] = ",".join(f"{part['key']}={part['value']}" for part in elastic["rdzvConf"])
    if elastic.get("standalone"):
        values["PET_STANDALONE"] = ""
    return values


def container_port(replica: dict[str, Any]) -> int:
    for container in replica.get("template", {}).get("spec", {}).get("containers", []):
        if container["name"] == CONTAINER:
            for port in container.get("ports") or []:
                if port.get("name") == PORT_NAME:
                    return port["containerPort"]
    return PORT


def expand(text: str, values: Mapping[str, str]) -> str:
    """`$(NAME)` of a value, a command or an argument; `$$` stands for one dollar, an unknown name stays as it is."""

    def replaced(match: re.Match[str]) -> str:
        return "$" if match[1] == "$" else values.get(match[2], match[0])

    return REFERENCE.sub(replaced, text)


def container_environment(container: dict[str, Any], pod: Object, store: Store) -> dict[str, str]:
    """`envFrom` and `env` of a container, the later over the earlier.

    Raises:
        ConfigError: a secret, a config map or a key of one is missing, or a value is of a kind that is not served.
    """
    values: dict[str, str] = {}
    for source in container.get("envFrom") or []:
        for field, plural in (("secretRef", "secrets"), ("configMapRef", "configmaps")):
            if field in source:
                content = data_of(store, plural, pod, source[field])
                values |= {source.get("prefix", "") + key: text for key, text in (content or {}).items()}
    for entry in container.get("env") or []:
        if "valueFrom" in entry:
            text = referenced(entry["valueFrom"], pod, store)
            if text is not None:
                values[entry["name"]] = text
        else:
            values[entry["name"]] = expand(entry.get("value") or "", values)
    return values


def referenced(source: dict[str, Any], pod: Object, store: Store) -> str | None:
    for field, plural in (("secretKeyRef", "secrets"), ("configMapKeyRef", "configmaps")):
        if field in source:
            content = data_of(store, plural, pod, source[field])
            key = source[field]["key"]
            if content is not None and key not in content and not source[field].get("optional"):
                kind = "Secret" if plural == "secrets" else "ConfigMap"
                at = f"{pod['metadata']['namespace']}/{source[field]['name']}"
                raise ConfigError(f"couldn't find key {key} in {kind} {at}")
            return (content or {}).get(key)
    if "fieldRef" in source:
        return field_of(pod, source["fieldRef"]["fieldPath"])
    raise ConfigError(f"the stand-in does not serve {', '.join(source)}")


def data_of(store: Store, plural: str, pod: Object, reference: dict[str, Any]) -> dict[str, str] | None:
    found = store.find(plural, pod["metadata"]["namespace"], reference["name"])
    if found is None:
        if reference.get("optional"):
            return None
        raise ConfigError(f'{plural.removesuffix("s")} "{reference["name"]}" not found')
    if plural == "configmaps":
        return found.get("data") or {}
    return {key: base64.b64decode(text).decode() for key, text in (found.get("data") or {}).items()}


def field_of(pod: Object, path: str) -> str:
    metadata = pod["metadata"]
    if match := re.fullmatch(r"metadata\.(labels|annotations)\['([^']+)'\]", path):
        return (metadata.get(match[1]) or {}).get(match[2], "")
    fields = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": pod["spec"].get("nodeName", ""),
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName", "default"),
        "status.podIP": "127.0.0.1",
        "status.hostIP": "127.0.0.1",
    }
    if path not in fields:
        raise ConfigError(f"the stand-in does not serve the field {path}")
    return fields[path]
