"""The status of a pod with one container that runs, in the words of the kubelet."""

from typing import Any

from tests.cluster.container import Container
from tests.cluster.store import Object
from tests.cluster.timestamps import seconds_text

READINESS = ("Ready", "ContainersReady")


def set_condition(pod: Object, kind: str, value: bool, reason: str = "", message: str = "") -> bool:
    """Whether it changed anything."""
    conditions = pod.setdefault("status", {}).setdefault("conditions", [])
    wanted = {"type": kind, "status": "True" if value else "False"}
    wanted |= {"reason": reason} if reason else {}
    wanted |= {"message": message} if message else {}
    for condition in conditions:
        if condition["type"] == kind:
            if {key: text for key, text in condition.items() if key != "lastTransitionTime"} == wanted:
                return False
            conditions.remove(condition)
            break
    conditions.append(wanted | {"lastTransitionTime": seconds_text()})
    return True


def terminated(container: Container, fall_back_to_logs: bool) -> dict[str, Any]:
    """The terminated state of a container that has ended."""
    state = {
        "exitCode": container.exit_code,
        "reason": container.reason,
        "startedAt": seconds_text(container.started),
        "finishedAt": seconds_text(container.finished),
        "containerID": f"stand-in://{container.marker}",
    }
    message = container.message
    if not message and fall_back_to_logs and container.exit_code:
        message = container.last_lines()
    return state | ({"message": message} if message else {})


def set_container_state(pod: Object, spec: dict[str, Any], state: dict[str, Any], restarts: int = 0) -> bool:
    """Write the state of the container; a terminated state that it replaces becomes its last state."""
    status = pod.setdefault("status", {})
    (old,) = status.get("containerStatuses") or [{}]
    new = {
        "name": spec["name"],
        "image": spec.get("image", ""),
        "imageID": "",
        "ready": "running" in state,
        "started": "running" in state,
        "restartCount": restarts,
        "state": state,
        "lastState": old.get("lastState", {}),
    }
    if "terminated" in old.get("state", {}) and "terminated" not in state:
        new["lastState"] = old["state"]
    if new == old:
        return False
    status["containerStatuses"] = [new]
    for condition in READINESS:
        set_condition(pod, condition, new["ready"], "" if new["ready"] else "ContainersNotReady")
    return True


def set_init_state(pod: Object, spec: dict[str, Any], state: dict[str, Any]) -> bool:
    """Write the state of the init container; whether it changed anything."""
    new = {"name": spec["name"], "image": spec.get("image", ""), "restartCount": 0, "ready": False, "state": state}
    status = pod.setdefault("status", {})
    if status.get("initContainerStatuses") == [new]:
        return False
    status["initContainerStatuses"] = [new]
    return True


def set_phase(pod: Object, phase: str, reason: str = "", message: str = "") -> None:
    status = pod.setdefault("status", {})
    status["phase"] = phase
    status |= {"reason": reason} if reason else {}
    status |= {"message": message} if message else {}
