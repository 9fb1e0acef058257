"""The life of a PyTorchJob: found or made, watched, read, ended.

What happens when things fail:

the API is slow, overloaded, away,    Each call is repeated with growing pauses for ten minutes, then JobUnreachable:
restarts                              the job is left as it is, and a retried step finds it again. So is a call that
                                      is refused all of a sudden (401, 403), and an answer that breaks off.
the answer to a creation got lost     The repeated creation says 409; the job is found by its name, and is ours if its
                                      spec has our hash.
this process dies                     The job keeps running, until its lease ends (osft.training.lease). The retried
                                      step has the same job name, finds the job and follows it. If it has succeeded
                                      meanwhile, nothing is trained again. If it has failed by a program error, the step
                                      fails with the same reason, until somebody deletes the job; by anything else, it
                                      is recreated and resumes from its state.
the step is cancelled                 SIGTERM: to delete the job is the first thing that happens, by one request. Then
                                      the step waits until its pods are gone. A step that is killed before it could
                                      send it (KFP leaves it less than a second) leaves the job to its lease.
the pipeline run is deleted           Kubernetes deletes what the run's workflow owns, the job too.
a pod dies                            The operator recreates it (manifest.py), at most max_restarts times.
the job is suspended                  Kueue needs its place: its pods are deleted, and other ones made when it resumes.
                                      That is no restart, however often it happens.
the log stream breaks                 It is opened again where it broke; a line is printed once.
"""

import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import urllib3
import yaml
from kubernetes.client.exceptions import ApiException

from osft.kubernetes.api import AlreadyExists, ClusterApi
from osft.kubernetes.manifest import SPEC_HASH, differences
from osft.kubernetes.pods import (
    LogPosition,
    PodEnd,
    end_in_events,
    is_active,
    moment,
    node_rank,
    pod_end,
    root_failure,
    waiting_reason,
)
from osft.process.exit_codes import ABANDONED, FIRST_RETRYABLE
from osft.training.job import JobStatus, JobUnreachable, Phase

logger = logging.getLogger(__name__)

_LAST_LINES = 40


class PyTorchJobLauncher:
    """One PyTorchJob, given as its manifest."""

    def __init__(self, api: ClusterApi, manifest: dict[str, Any], *, poll_seconds: float = 2.0) -> None:
        self._api, self._manifest, self._poll = api, manifest, poll_seconds
        self._name: str = manifest["metadata"]["name"]
        self._expected = sum(spec["replicas"] for spec in manifest["spec"]["pytorchReplicaSpecs"].values())
        self._pods_seen: dict[str, list[str]] = {}  # name -> uids, of which there is one more after each restart
        self._resumed = ""  # when the job was last taken out of a suspension
        self._earlier_restarts = 0  # those before that
        self._ends: dict[str, PodEnd] = {}  # uid -> how it ended; the operator deletes pods that it recreates
        self._ended = False
        self._uid = ""  # of the job, once it was seen

    def describe(self) -> str:
        """The manifest as YAML."""
        return yaml.safe_dump(self._manifest, sort_keys=False)

    def submit(self) -> None:
        """Create the job, or find the one that an earlier attempt has created.

        Raises ValueError if that one has another spec or the API server refuses it, PermissionError without the
        rights, and JobUnreachable.
        """
        while True:
            found = self._api.get_job(self._name)
            if found is None:
                try:
                    self._api.create_job(self._manifest)
                except AlreadyExists:
                    continue  # by another attempt, or by this one, whose answer got lost
                logger.info(f"train: created PyTorchJob {self._api.namespace}/{self._name}")
                return
            if "deletionTimestamp" in found["metadata"]:
                logger.info(f"train: waiting until the PyTorchJob {self._name} is gone, which is being deleted")
                self._wait_until_gone(found["metadata"]["uid"])
                continue
            self._check_same(found)
            self._uid = found["metadata"]["uid"]
            if _condition(found, "Failed") is None or self._program_error(found):
                logger.info(f"train: found PyTorchJob {self._api.namespace}/{self._name}, watching it")
                return
            logger.warning("train: the job of an earlier attempt has failed; it is recreated and resumes from there")
            self._delete(self._uid)
            self._pods_seen.clear()
            self._uid = ""

    def status(self) -> JobStatus:
        """How the job is, from its conditions and its pods."""
        job = self._api.get_job(self._name)
        if job is None or "deletionTimestamp" in job["metadata"]:
            self._ended = True
            return JobStatus(
                phase=Phase.FAILED,
                since=datetime.now(UTC),
                reason=f"the PyTorchJob {self._name} is gone: somebody has deleted it",
            )
        self._uid = job["metadata"]["uid"]
        pods = self._api.pods(self._name)
        self._remember(job, pods)
        seen: dict[str, Any] = {
            "restarts": self._restarts(),
            "failure": str(list(self._ends.values())[-1]) if self._ends else "",
        }
        for kind, phase in (("Succeeded", Phase.SUCCEEDED), ("Failed", Phase.FAILED)):
            condition = _condition(job, kind)
            if condition:
                self._ended = True
                reason = self._failure(condition) if phase is Phase.FAILED else ""
                return JobStatus(phase=phase, since=moment(condition.get("lastTransitionTime")), reason=reason, **seen)
        running = _condition(job, "Running")
        if running and len(pods) >= self._expected and all(is_active(pod) for pod in pods):
            return JobStatus(phase=Phase.RUNNING, since=moment(running.get("lastTransitionTime")), **seen)
        reason = waiting_reason(job, pods, self._api.events, expected=self._expected)
        return JobStatus(phase=Phase.QUEUED, since=self._queued_since(job), reason=reason or seen["failure"], **seen)

    def logs(self, stop: threading.Event) -> Iterator[str]:
        """Rank 0's log: over restarts of its pod, and over broken streams without a line twice."""
        uid, position = "", LogPosition()
        while not stop.is_set():
            ended = self._ended
            try:
                pod = next((pod for pod in self._api.pods(self._name) if node_rank(pod) == 0), None)
                if pod is not None and pod.get("status", {}).get("phase", "Pending") != "Pending":
                    if pod["metadata"]["uid"] != uid:
                        uid, position = pod["metadata"]["uid"], LogPosition()
                    for line in self._api.follow_log(pod["metadata"]["name"], since_seconds=position.reopen()):
                        text = position.take(line)
                        if text is not None:
                            yield text
            except (ApiException, urllib3.exceptions.HTTPError, OSError, JobUnreachable) as error:
                # Opened again below, after the job's end too: its last lines are still there.
                if self._api.may_follow_later(error):
                    ended = False
            if ended:
                return
            time.sleep(self._poll)

    def cancel(self) -> None:
        """Delete the job and wait until it and its pods are gone. Does nothing if there is none, or another's."""
        if not self._uid:
            job = self._api.get_job(self._name)
            self._uid = job["metadata"]["uid"] if job is not None and self._is_ours(job) else ""
        if self._uid:
            self._delete(self._uid)
            logger.info(f"train: PyTorchJob {self._api.namespace}/{self._name} is deleted")
        self._ended = True

    def _program_error(self, job: dict[str, Any]) -> bool:
        """Whether the job that is there failed by an error that it would meet again."""
        self._remember(job, self._api.pods(self._name))
        end = self._root_failure()
        if end is None or end.exit_code is None or end.exit_code == ABANDONED:
            return False
        return end.exit_code < FIRST_RETRYABLE

    def _delete(self, uid: str) -> None:
        self._api.delete_job(self._name, uid)
        self._wait_until_gone(uid)

    def _wait_until_gone(self, uid: str) -> None:
        """Returns when neither the job nor a pod of it is there."""
        while True:
            job = self._api.get_job(self._name)
            if (job is None or job["metadata"]["uid"] != uid) and not self._api.pods(self._name):
                return
            time.sleep(self._poll)

    def _is_ours(self, found: dict[str, Any]) -> bool:
        ours: str = self._manifest["metadata"]["annotations"][SPEC_HASH]
        return bool(found["metadata"].get("annotations", {}).get(SPEC_HASH) == ours)

    def _check_same(self, found: dict[str, Any]) -> None:
        if not self._is_ours(found):
            differing = differences(self._manifest["spec"], found["spec"]) or ["its annotation"]
            raise ValueError(
                f"there is a PyTorchJob {self._api.namespace}/{self._name} of this step already, with another spec: "
                f"{'; '.join(dict.fromkeys(differing))}. Delete it (kubectl delete pytorchjob {self._name}), or start "
                "a new run"
            )

    def _restarts(self) -> int:
        return self._earlier_restarts + max((len(uids) - 1 for uids in self._pods_seen.values()), default=0)

    def _remember(self, job: dict[str, Any], pods: list[dict[str, Any]]) -> None:
        """Note the pods, and how those ended that did, before the operator deletes them.

        Those from before a suspension are being deleted for it: they have not failed, nor do others restart them.
        """
        if _condition(job, "Suspended"):
            return
        resumed = _condition(job, "Suspended", status="False")
        if resumed and resumed["lastTransitionTime"] != self._resumed:
            self._earlier_restarts = self._restarts()
            self._resumed = resumed["lastTransitionTime"]
            self._pods_seen.clear()
        for pod in pods:
            if pod["metadata"]["creationTimestamp"] < self._resumed:
                continue
            name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
            seen = self._pods_seen.setdefault(name, [])
            if uid not in seen:
                if seen and seen[-1] not in self._ends:  # deleted before it was looked at
                    self._note_end(seen[-1], end_in_events(pod, self._api.events(self._name)))
                seen.append(uid)
            self._note_end(uid, pod_end(pod))

    def _note_end(self, uid: str, end: PodEnd | None) -> None:
        if end and uid not in self._ends:
            self._ends[uid] = end
            logger.warning(f"train: {end}")

    def _root_failure(self) -> PodEnd | None:
        """Of the pods that are there last: how earlier ones ended is history."""
        last = [uids[-1] for uids in self._pods_seen.values()]
        return root_failure(self._ends[uid] for uid in last if uid in self._ends)

    def _failure(self, condition: dict[str, Any]) -> str:
        """The reason of the rank that failed first, with its last lines."""
        end = self._root_failure()
        if end is None:
            return str(condition.get("message", "the PyTorchJob failed"))
        lines = self._api.log(end.pod, tail_lines=_LAST_LINES) or end.message.splitlines()[-_LAST_LINES:]
        return (
            f"{end}. The job stays for people to look at (kubectl delete pytorchjob {self._name} lets a retried step "
            "restart it). The last lines of its log:\n" + "\n".join(lines)
        )

    def _queued_since(self, job: dict[str, Any]) -> datetime:
        """Since the creation, the last restart, or the last time that it was suspended or resumed."""
        found = (
            _condition(job, "Restarting"),
            _condition(job, "Suspended"),
            _condition(job, "Suspended", status="False"),
        )
        times = [job["metadata"].get("creationTimestamp"), *(each.get("lastTransitionTime") for each in found if each)]
        return moment(max(filter(None, times), default=None))


def _condition(job: dict[str, Any], kind: str, *, status: str = "True") -> dict[str, Any] | None:
    """The condition of that type, if it has that status."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] == kind and condition["status"] == status:
            found: dict[str, Any] = condition
            return found
    return None
