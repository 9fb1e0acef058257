"""The few calls of the Kubernetes API that a launcher makes, each repeated while the server cannot answer.

A server that restarts refuses connections, then answers 403 until it has read its roles (and 404 to paths that it does
not serve yet), then 503, and what it was sending when it stopped breaks off. So a refusal counts only where nothing
else has been heard: a call that was allowed before is repeated as long as one without an answer, one that never was for
a few seconds. An answer counts when it is whole.

`TrainingClient` finds the cluster and brings the clients. Its own methods for jobs turn every error into one
RuntimeError, so that "exists already" looks like "server overloaded"; so the calls are made on its clients.

The rights that this needs are in pipelines/continual_learning/manifests/base/role.yaml; a test compares the two.
"""

import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import urllib3
from kubeflow.training import TrainingClient
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException, list_kube_config_contexts
from tenacity import RetryCallState, Retrying, retry_if_exception

from osft.kubernetes.kinds import Resource
from osft.training.job import JobUnreachable

logger = logging.getLogger(__name__)

_TIMEOUT = (10, 30)  # seconds to connect and to answer in
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_REFUSED = {401, 403}
_DOUBTED_SECONDS = 2.0  # a restarting server refuses everything for less than half a second
_READ_LOGS = "get pods/log"
_SERVICE_ACCOUNT_NAMESPACE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"


class AlreadyExists(Exception):
    """There is an object of that name."""


class NotServed(Exception):
    """The API server knows no such objects, or not the namespace."""


class ClusterApi:
    """Jobs, pods, logs and events of one namespace, as the API's JSON."""

    def __init__(self, namespace: str | None = None, *, patience_seconds: float = 600.0) -> None:
        """Connect as kubectl would, or with the pod's service account.

        `patience_seconds` is how long an API that does not answer is tried again. Raises ValueError if there is no
        cluster to talk to.
        """
        self.namespace = namespace or own_namespace()
        self._patience = patience_seconds
        self._allowed: set[str] = set()  # what has been answered with yes: a refusal of it passes
        try:
            # Read when it is needed: the kubernetes package does so when it is imported.
            client = TrainingClient(config_file=os.environ.get("KUBECONFIG"), namespace=self.namespace)
        except ConfigException as error:
            raise ValueError(
                f"there is no cluster to train on: {error}. Run this step in a pod, or set KUBECONFIG; or use "
                "launcher=local"
            ) from None
        self._custom, self._core = client.custom_api, client.core_api

    def create(self, resource: Resource, manifest: dict[str, Any]) -> None:
        """Raises AlreadyExists, NotServed, ValueError if the server refuses the manifest, PermissionError.

        A field that the server does not know is refused, too; it would drop it otherwise.
        """
        try:
            self._object(
                f"create {resource.kind}s",
                lambda: self._custom.create_namespaced_custom_object(
                    **_address(resource),
                    namespace=self.namespace,
                    body=manifest,
                    field_validation="Strict",
                    _request_timeout=_TIMEOUT,
                ),
            )
        except ApiException as error:
            if error.status == 409:
                raise AlreadyExists from None
            if error.status == 404:
                raise NotServed from None
            raise ValueError(
                f"the API server refused the {resource.kind} ({error.status}): {_message(error)}"
            ) from None

    def ensure(self, resource: Resource, manifest: dict[str, Any]) -> None:
        """Create the object unless there is one of its name. Raises as `create` does, but for AlreadyExists."""
        if self.get(resource, manifest["metadata"]["name"]) is None:
            try:
                self.create(resource, manifest)
            except AlreadyExists:
                return  # made by another meanwhile

    def get(self, resource: Resource, name: str) -> dict[str, Any] | None:
        """The object, or None."""
        found: dict[str, Any] | None = self._found(
            f"get {resource.kind}s",
            lambda: self._custom.get_namespaced_custom_object(
                **_address(resource), namespace=self.namespace, name=name, _request_timeout=_TIMEOUT
            ),
        )
        return found

    def serves(self, resource: Resource) -> bool:
        """Whether the server is known to have such objects; False also without the right to ask."""
        try:
            self._object(
                f"get {resource.kind}s",
                lambda: self._custom.get_namespaced_custom_object(
                    **_address(resource), namespace=self.namespace, name="any", _request_timeout=_TIMEOUT
                ),
            )
        except ApiException as error:
            return error.status == 404 and _names_object(error)
        except (PermissionError, JobUnreachable):
            return False
        return True

    def delete(self, resource: Resource, name: str, uid: str) -> None:
        """Have the object `uid` deleted, after its pods. Nothing happens if it is gone or another has its name."""
        body = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        try:
            self._found(
                f"delete {resource.kind}s",
                lambda: self._custom.delete_namespaced_custom_object(
                    **_address(resource), namespace=self.namespace, name=name, body=body, _request_timeout=_TIMEOUT
                ),
            )
        except ApiException as error:
            if error.status != 409:
                raise

    def pods(self, label_selector: str) -> list[dict[str, Any]]:
        """The pods that have the label `name=value`."""
        return self._items(
            "list pods",
            lambda: self._core.list_namespaced_pod(
                self.namespace,
                label_selector=label_selector,
                _preload_content=False,
                _request_timeout=_TIMEOUT,
            ),
        )

    def pod(self, name: str) -> dict[str, Any] | None:
        """One pod, or None."""
        pod: dict[str, Any] | None = self._found(
            "get pods",
            lambda: self._core.read_namespaced_pod(
                name, self.namespace, _preload_content=False, _request_timeout=_TIMEOUT
            ),
        )
        return pod

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of the object `name`, oldest first."""
        events = self._items(
            "list events",
            lambda: self._core.list_namespaced_event(
                self.namespace,
                field_selector=f"involvedObject.name={name}",
                _preload_content=False,
                _request_timeout=_TIMEOUT,
            ),
        )
        return sorted(events, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")

    def log(self, pod: str, container: str, *, tail_lines: int) -> list[str]:
        """The last lines of the log of a pod's container; none if it cannot be read."""

        def read() -> str:
            response = self._core.read_namespaced_pod_log(
                pod,
                self.namespace,
                container=container,
                tail_lines=tail_lines,
                _preload_content=False,
                _request_timeout=_TIMEOUT,
            )
            return bytes(response.data).decode("utf-8", "replace")

        try:
            return str(self._call(_READ_LOGS, read)).splitlines()
        except (ApiException, PermissionError, JobUnreachable):
            return []  # 400: the container has not started

    def follow_log(self, pod: str, container: str, *, since_seconds: int | None) -> Iterator[str]:
        """The lines of a pod's log with their timestamps, as they come, until the container or the connection ends.

        It is not repeated here: the caller knows which line it has seen last.
        """
        response = self._core.read_namespaced_pod_log(
            pod,
            self.namespace,
            container=container,
            follow=True,
            timestamps=True,
            since_seconds=since_seconds,
            _preload_content=False,
            _request_timeout=(10, 120),  # without a line for so long the connection may be dead
        )
        self._allowed.add(_READ_LOGS)
        try:
            rest = b""
            for chunk in response.stream(amt=None, decode_content=False):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield line.decode("utf-8", "replace")
        finally:
            response.close()
            response.release_conn()

    def may_follow_later(self, error: BaseException) -> bool:
        """Whether a log that could not be followed for `error` may be readable later."""
        return transient(error) or (_READ_LOGS in self._allowed and _is_refusal(error))

    def _items(self, right: str, call: Callable[[], Any]) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self._object(right, call)["items"]
        return items

    def _found(self, right: str, call: Callable[[], Any]) -> Any:
        """The object, or None if there is none."""
        try:
            return self._object(right, call)
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    def _object(self, right: str, call: Callable[[], Any]) -> dict[str, Any]:
        """The JSON object that a call answers with; one that breaks off is asked for again."""

        def read() -> dict[str, Any]:
            answer = call()
            try:
                found = answer if isinstance(answer, dict) else json.loads(answer.data)
            except (AttributeError, ValueError):  # the client hands on text that is not JSON
                found = None
            if not isinstance(found, dict):
                raise ConnectionError("the API server's answer breaks off or is no JSON object")
            return found

        answer: dict[str, Any] = self._call(right, read)
        return answer

    def _call(self, right: str, call: Callable[[], Any]) -> Any:
        """The answer to a call. Raises PermissionError for lack of the `right`, JobUnreachable without an answer."""
        began = time.monotonic()

        def is_over(state: RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            sure = right not in self._allowed or _is_denied(error)
            doubted = error is not None and not transient(error) and sure
            return time.monotonic() - began >= (min(_DOUBTED_SECONDS, self._patience) if doubted else self._patience)

        retrying = Retrying(
            retry=retry_if_exception(lambda error: transient(error) or _is_refusal(error)),
            wait=_wait,
            stop=is_over,
            before_sleep=_tell,
            reraise=True,
        )
        try:
            answer = retrying(call)
        except ApiException as error:
            if error.status in _REFUSED and not _is_denied(error):
                raise PermissionError(
                    f"the service account may not {right} in namespace {self.namespace} ({error.status}): "
                    f"{_message(error)}. Apply pipelines/continual_learning/manifests, and bind its role to the "
                    "account of the pipeline's steps"
                ) from None
            if transient(error):
                raise JobUnreachable(f"the Kubernetes API did not answer for {self._patience:.0f} s: {error}") from None
            raise
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise JobUnreachable(f"the Kubernetes API did not answer for {self._patience:.0f} s: {error}") from None
        self._allowed.add(right)
        return answer


def _address(resource: Resource) -> dict[str, str]:
    return {"group": resource.group, "version": resource.version, "plural": resource.plural}


def own_namespace() -> str:
    """That of this pod, or of kubectl's current context, or "default"."""
    if os.path.isfile(_SERVICE_ACCOUNT_NAMESPACE):
        with open(_SERVICE_ACCOUNT_NAMESPACE, encoding="utf-8") as file:
            return file.read().strip()
    try:
        _, context = list_kube_config_contexts(config_file=os.environ.get("KUBECONFIG"))
    except ConfigException:
        return "default"
    return str(context["context"].get("namespace", "default"))


def transient(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, ApiException):
        return error.status in _TRANSIENT
    return isinstance(error, urllib3.exceptions.HTTPError | ConnectionError | TimeoutError)


def _is_refusal(error: BaseException) -> bool:
    """Whether the server says that this may not be done, or that it does not know such objects, and may mean not yet.

    A 404 for an object that is not there carries a Status that names it; one for an unknown path does not.
    """
    if not isinstance(error, ApiException):
        return False
    return error.status in _REFUSED or (error.status == 404 and not _names_object(error))


def _is_denied(error: BaseException | None) -> bool:
    """Whether a webhook has denied this very object; it may know a moment later what was created just before."""
    return isinstance(error, ApiException) and error.status == 403 and "denied the request" in _message(error)


def _names_object(error: ApiException) -> bool:
    try:
        return bool(json.loads(error.body)["details"]["name"])
    except (TypeError, ValueError, KeyError):
        return False


def _wait(state: RetryCallState) -> float:
    """Seconds: as long as the server asks for, else doubling from half a second to half a minute, with jitter."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, ApiException) and error.headers:
        asked = str(error.headers.get("Retry-After", ""))
        if asked.isdigit():
            return min(float(asked), 120.0) + random.random()
    return min(30.0, 0.5 * 2 ** min(state.attempt_number - 1, 6)) * random.uniform(0.5, 1.0)


def _tell(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    shown = f"{error.status} {error.reason}" if isinstance(error, ApiException) else f"{type(error).__name__}: {error}"
    logger.warning(f"kubernetes: {shown}; trying again in {state.upcoming_sleep:.0f} s")


def _message(error: ApiException) -> str:
    """What the server says."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)
