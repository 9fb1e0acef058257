"""What a real API server and webhooks refuse: of a PyTorchJob (training operator v1.9), of Kubernetes' own kinds."""

import functools
import re
from typing import Any

import jsonschema
import kubernetes_validate

CONTAINER = "pytorch"  # of a PyTorchJob's pods
DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035, for the services that bear the pods' names
RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")  # of JobSet's failure policy
LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def _closed(**properties: Any) -> dict[str, Any]:
    """An object of no other fields: a real API server would drop those, and a typo be found on a cluster only."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


_INTEGER, _TEXT = {"type": "integer"}, {"type": "string"}
_REPLICA = _closed(
    replicas=_INTEGER,
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template={"type": "object", "required": ["spec"]},  # Kubernetes' own: kubernetes-validate knows it
)
# The fields of the CRD; elasticPolicy, which osft does not set, is left out.
_JOB = _closed(
    apiVersion=_TEXT,
    kind=_TEXT,
    metadata={"type": "object"},
    spec=_closed(
        nprocPerNode=_TEXT,
        # The CRD accepts any name of a replica type, and the operator does nothing with it.
        pytorchReplicaSpecs=_closed(Master=_REPLICA, Worker=_REPLICA) | {"minProperties": 1},
        runPolicy=_closed(
            activeDeadlineSeconds=_INTEGER,
            backoffLimit=_INTEGER,
            cleanPodPolicy={"enum": ["None", "Running", "All"]},
            managedBy=_TEXT,
            schedulingPolicy=_closed(
                minAvailable=_INTEGER,
                minResources={"type": "object"},
                priorityClass=_TEXT,
                queue=_TEXT,
                scheduleTimeoutSeconds=_INTEGER,
            ),
            suspend={"type": "boolean"},
            ttlSecondsAfterFinished=_INTEGER,
        ),
    )
    | {"required": ["pytorchReplicaSpecs"]},
)


@functools.cache
def kubernetes_version() -> str:
    return kubernetes_validate.latest_version()


def job_problems(job: dict[str, Any]) -> list[str]:
    """A line for each field at fault."""
    problems = [_told(error) for error in jsonschema.Draft202012Validator(_JOB).iter_errors(job)]
    if problems:
        return problems
    name = job["metadata"]["name"]
    if not DNS_LABEL.fullmatch(name):
        problems.append(f"metadata.name: {name!r} is no DNS-1035 label")
    for kind, spec in job["spec"]["pytorchReplicaSpecs"].items():
        pods = f"{name}-{kind.lower()}-{spec.get('replicas', 1) - 1}"
        if len(pods) > 63:
            problems.append(f"metadata.name: the pod and its service would be {pods!r}, over 63 characters")
        if kind == "Master" and spec.get("replicas", 1) != 1:
            problems.append("Master.replicas: must be 1")
        problems += [f"{kind}.{problem}" for problem in _template_problems(spec["template"])]
    return problems


def kubernetes_problems(found: dict[str, Any]) -> list[str]:
    """Of an object of Kubernetes' own kinds."""
    try:
        kubernetes_validate.validate(found, kubernetes_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [_told(error)]
    return []


def jobset_problems(found: dict[str, Any]) -> list[str]:
    """What JobSet's webhook refuses, whatever the CRD takes."""
    names = [rule["name"] for rule in found["spec"].get("failurePolicy", {}).get("rules", [])]
    return [f"failurePolicy.rules: {name!r} is no name of a rule" for name in names if not RULE_NAME.fullmatch(name)]


def _template_problems(template: dict[str, Any]) -> list[str]:
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}, "template": template}
    if problems := kubernetes_problems(pod):
        return problems
    spec = template["spec"]
    problems = [f"container {one['name']} has no image" for one in spec["containers"] if not one.get("image")]
    if CONTAINER not in [one["name"] for one in spec["containers"]]:
        problems.append(f"template: must have at least one container with name {CONTAINER}")
    volumes = {volume["name"] for volume in spec.get("volumes") or []}
    mounts = [mount["name"] for one in spec["containers"] for mount in one.get("volumeMounts") or []]
    return problems + [f"volumeMounts: {name!r} is no volume" for name in mounts if name not in volumes]


def _told(error: Any) -> str:
    return f"{'.'.join(map(str, error.path)) or 'the object'}: {error.message[:300]}"


def metadata_problems(metadata: dict[str, Any]) -> list[str]:
    """What no API server takes for a name, a label, an annotation or an owner."""
    problems = []
    if not DNS_SUBDOMAIN.fullmatch(metadata["name"]) or len(metadata["name"]) > 253:
        problems.append(f"metadata.name: {metadata['name']!r} is no RFC 1123 subdomain")
    for key, value in (metadata.get("labels") or {}).items():
        if not LABEL_KEY.fullmatch(key):
            problems.append(f"metadata.labels: {key!r} is no label key")
        if not isinstance(value, str) or not LABEL_VALUE.fullmatch(value) or len(value) > 63:
            problems.append(f"metadata.labels.{key}: {value!r} is no label value")
    for key, value in (metadata.get("annotations") or {}).items():
        if not isinstance(value, str):
            problems.append(f"metadata.annotations.{key}: {value!r} is no string")
    for reference in metadata.get("ownerReferences") or []:
        missing = {"apiVersion", "kind", "name", "uid"} - {key for key, value in reference.items() if value}
        problems += [f"metadata.ownerReferences: {key} must not be empty" for key in sorted(missing)]
    return problems
