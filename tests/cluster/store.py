"""What the API machinery keeps: objects, their versions, the changes that watches see, and who owns what."""

import json
import random
import string
import threading
import uuid
from collections import deque
from typing import Any, NamedTuple

from tests.cluster import schema
from tests.cluster.errors import ApiError
from tests.cluster.timestamps import seconds_text

FOREGROUND = "foregroundDeletion"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
KEPT_CHANGES = 5000  # a watch that asks for an older version is told 410, as by a compacted etcd
DEFAULT_GRACE_SECONDS = 30

Object = dict[str, Any]


class Kind(NamedTuple):
    """A resource that the stand-in serves."""

    group: str
    version: str
    plural: str
    name: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


KINDS = {
    kind.plural: kind
    for kind in (
        Kind("kubeflow.org", "v1", "pytorchjobs", "PyTorchJob"),
        Kind("", "v1", "pods", "Pod"),
        Kind("", "v1", "events", "Event"),
        Kind("", "v1", "secrets", "Secret"),
        Kind("", "v1", "configmaps", "ConfigMap"),
        Kind("argoproj.io", "v1alpha1", "workflows", "Workflow"),
    )
}
PLURALS = {kind.name: kind.plural for kind in KINDS.values()}


class Change(NamedTuple):
    """An event of a watch; `found` is a copy of the object as it was then."""

    version: int
    type: str
    plural: str
    found: Object


class Store:
    """Objects by (plural, namespace, name). Whoever reads or changes one holds `lock` meanwhile."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.version = 1000
        self.changes: deque[Change] = deque(maxlen=KEPT_CHANGES)
        self._objects: dict[tuple[str, str, str], Object] = {}

    def create(self, plural: str, found: Object, namespace: str, dry_run: bool = False) -> Object:
        """Keep `found`, filled in as the API server does.

        Raises:
            ApiError: 409 if the name is taken, 422 if the object is not valid, 400 if it is of another kind.
        """
        kind = KINDS[plural]
        if (found.get("apiVersion", kind.api_version), found.get("kind", kind.name)) != (kind.api_version, kind.name):
            raise ApiError(400, f"the body is a {found.get('apiVersion')} {found.get('kind')}, not a {kind.name}")
        found = json.loads(json.dumps(found)) | {"apiVersion": kind.api_version, "kind": kind.name}
        metadata = found.setdefault("metadata", {})
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + "".join(random.choices(string.ascii_lowercase, k=5))
        if metadata.setdefault("namespace", namespace) != namespace:
            raise ApiError(400, f"the namespace of the object ({metadata['namespace']}) is not that of the request")
        with self.lock:
            schema.check_metadata(kind.name, found)
            if plural == "pytorchjobs":
                found.pop("status", None)  # a subresource: only the operator writes it
                schema.check_job(found)
                # Kueue's webhook; the job waits for a test to admit it.
                if QUEUE_LABEL in (metadata.get("labels") or {}):
                    found["spec"].setdefault("runPolicy", {})["suspend"] = True
            key = (plural, namespace, metadata["name"])
            if key in self._objects:
                raise ApiError(409, f'{plural} "{metadata["name"]}" already exists', "AlreadyExists")
            metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": seconds_text(), "generation": 1}
            for field in ("deletionTimestamp", "deletionGracePeriodSeconds", "resourceVersion"):
                metadata.pop(field, None)
            if not dry_run:
                self._objects[key] = found
                self.changed(found, "ADDED")
        return found

    def find(self, plural: str, namespace: str, name: str) -> Object | None:
        return self._objects.get((plural, namespace, name))

    def get(self, plural: str, namespace: str, name: str) -> Object:
        """Raises ApiError (404) if there is none."""
        found = self.find(plural, namespace, name)
        if found is None:
            group = KINDS[plural].group
            raise ApiError(404, f'{plural}{"." + group if group else ""} "{name}" not found', name=name)
        return found

    def objects(self, plural: str, namespace: str | None = None) -> list[Object]:
        return [found for (kind, at, _), found in self._objects.items() if kind == plural and namespace in (None, at)]

    def changed(self, found: Object, change: str = "MODIFIED") -> None:
        """Give `found` a new version and tell the watches."""
        with self.lock:
            self.version += 1
            found["metadata"]["resourceVersion"] = str(self.version)
            copy = json.loads(json.dumps(found))
            self.changes.append(Change(self.version, change, PLURALS[found["kind"]], copy))

    def update(self, plural: str, namespace: str, name: str, new: Object) -> Object:
        """Replace everything but the status and what the server owns.

        Raises:
            ApiError: 404, 409 if `new` carries another resourceVersion than the present one, 422.
        """
        with self.lock:
            found = self.get(plural, namespace, name)
            new = json.loads(json.dumps(new))
            given = new.setdefault("metadata", {}).get("resourceVersion")
            if given and given != found["metadata"]["resourceVersion"]:
                raise ApiError(409, f'Operation cannot be fulfilled on {plural} "{name}": the object has been modified')
            for field in ("name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "generation"):
                new["metadata"].pop(field, None)
                if field in found["metadata"]:
                    new["metadata"][field] = found["metadata"][field]
            new |= {key: found[key] for key in ("apiVersion", "kind", "status") if key in found}
            schema.check_metadata(found["kind"], new)
            if plural == "pytorchjobs":
                schema.check_job(new)
            if new.get("spec") != found.get("spec"):
                new["metadata"]["generation"] += 1
            found.clear()
            found.update(new)
            self.changed(found)
            return found

    def delete(
        self,
        found: Object,
        propagation: str | None = None,
        grace_seconds: int | None = None,
        preconditions: dict[str, str] | None = None,
    ) -> None:
        """Begin to delete: what has something to wait for gets a deletionTimestamp, the rest is gone at once.

        A pod waits for its processes. With propagation Foreground an owner waits for what it owns; with Background
        (the default) it is gone at once and the garbage collector deletes what it owned; Orphan lets that live.

        Raises:
            ApiError: 409 if the object is not the one of the preconditions.
        """
        with self.lock:
            metadata = found["metadata"]
            for field in ("uid", "resourceVersion"):
                wanted = (preconditions or {}).get(field)
                if wanted and wanted != metadata[field]:
                    what = f'{PLURALS[found["kind"]]} "{metadata["name"]}"'
                    raise ApiError(
                        409,
                        f"Operation cannot be fulfilled on {what}: Precondition failed: {field} in precondition: "
                        f"{wanted}, {field} in object meta: {metadata[field]}",
                    )
            if found["kind"] == "Pod":
                self._delete_pod(found, grace_seconds)
                return
            if propagation == "Orphan":
                for owned in self.owned_by(found):
                    references = owned["metadata"]["ownerReferences"]
                    references[:] = [reference for reference in references if reference["uid"] != metadata["uid"]]
                    self.changed(owned)
            if propagation == "Foreground" and FOREGROUND not in metadata.get("finalizers", []):
                metadata.setdefault("finalizers", []).append(FOREGROUND)
            if not metadata.get("finalizers"):
                self.remove(found)
            elif "deletionTimestamp" not in metadata:
                metadata |= {"deletionTimestamp": seconds_text(), "deletionGracePeriodSeconds": 0}
                self.changed(found)

    def _delete_pod(self, pod: Object, grace_seconds: int | None) -> None:
        metadata = pod["metadata"]
        if grace_seconds is None:
            grace_seconds = pod.get("spec", {}).get("terminationGracePeriodSeconds", DEFAULT_GRACE_SECONDS)
        if grace_seconds == 0:
            self.remove(pod)
        elif grace_seconds < metadata.get("deletionGracePeriodSeconds", grace_seconds + 1):
            metadata.setdefault("deletionTimestamp", seconds_text())
            metadata["deletionGracePeriodSeconds"] = grace_seconds
            self.changed(pod)

    def remove(self, found: Object) -> None:
        """Take it out of the API."""
        metadata = found["metadata"]
        key = (PLURALS[found["kind"]], metadata["namespace"], metadata["name"])
        if self._objects.get(key) is found:
            del self._objects[key]
            self.changed(found, "DELETED")

    def owned_by(self, owner: Object) -> list[Object]:
        uid = owner["metadata"]["uid"]
        return [
            found
            for found in self._objects.values()
            if any(reference["uid"] == uid for reference in found["metadata"].get("ownerReferences") or [])
        ]

    def collect_garbage(self) -> None:
        """One round of the garbage collector. An owner of a kind that the stand-in does not know counts as living."""
        with self.lock:
            living = {found["metadata"]["uid"] for found in self._objects.values()}
            for found in list(self._objects.values()):
                metadata = found["metadata"]
                references = metadata.get("ownerReferences") or []
                if references and not any(
                    reference["uid"] in living or reference["kind"] not in PLURALS for reference in references
                ):
                    if "deletionTimestamp" not in metadata:
                        self.delete(found)
                elif "deletionTimestamp" in metadata and FOREGROUND in metadata.get("finalizers", []):
                    self._delete_owned(found)

    def _delete_owned(self, owner: Object) -> None:
        waited_for = False
        for owned in self.owned_by(owner):
            if "deletionTimestamp" not in owned["metadata"]:
                self.delete(owned, "Foreground")
            waited_for |= any(
                reference.get("blockOwnerDeletion")
                for reference in owned["metadata"]["ownerReferences"]
                if reference["uid"] == owner["metadata"]["uid"]
            )
        if not waited_for:
            owner["metadata"]["finalizers"].remove(FOREGROUND)
            if not owner["metadata"]["finalizers"]:
                self.remove(owner)
