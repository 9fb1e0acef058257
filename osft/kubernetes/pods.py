"""What the pods of a job tell: what they wait for, how they ended, and how far one is in the log of one."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from osft.kubernetes.kinds import JobKind, moment
from osft.process.exit_codes import CONNECTION_LOST, INTERRUPTED

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
_STARTING = {"ContainerCreating", "PodInitializing"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PodEnd:
    """How a pod's container ended."""

    pod: str
    node_rank: int
    exit_code: int | None
    """None: the pod was evicted, or its node is gone."""
    reason: str
    """Error, OOMKilled, Evicted, …"""
    message: str
    """The container's last lines, if the kubelet kept them."""
    finished: str

    def __str__(self) -> str:
        code = "without an exit code" if self.exit_code is None else f"with exit code {self.exit_code}"
        return f"node {self.node_rank} (pod {self.pod}) ended {code} ({self.reason})"


def newest_pods(pods: Iterable[dict[str, Any]], kind: JobKind) -> list[dict[str, Any]]:
    """Of each node the pod that was made last, in the nodes' order: those that ended before may still be there."""
    ordered = sorted(pods, key=lambda pod: _age(pod, kind))
    newest = {kind.node_rank(pod): pod for pod in ordered}
    return [newest[rank] for rank in sorted(newest)]


def _age(pod: dict[str, Any], kind: JobKind) -> tuple[int, str, bool]:
    """Sorts earlier pods before later ones; of those of the same second, the ones that have ended."""
    ended = pod.get("status", {}).get("phase") in ("Failed", "Succeeded")
    return kind.attempt(pod), pod["metadata"].get("creationTimestamp", ""), not ended


def is_active(pod: dict[str, Any]) -> bool:
    """True if the training container runs, or has done its work."""
    return pod.get("status", {}).get("phase") in ("Running", "Succeeded") and "deletionTimestamp" not in pod["metadata"]


def pod_end(pod: dict[str, Any], kind: JobKind) -> PodEnd | None:
    """How the pod failed; None if it has not."""
    status = pod.get("status", {})
    found = {"pod": pod["metadata"]["name"], "node_rank": kind.node_rank(pod)}
    for container in status.get("containerStatuses", []):
        ended = container.get("state", {}).get("terminated")
        if container["name"] == kind.container and ended:
            if ended["exitCode"] == 0:
                return None
            return PodEnd(
                **found,
                exit_code=ended["exitCode"],
                reason=ended.get("reason", "Error"),
                message=ended.get("message", ""),
                finished=ended.get("finishedAt") or "",
            )
    if status.get("phase") == "Failed":
        reason, message = status.get("reason", "Failed"), status.get("message", "")
        return PodEnd(**found, exit_code=None, reason=reason, message=message, finished="")
    return None


def end_in_events(pod: dict[str, Any], kind: JobKind, events: list[dict[str, Any]]) -> PodEnd | None:
    """How the pod that had this one's name before ended, by what the operator last said of it in the job's events."""
    name = pod["metadata"]["name"]
    for event in reversed(events):
        found = re.search(rf"\b{re.escape(name)} exited with code (\d+)", event.get("message", ""))
        if found:
            return PodEnd(
                pod=name,
                node_rank=kind.node_rank(pod),
                exit_code=int(found[1]),
                reason=event.get("reason", ""),
                message="",
                finished=event.get("lastTimestamp") or "",
            )
    return None


def root_failure(ends: Iterable[PodEnd]) -> PodEnd | None:
    """The end that the others follow from: the first that is not the loss of a peer or an orderly interruption."""
    consequences = (CONNECTION_LOST, INTERRUPTED)
    ordered = sorted(ends, key=lambda end: (end.exit_code in consequences, end.finished, end.node_rank))
    return ordered[0] if ordered else None


def waiting_reason(
    job: dict[str, Any],
    pods: list[dict[str, Any]],
    events: Callable[[str], list[dict[str, Any]]],
    *,
    kind: JobKind,
    expected: int,
) -> str:
    """What a job that does not run yet waits for; "" if it is only starting. `events` gives those of an object."""
    if kind.is_suspended(job):
        queue = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
        return f"suspended: waits for Kueue to admit it to the queue {queue}" if queue else "suspended"
    reasons = [reason for pod in pods if (reason := _pod_waits_for(pod, events))]
    if len(pods) < expected:
        warnings = [
            e
            for name in kind.event_sources(job["metadata"]["name"])
            for e in events(name)
            if e.get("type") == "Warning" and not _is_older(e, job)
        ]
        failed = [e for e in warnings if "Failed" in e.get("reason", "")]
        if failed:
            reasons.append(f"{failed[-1]['reason']}: {failed[-1]['message']}")
        elif not kind.is_taken_up(job):
            reasons.append(f"{kind.controller} has not taken the job up. Is it running?")
    return "; ".join(dict.fromkeys(reasons))


def is_refused_for_good(reason: str) -> bool:
    """Whether it says that no pod of that form may be in the namespace: to wait changes nothing."""
    return "violates PodSecurity" in reason


def _is_older(event: dict[str, Any], job: dict[str, Any]) -> bool:
    """Whether it tells of an earlier job of that name: events stay for an hour."""
    told, created = event.get("lastTimestamp") or event.get("eventTime"), job["metadata"].get("creationTimestamp")
    return bool(told and created) and moment(told) < moment(created)


def _pod_waits_for(pod: dict[str, Any], events: Callable[[str], list[dict[str, Any]]]) -> str:
    status, name = pod.get("status", {}), pod["metadata"]["name"]
    if status.get("phase", "Pending") != "Pending":
        return ""
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{name} is {condition.get('reason', 'unscheduled')}: {condition.get('message', '')}"
    containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    for container in containers:
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting.get("reason") and waiting["reason"] not in _STARTING:
            return f"{name} is in {waiting['reason']}: {waiting.get('message', '')}"
    warnings = [e for e in events(name) if e.get("type") == "Warning"]  # FailedMount, FailedAttachVolume, …
    return f"{name}: {warnings[-1]['reason']}: {warnings[-1]['message']}" if warnings else ""


class LogPosition:
    """The last line that was taken from one container's log, by its time; several lines can have the same one.

    By it a stream that broke is taken up with no line lost or shown twice.
    """

    def __init__(self) -> None:
        self._last = ("", "")
        self._last_text = ""
        self._taken = 0  # lines with the last one's time
        self._to_skip = 0

    def reopen(self) -> int | None:
        """The stream begins again: how many seconds back it should. None: at the log's beginning."""
        self._to_skip = self._taken
        if not self._last_text:
            return None
        back = datetime.now(UTC) - datetime.fromisoformat(self._last_text)
        return max(1, int(back.total_seconds()) + 10)  # some more, for clocks that differ

    def take(self, line: str) -> str | None:
        """The text of a line that begins with its time, or None if it was taken before.

        A line without one is not the container's but the kubelet's: it is text as it is, and no place to go on from.
        """
        written, _, text = line.partition(" ")
        if not _TIME.fullmatch(written):
            return line
        seconds, _, fraction = written.rstrip("Z").partition(".")
        time = (seconds, fraction.ljust(9, "0"))  # RFC 3339 leaves out trailing zeros, which would not sort
        if time < self._last:
            return None
        if time > self._last:
            self._last, self._last_text, self._taken, self._to_skip = time, written, 1, 0
            return text
        if self._to_skip:
            self._to_skip -= 1
            return None
        self._taken += 1
        return text
