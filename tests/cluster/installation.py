"""What the stand-in has besides jobs and pods: discovery, access reviews, nodes, claims, queues, admission.

A healthy installation at first; a test takes away or spoils what `osft doctor` is to find. Reading only, as real API
servers answer: discovery (APIGroup, APIResourceList), 404 for what is not served, lists by kind.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import kubernetes_validate

from tests.cluster.schema import kubernetes_version
from tests.cluster.store import ApiError, Object

RESOURCE = re.compile(
    r"/apis?/(?P<api>v1|[^/]+/[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?"
)
GPU = "nvidia.com/gpu"
GPU_TAINT = {"key": GPU, "value": "present", "effect": "NoSchedule"}
ACTIVE = {"type": "Active", "status": "True", "reason": "Ready", "message": "Can admit new workloads"}

_CUSTOM = ("kubeflow.org", "trainer.kubeflow.org", "jobset.x-k8s.io")

Allows = Callable[[str, str, str], bool]
"""Whether the account may use a verb on a resource of a group."""


class Installation:
    """The kinds that no controller of the stand-in acts on."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.version = {"major": "1", "minor": "36", "gitVersion": "v1.36.2"}
        self.groups: dict[str, dict[str, set[str]]] = {
            "": {
                "v1": {"namespaces", "nodes", "persistentvolumeclaims", "resourcequotas", "serviceaccounts"},
            },
            "apps": {"v1": {"deployments"}},
            "storage.k8s.io": {"v1": {"storageclasses"}},
            "scheduling.k8s.io": {"v1": {"priorityclasses"}},
            "kubeflow.org": {"v1": {"pytorchjobs", "tfjobs"}},
            "trainer.kubeflow.org": {"v1alpha1": {"trainjobs", "trainingruntimes", "clustertrainingruntimes"}},
            "jobset.x-k8s.io": {"v1alpha2": {"jobsets"}},
            "kueue.x-k8s.io": {
                "v1beta2": {"localqueues", "clusterqueues"},
                "v1beta1": {"localqueues", "clusterqueues"},
            },
        }
        """Group -> version -> resources that are served."""
        self.objects: dict[tuple[str, str], Object] = {}
        """(plural, name) -> what is there of the kinds above."""
        self.put("namespaces", namespace, status={"phase": "Active"})
        self.put(
            "persistentvolumeclaims",
            "osft-storage",
            spec={"accessModes": ["ReadWriteMany"], "storageClassName": "nfs"},
            status={"phase": "Bound", "capacity": {"storage": "200Gi"}},
        )
        self.put("storageclasses", "nfs", volumeBindingMode="Immediate")
        self.put("serviceaccounts", "default")
        for number in range(2):
            self.node(f"gpu-{number}", {"cpu": "64", "memory": "512Gi", GPU: "8"}, pool="gpu", taints=[GPU_TAINT])
        self.node("cpu-0", {"cpu": "15500m", "memory": "60Gi"}, pool="cpu")
        self.deployment("training-operator", "kubeflow/training-operator:v1.9.4")
        self.deployment("kubeflow-trainer-controller-manager", "kubeflow/trainer-controller-manager:v2.3.0")
        self.put("localqueues", "research", spec={"clusterQueue": "all"}, status={"conditions": [ACTIVE]})
        covered = [{"coveredResources": ["cpu", "memory", GPU]}]
        self.put("clusterqueues", "all", spec={"resourceGroups": covered}, status={"conditions": [ACTIVE]})

    def put(self, plural: str, name: str, **content: Any) -> Object:
        """Have an object there, in place of one of its name."""
        found = {"metadata": {"name": name, "namespace": self.namespace}, **content}
        self.objects[plural, name] = found
        return found

    def node(self, name: str, allocatable: Mapping[str, str], *, pool: str, taints: list[Any] | None = None) -> None:
        node = self.put("nodes", name, spec={"taints": taints or []}, status={"allocatable": dict(allocatable)})
        node["metadata"]["labels"] = {"pool": pool}

    def deployment(self, name: str, image: str, *arguments: str, ready: int = 1) -> None:
        container = {"name": "manager", "image": image, "args": list(arguments)}
        spec = {"template": {"spec": {"containers": [container]}}}
        self.put("deployments", name, spec=spec, status={"availableReplicas": ready} if ready else {})

    def answer(self, method: str, path: str, body: Object, allows: Allows) -> tuple[int, Object] | None:
        """Status and body, or None for what is not of this part. Raises ApiError (403, 404)."""
        if path == "/version":
            return 200, self.version
        if method == "POST" and re.fullmatch(r"/apis/authorization\.k8s\.io/v1/(self)?subjectaccessreviews", path):
            wanted = body["spec"]["resourceAttributes"]
            resource = "/".join(filter(None, (wanted["resource"], wanted.get("subresource"))))
            return 201, body | {"status": {"allowed": allows(wanted["verb"], wanted["group"], resource)}}
        discovery = re.fullmatch(r"/apis/([^/]+)(?:/([^/]+))?", path)
        if discovery:
            return 200, self._discovered(discovery[1], discovery[2])
        found = RESOURCE.fullmatch(path)
        group, _, version = found["api"].rpartition("/") if found else ("", "", "")
        if found is None or method != "GET" or not self._is_mine(group, found["plural"]):
            return None
        if found["plural"] not in self.groups.get(group, {}).get(version, ()):
            raise ApiError(404, "404 page not found")
        verb = "get" if found["name"] else "list"
        if not allows(verb, group, found["plural"]):
            where = f'in the namespace "{found["namespace"]}"' if found["namespace"] else "at the cluster scope"
            raise ApiError(
                403,
                f'{found["plural"]} is forbidden: User "system:serviceaccount:{self.namespace}:runner" cannot {verb} '
                f'resource "{found["plural"]}" in API group "{group}" {where}',
            )
        if found["name"]:
            return 200, self._get(found["plural"], found["name"])
        items = [one for (plural, _), one in self.objects.items() if plural == found["plural"]]
        return 200, {"kind": "List", "items": json.loads(json.dumps(items))}

    def serves(self, api_version: str, plural: str) -> bool:
        """Whether a custom resource of the store's is served; what is no custom resource always is."""
        group, _, version = api_version.rpartition("/")
        return group not in _CUSTOM or plural in self.groups.get(group, {}).get(version, ())

    def _is_mine(self, group: str, plural: str) -> bool:
        """Of kinds that the store keeps, only discovery is."""
        return plural not in ("pytorchjobs", "trainjobs", "trainingruntimes", "jobsets") and plural in {
            *(one for versions in self.groups.values() for resources in versions.values() for one in resources),
            "localqueues",
            "clusterqueues",
        }

    def _get(self, plural: str, name: str) -> Object:
        if (plural, name) not in self.objects:
            raise ApiError(404, f'{plural} "{name}" not found', name=name)
        return self.objects[plural, name]

    def _discovered(self, group: str, version: str | None) -> Object:
        versions = self.groups.get(group)
        if versions is None or (version and version not in versions):
            raise ApiError(404, "404 page not found")
        if version:
            resources = [{"name": name} for name in sorted(versions[version])]
            return {"kind": "APIResourceList", "groupVersion": f"{group}/{version}", "resources": resources}
        return {
            "kind": "APIGroup",
            "versions": [{"groupVersion": f"{group}/{one}", "version": one} for one in versions],
        }

    def admit(self, pod: Object) -> None:
        """Raise ApiError for a pod that admission refuses, in the words of the plugin that does.

        Fields, the account, the priority class, PodSecurity "restricted", and quotas of limits.cpu.
        """
        name, spec = pod["metadata"]["name"], pod["spec"]
        try:
            kubernetes_validate.validate(pod, kubernetes_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            raise ApiError(400, f'strict decoding error: unknown field "{error.message[:200]}"') from None
        account = spec.get("serviceAccountName", "default")
        if ("serviceaccounts", account) not in self.objects:
            where = f"{self.namespace}/{account}"
            message = f'error looking up service account {where}: serviceaccount "{account}" not found'
            raise ApiError(403, f'pods "{name}" is forbidden: {message}')
        priority = spec.get("priorityClassName")
        if priority and ("priorityclasses", priority) not in self.objects:
            raise ApiError(403, f'pods "{name}" is forbidden: no PriorityClass with name {priority} was found')
        labels = self._get("namespaces", self.namespace)["metadata"].get("labels", {})
        if labels.get("pod-security.kubernetes.io/enforce") == "restricted":
            refuse_unrestricted(pod)
        for (plural, quota), found in self.objects.items():
            if plural == "resourcequotas" and "limits.cpu" in found["spec"]["hard"]:
                without = [one["name"] for one in spec["containers"] if "cpu" not in one["resources"]["limits"]]
                if without:
                    told = f"failed quota: {quota}: must specify limits.cpu for: {','.join(without)}"
                    raise ApiError(403, f'pods "{name}" is forbidden: {told}')


def refuse_unrestricted(pod: Object) -> None:
    """Raise ApiError for a pod that PodSecurity "restricted" refuses."""
    if violations := _violations(pod["spec"]):
        told = f'violates PodSecurity "restricted:latest": {", ".join(violations)}'
        raise ApiError(403, f'pods "{pod["metadata"]["name"]}" is forbidden: {told}')


def _violations(spec: Object) -> list[str]:
    """Of the level "restricted": what each container, or the pod for it, has to set."""
    pod, found = spec.get("securityContext") or {}, []
    for one in [*spec.get("initContainers", []), *spec["containers"]]:
        own, name = one.get("securityContext") or {}, one["name"]
        if own.get("allowPrivilegeEscalation") is not False:
            found.append(
                f'allowPrivilegeEscalation != false (container "{name}" must set '
                "securityContext.allowPrivilegeEscalation=false)"
            )
        if "ALL" not in (own.get("capabilities") or {}).get("drop", []):
            found.append(
                f'unrestricted capabilities (container "{name}" must set securityContext.capabilities.drop=["ALL"])'
            )
        if not own.get("runAsNonRoot", pod.get("runAsNonRoot")):
            found.append(f'runAsNonRoot != true (pod or container "{name}" must set securityContext.runAsNonRoot=true)')
        if not (own.get("seccompProfile") or pod.get("seccompProfile")):
            found.append(f'seccompProfile (pod or container "{name}" must set securityContext.seccompProfile.type)')
    return found
