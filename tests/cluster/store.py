"""What the stand-in's API server keeps: objects, who owns what, what is being deleted, what happened."""

import copy
import threading
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from tests.cluster import crds, schema

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
API_VERSIONS = {
    "PyTorchJob": "kubeflow.org/v1",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
    "TrainingRuntime": "trainer.kubeflow.org/v1alpha1",
    "JobSet": "jobset.x-k8s.io/v1alpha2",
    "Job": "batch/v1",
    "Pod": "v1",
    "Event": "v1",
    "Secret": "v1",
    "ConfigMap": "v1",
    "Workflow": "argoproj.io/v1alpha1",
}
KINDS = {f"{kind.lower()}s": kind for kind in API_VERSIONS}

Object = dict[str, Any]


class ApiError(Exception):
    """A request that is answered with `status` and a Status object."""

    def __init__(
        self, status: int, message: str, *, name: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.name, self.headers = status, name, headers or {}
        """`name`: of the object that it is about, where it is about one."""

    def body(self) -> Object:
        body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": str(self), "code": self.status}
        return body | ({"details": {"name": self.name}} if self.name else {})


class Store:
    """Objects by (plural, name), all of one namespace. Whoever reads or changes one holds `lock` meanwhile."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.lock = threading.RLock()
        self._objects: dict[tuple[str, str], Object] = {}

    def create(self, plural: str, given: Object) -> Object:
        """Keep it, filled in as the API server does. Raises ApiError: 409 if the name is taken, 422."""
        kind = KINDS[plural]
        found = copy.deepcopy(given) | {"apiVersion": API_VERSIONS[kind], "kind": kind}
        metadata = found["metadata"]
        problems = schema.metadata_problems(metadata)
        if plural == "pytorchjobs":
            problems += schema.job_problems(found)
        elif plural in crds.PLURALS:
            problems += [f"unknown field {name}" for name in crds.unknown_fields(found, crds.schema(plural))]
            problems += crds.problems(plural, found)
            problems += schema.jobset_problems(found) if plural == "jobsets" else []
        elif plural == "jobs":
            problems += schema.kubernetes_problems(found)
        if problems:
            raise ApiError(422, f'{kind} "{metadata["name"]}" is invalid: ' + "; ".join(problems))
        if plural == "pytorchjobs":  # Kueue's webhook suspends; a test admits
            found["spec"].setdefault("runPolicy", {}).setdefault(
                "suspend", QUEUE_LABEL in (metadata.get("labels") or {})
            )
        if plural == "trainjobs":
            found["spec"].setdefault("suspend", QUEUE_LABEL in (metadata.get("labels") or {}))
        with self.lock:
            if (plural, metadata["name"]) in self._objects:
                raise ApiError(409, f'{plural} "{metadata["name"]}" already exists', name=metadata["name"])
            metadata |= {"namespace": self.namespace, "uid": str(uuid.uuid4()), "creationTimestamp": timestamp()}
            self._objects[plural, metadata["name"]] = found
        return found

    def find(self, plural: str, name: str) -> Object | None:
        return self._objects.get((plural, name))

    def get(self, plural: str, name: str) -> Object:
        """Raises ApiError (404) if there is none."""
        found = self.find(plural, name)
        if found is None:
            raise ApiError(404, f'{plural} "{name}" not found', name=name)
        return found

    def objects(self, plural: str) -> list[Object]:
        return [found for (kind, _), found in self._objects.items() if kind == plural]

    def owned_by(self, owner: Object) -> list[Object]:
        return [found for found in self._objects.values() if owner["metadata"]["uid"] in _owners(found)]

    def delete(
        self, found: Object, *, propagation: str = "Background", grace_seconds: int | None = None, uid: str = ""
    ) -> None:
        """Pods go when their processes have ended, and what is deleted in the foreground when its pods have gone.

        Raises ApiError (409) if `uid` is given and is another's.
        """
        metadata = found["metadata"]
        if uid not in ("", metadata["uid"]):
            raise ApiError(409, f"the UID in the precondition ({uid}) is not that of the object: {metadata['uid']}")
        with self.lock:
            if found["kind"] == "Pod":
                default = found["spec"].get("terminationGracePeriodSeconds", 30)
                metadata["deletionGracePeriodSeconds"] = default if grace_seconds is None else grace_seconds
            if found["kind"] == "Pod" or propagation == "Foreground":
                metadata.setdefault("deletionTimestamp", timestamp())
            else:
                self.remove(found)

    def remove(self, found: Object) -> None:
        """Take it out of the API."""
        key = (KINDS_PLURAL[found["kind"]], found["metadata"]["name"])
        if self._objects.get(key) is found:
            del self._objects[key]

    def collect_garbage(self) -> None:
        """One round of the garbage collector: what no living object owns, and what waited for what it owns."""
        living = {found["metadata"]["uid"] for found in self._objects.values()}
        for found in list(self._objects.values()):
            if "deletionTimestamp" not in found["metadata"]:
                if _owners(found) and not living & _owners(found):
                    self.delete(found)
            elif found["kind"] != "Pod":
                owned = self.owned_by(found)
                for one in owned:
                    if "deletionTimestamp" not in one["metadata"]:
                        self.delete(one, propagation="Foreground")
                if not owned:
                    self.remove(found)

    def record(self, about: Object, reason: str, message: str, *, warning: bool = False) -> None:
        """Write an event; the same one again is only later."""
        name, now = about["metadata"]["name"], timestamp()
        for event in self.objects("events"):
            if (event["involvedObject"]["name"], event["reason"], event["message"]) == (name, reason, message):
                event["lastTimestamp"] = now
                return
        event = {
            "metadata": {"name": f"{name}.{time.time_ns():016x}"},
            "involvedObject": {"kind": about["kind"], "name": name, "uid": about["metadata"]["uid"]},
            "type": "Warning" if warning else "Normal",
            "reason": reason,
            "message": message,
            "lastTimestamp": now,
        }
        self.create("events", event)


KINDS_PLURAL = {kind: plural for plural, kind in KINDS.items()}


def _owners(found: Object) -> set[str]:
    return {reference["uid"] for reference in found["metadata"].get("ownerReferences") or []}


def timestamp(moment: float | None = None) -> str:
    """RFC 3339 in whole seconds, as metadata and status have it. `moment`: seconds since the epoch; None: now."""
    return datetime.fromtimestamp(time.time() if moment is None else moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
