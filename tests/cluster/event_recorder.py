"""Events, as controllers record them: the same event again raises its count."""

from tests.cluster.store import Object, Store
from tests.cluster.timestamps import seconds_text


class EventRecorder:
    """Write the events of one component (`training-operator`, `kubelet`, …) into the store."""

    def __init__(self, store: Store, component: str) -> None:
        self._store, self._component = store, component

    def record(self, about: Object, reason: str, message: str, warning: bool = False) -> None:
        metadata, now = about["metadata"], seconds_text()
        for event in self._store.objects("events", metadata["namespace"]):
            same = (event["involvedObject"].get("uid"), event["reason"], event["message"])
            if same == (metadata["uid"], reason, message):
                event["count"] += 1
                event["lastTimestamp"] = now
                self._store.changed(event)
                return
        event = {
            "metadata": {"name": f"{metadata['name']}.{self._store.version + 1:016x}"},
            "involvedObject": {
                "apiVersion": about["apiVersion"],
                "kind": about["kind"],
                "namespace": metadata["namespace"],
                "name": metadata["name"],
                "uid": metadata["uid"],
                "resourceVersion": metadata["resourceVersion"],
            },
            "type": "Warning" if warning else "Normal",
            "reason": reason,
            "message": message,
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "source": {"component": self._component},
            "reportingComponent": self._component,
            "reportingInstance": "",
        }
        self._store.create("events", event, metadata["namespace"])
