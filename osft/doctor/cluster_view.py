"""The Kubernetes API as the doctor uses it: it reads by path, asks what is allowed, and tries out without doing."""

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

import urllib3

from osft.doctor.finding import NotChecked
from osft.kubernetes.api import own_namespace
from osft.process.errors import one_line

_TIMEOUT = (5, 20)  # seconds to connect and to answer in
_METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
Object = dict[str, Any]


class Refused(Exception):
    """The API server refuses a request with `status`, for a reason other than a missing right."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ClusterView:
    """One cluster and a namespace of it."""

    def __init__(self, namespace: str | None = None) -> None:
        """Connect as kubectl would, or with the pod's service account. Raises NotChecked if there is no cluster."""
        try:
            from kubernetes import client, config
            from kubernetes.client.exceptions import ApiException
        except ImportError:
            raise NotChecked("needs the extra: pip install 'osft[kubernetes]'") from None
        self._refusal: type[Exception] = ApiException
        settings = client.Configuration()
        try:
            if in_pod() and "KUBECONFIG" not in os.environ:
                config.load_incluster_config(client_configuration=settings)
            else:
                config.load_kube_config(config_file=os.environ.get("KUBECONFIG"), client_configuration=settings)
        except config.ConfigException as reason:
            raise NotChecked(
                f"there is no cluster here ({one_line(reason)}). Set KUBECONFIG, or run in a pod"
            ) from None
        settings.retries = False
        self._client: Any = client.ApiClient(settings)
        self.address = str(settings.host)
        self.namespace = namespace or own_namespace()

    def within(self, namespace: str | None) -> "ClusterView":
        """The same cluster, and another namespace of it; None: the same."""
        other = copy.copy(self)
        other.namespace = namespace or self.namespace
        return other

    def path(self, resource: str, name: str = "", *, api: str = "v1", namespaced: bool = True) -> str:
        """The path of an object, or without a name of all of its kind; `api` such as "apps/v1"."""
        root = f"/api/{api}" if "/" not in api else f"/apis/{api}"
        parts = [root, f"namespaces/{self.namespace}" if namespaced else "", resource, name]
        return "/".join(part for part in parts if part)

    def get(self, path: str, **query: str) -> Object | None:
        """The object at a path, or None. Raises NotChecked for lack of a right, and as `_call`."""
        return self._call("GET", path, query)

    def exists(self, resource: str, name: str, **place: Any) -> bool:
        """Whether there is such an object. Of its content nothing is sent, so that a secret's stays where it is."""
        return self._call("GET", self.path(resource, name, **place), {}, accept=_METADATA) is not None

    def items(self, path: str, **query: str) -> list[Object]:
        """The objects of a kind; none where the cluster does not know the kind."""
        found = self._call("GET", path, query)
        items: list[Object] = found["items"] if found else []
        return items

    def ask(self, path: str, question: Object) -> Object:
        """The status of a review, which the server answers and does not keep. Raises NotChecked if it knows none."""
        found = self._call("POST", path, {}, question)
        if found is None:
            raise NotChecked(f"the server does not answer {path}")
        status: Object = found.get("status") or {}
        return status

    def try_create(self, path: str, manifest: Object) -> None:
        """Have the server check an object, with all its admission, and keep nothing (dryRun=All).

        Raises Refused with the server's reason, NotChecked for lack of the right.
        """
        if self._call("POST", path, {"dryRun": "All", "fieldValidation": "Strict"}, manifest) is None:
            raise NotChecked("the cluster does not know such objects, or there is no such namespace")

    def create(self, path: str, manifest: Object) -> None:
        """Create an object. Raises as `try_create`."""
        self._call("POST", path, {}, manifest)

    def delete(self, path: str) -> None:
        """Delete an object at once; nothing happens if it is gone."""
        self._call("DELETE", path, {"gracePeriodSeconds": "0"})

    def served(self, group: str) -> dict[str, set[str]]:
        """The versions of an API group that are served, each with its resources; none if there is no such group.

        By discovery, which every account may use.
        """
        found = self.get(f"/apis/{group}")
        versions = [one["version"] for one in found["versions"]] if found else []
        resources = {version: self.get(f"/apis/{group}/{version}") or {} for version in versions}
        return {version: {one["name"] for one in of.get("resources", [])} for version, of in resources.items()}

    def _call(
        self, method: str, path: str, query: Mapping[str, str], body: Object | None = None, accept: str = ""
    ) -> Object | None:
        """The answer, or None for 404.

        Raises NotChecked for a missing right, Refused for what else the server refuses, ConnectionError.
        """
        try:
            answer: Object | None = self._client.call_api(
                path,
                method,
                query_params=list(query.items()),
                header_params={"Accept": accept or "application/json", "Content-Type": "application/json"},
                body=body,
                auth_settings=["BearerToken"],
                response_type="object",
                _return_http_data_only=True,
                _request_timeout=_TIMEOUT,
            )
        except self._refusal as refusal:
            status, message = getattr(refusal, "status", 0), _message(refusal)
            if status == 404:
                return None
            if status == 401:
                raise NotChecked(f"the API server does not know who asks (401): {message}. Log in again") from None
            if status == 403 and _lacks_right(message):
                raise NotChecked(f"this account may not look: {message}") from None
            if "does not support dry run" in message:
                raise NotChecked(f"a webhook of this cluster cannot be asked without doing it: {message}") from None
            if 400 <= status < 500 and status not in (408, 429):
                raise Refused(status, message) from None
            raise ConnectionError(f"the API server fails ({status}): {message}") from None
        except (urllib3.exceptions.HTTPError, OSError) as failure:
            raise ConnectionError(f"the API server {self.address} does not answer: {one_line(failure)}") from None
        return answer


def in_pod() -> bool:
    """Whether this process runs in a pod."""
    return "KUBERNETES_SERVICE_HOST" in os.environ


def _lacks_right(message: str) -> bool:
    """Whether a 403 is RBAC's: admission (PodSecurity, quota, webhooks) answers 403, too."""
    return " cannot " in message and " resource " in message


def _message(refusal: Any) -> str:
    """What the server says."""
    try:
        return str(json.loads(refusal.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(refusal.reason)
