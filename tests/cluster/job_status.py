"""The status of a PyTorchJob as operator v1.9 writes it: conditions that exclude one another, counts of pods."""

from typing import Any

from tests.cluster.store import Object
from tests.cluster.timestamps import seconds_text

KIND = "PyTorchJob"


def is_true(job: Object, kind: str) -> bool:
    conditions = job.get("status", {}).get("conditions") or []
    return any(found["type"] == kind and found["status"] == "True" for found in conditions)


def is_finished(job: Object) -> bool:
    return is_true(job, "Succeeded") or is_true(job, "Failed")


def set_condition(job: Object, kind: str, message: str, value: bool = True, reason: str = "") -> None:
    """Running and Restarting replace each other; Succeeded and Failed make Running false; Failed is the last word."""
    if is_true(job, "Failed"):
        return
    conditions = job.setdefault("status", {}).setdefault("conditions", [])
    new = {
        "type": kind,
        "status": "True" if value else "False",
        "reason": f"{KIND}{reason or kind}",
        "message": message,
        "lastUpdateTime": seconds_text(),
        "lastTransitionTime": seconds_text(),
    }
    kept: list[dict[str, Any]] = []
    for old in conditions:
        if old["type"] == kind:
            if (old["status"], old["reason"]) == (new["status"], new["reason"]):
                return
            if old["status"] == new["status"]:
                new["lastTransitionTime"] = old["lastTransitionTime"]
        elif {old["type"], kind} != {"Running", "Restarting"}:
            ended = kind in ("Succeeded", "Failed") and old["type"] == "Running"
            kept.append(old | {"status": "False"} if ended else old)
    job["status"]["conditions"] = [*kept, new]


def count_pods(job: Object, replica: str, pods: list[Object]) -> dict[str, int]:
    """The replica status of one type; a running pod that is being deleted counts as failed."""
    counts = {"active": 0, "succeeded": 0, "failed": 0}
    for pod in pods:
        phase = pod.get("status", {}).get("phase")
        if phase == "Running":
            counts["failed" if "deletionTimestamp" in pod["metadata"] else "active"] += 1
        elif phase in ("Succeeded", "Failed"):
            counts[phase.lower()] += 1
    written = {key: number for key, number in counts.items() if number}  # zeros are left out of the JSON
    selector = ",".join(
        f"training.kubeflow.org/{label}={value}"
        for label, value in (
            ("job-name", job["metadata"]["name"]),
            ("operator-name", "pytorchjob-controller"),
            ("replica-type", replica.lower()),
        )
    )
    job["status"].setdefault("replicaStatuses", {})[replica] = {**written, "selector": selector}
    return counts
