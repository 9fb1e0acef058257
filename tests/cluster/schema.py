"""What the API server and the operator's webhook refuse of a PyTorchJob, and what they fill in."""

import functools
import re
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tests.cluster.errors import ApiError

CRD = Path(__file__).parent / "pytorchjobs-crd.yaml"
REPLICA_TYPES = ("Master", "Worker")  # the CRD accepts any name here, the operator does nothing with it
CONTAINER = "pytorch"
PORT_NAME, PORT = "pytorchjob-port", 23456
DNS_SUBDOMAIN = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
DNS_LABEL = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")  # RFC 1035, for the services that bear the pods' names
LABEL_VALUE = re.compile(r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$")
LABEL_KEY = re.compile(r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")


@functools.cache
def job_schema() -> dict[str, Any]:
    (version,) = yaml.load(CRD.read_text(encoding="utf-8"), yaml.CSafeLoader)["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    close(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@functools.cache
def job_validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(job_schema())


def close(schema: Any) -> None:
    """Make unknown fields errors: a real API server drops them, and a typo would be found on a cluster only."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
        for value in schema.values():
            close(value)
    elif isinstance(schema, list):
        for value in schema:
            close(value)


def fill_defaults(schema: dict[str, Any], value: Any) -> None:
    """What the API server adds to an object that it stores."""
    if isinstance(value, dict):
        extra = schema.get("additionalProperties")
        for key, part in schema.get("properties", {}).items():
            if "default" in part:
                value.setdefault(key, part["default"])
        for key, found in value.items():
            part = schema.get("properties", {}).get(key) or (extra if isinstance(extra, dict) else {})
            fill_defaults(part, found)
    elif isinstance(value, list):
        for found in value:
            fill_defaults(schema.get("items", {}), found)


def check_job(job: dict[str, Any]) -> None:
    """Raises ApiError (422) that names every field at fault."""
    problems = [
        f"{'.'.join(map(str, error.absolute_path)) or 'the object'}: {error.message[:300]}"
        for error in job_validator().iter_errors(job)
    ]
    problems += [] if problems else list(webhook_problems(job))
    if problems:
        name = job.get("metadata", {}).get("name")
        raise ApiError(422, f'PyTorchJob.kubeflow.org "{name}" is invalid: ' + "; ".join(problems))
    fill_defaults(job_schema(), job)


def webhook_problems(job: dict[str, Any]) -> list[str]:
    """What the schema lets pass and the operator's webhook, or the API server at the pods, would not."""
    problems = []
    name, replicas = job["metadata"]["name"], job.get("spec", {}).get("pytorchReplicaSpecs") or {}
    if not DNS_LABEL.match(name) or len(name) > 63:
        problems.append(f"metadata.name: {name!r} is no DNS-1035 label of at most 63 characters")
    if not replicas:
        problems.append("spec.pytorchReplicaSpecs: must be specified")
    for kind, spec in replicas.items():
        at = f"spec.pytorchReplicaSpecs.{kind}"
        if kind not in REPLICA_TYPES:
            problems.append(f"{at}: not a replica type ({', '.join(REPLICA_TYPES)})")
        if kind == "Master" and spec.get("replicas", 1) != 1:
            problems.append(f"{at}.replicas: must be 1")
        if spec.get("restartPolicy", "OnFailure") not in ("Always", "OnFailure", "Never", "ExitCode"):
            problems.append(
                f"{at}.restartPolicy: {spec['restartPolicy']!r} is not one of Always, OnFailure, Never, ExitCode"
            )
        containers = spec.get("template", {}).get("spec", {}).get("containers") or []
        if CONTAINER not in [container.get("name") for container in containers]:
            problems.append(f"{at}.template.spec.containers: must have at least one container with name {CONTAINER}")
        problems += [
            f"{at}: container {found.get('name')} has no image" for found in containers if not found.get("image")
        ]
        longest = f"{name}-{kind.lower()}-{spec.get('replicas', 1) - 1}"
        if len(longest) > 63:
            problems.append(f"metadata.name: the pod and its service would be {longest!r}, over 63 characters")
    policy = job["spec"].get("runPolicy", {}).get("cleanPodPolicy", "None")
    if policy not in ("None", "Running", "All"):
        problems.append(f"spec.runPolicy.cleanPodPolicy: {policy!r} is not one of None, Running, All")
    return problems


def check_metadata(kind: str, found: dict[str, Any]) -> None:
    """Raises ApiError (422) for a name or a label that no API server takes."""
    metadata = found["metadata"]
    problems = []
    name = metadata.get("name") or ""
    if not DNS_SUBDOMAIN.match(name) or len(name) > 253:
        problems.append(f"metadata.name: {name!r} is no RFC 1123 subdomain")
    for key, value in (metadata.get("labels") or {}).items():
        if not LABEL_KEY.match(key):
            problems.append(f"metadata.labels: {key!r} is no label key")
        if not isinstance(value, str) or not LABEL_VALUE.match(value) or len(value) > 63:
            problems.append(f"metadata.labels.{key}: {value!r} is no label value")
    for key, value in (metadata.get("annotations") or {}).items():
        if not isinstance(value, str):
            problems.append(f"metadata.annotations.{key}: {value!r} is no string")
    for reference in metadata.get("ownerReferences") or []:
        missing = {"apiVersion", "kind", "name", "uid"} - {key for key, value in reference.items() if value}
        problems += [f"metadata.ownerReferences: {key} must not be empty" for key in sorted(missing)]
    if problems:
        raise ApiError(422, f'{kind} "{name}" is invalid: ' + "; ".join(problems))
