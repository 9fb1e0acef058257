"""What a test breaks: answers of the API server, and what pods wait for."""

import threading
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from tests.cluster.access import Call

NO_GPU = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
EXCEEDED_QUOTA = (
    "exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: requests.nvidia.com/gpu=8, "
    "limited: requests.nvidia.com/gpu=8"
)


@dataclass(kw_only=True)
class AnswerFault:
    """A fault of the next `times` answers to calls that match; None: of all until `Faults.recover`."""

    verb: str
    resource: str
    times: int | None
    status: int | None = None
    """What is answered in place of serving the request."""
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    seconds: float = 0.0
    """How long the request waits before it is served."""
    cut: str = ""
    """`before`: the connection is cut before the request is served; `after`: after it was, so the answer is lost;
    `within`: in the middle of the answer's body."""

    def matches(self, call: Call) -> bool:
        return fnmatchcase(call.verb, self.verb) and fnmatchcase(call.resource, self.resource)


class Faults:
    """All faults of a cluster. Patterns of pods and calls are those of the shell (`*-worker-0`)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.answers: list[AnswerFault] = []
        self.unschedulable: list[str] = []
        self.unpullable: list[str] = []
        self.missing_claims: set[str] = set()
        self.quota_message = ""

    def recover(self) -> None:
        with self._lock:
            self.answers.clear()
        self.unschedulable.clear()
        self.unpullable.clear()
        self.missing_claims.clear()
        self.quota_message = ""

    def add_answer(self, fault: AnswerFault) -> None:
        with self._lock:
            self.answers.append(fault)

    def take(self, call: Call) -> list[AnswerFault]:
        """The faults of this call: every delay, and the first of the others; each counts as used."""
        taken: list[AnswerFault] = []
        with self._lock:
            for fault in self.answers:
                broken = any(other.status or other.cut for other in taken)
                if fault.times == 0 or not fault.matches(call) or (broken and not fault.seconds):
                    continue
                if fault.times is not None:
                    fault.times -= 1
                taken.append(fault)
        return taken

    def scheduling_problem(self, pod: dict[str, Any]) -> str | None:
        """Why the scheduler finds no node, in its own words."""
        if any(fnmatchcase(pod["metadata"]["name"], pattern) for pattern in self.unschedulable):
            return NO_GPU
        for volume in pod["spec"].get("volumes") or []:
            claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
            if claim in self.missing_claims:
                return f'0/3 nodes are available: persistentvolumeclaim "{claim}" not found.'
        return None

    def image_is_missing(self, pod: dict[str, Any]) -> bool:
        return any(fnmatchcase(pod["metadata"]["name"], pattern) for pattern in self.unpullable)
