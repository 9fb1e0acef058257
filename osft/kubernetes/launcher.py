"""The life of a job on a cluster, of either kind: found or made, watched, read, ended.

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
the step is cancelled                 SIGTERM: to delete the job is the first thing that happens, by one request.
                                      Pipelines leaves the step less than a second; one that is killed before it could
                                      send it leaves the job to its lease. Elsewhere it waits until the pods are gone.
the pipeline run is deleted           Kubernetes deletes what the run's workflow owns, the job too.
a pod dies                            It is restarted, alone or with the others, as its kind does (pytorchjob.py,
                                      trainjob.py), at most max_restarts times.
the job is suspended                  Kueue needs its place: its pods are deleted, and other ones made when it resumes.
                                      That is no restart, however often it happens.
a pod may never be made               PodSecurity refuses it (of the operator's init container): the job is deleted, and
                                      the step fails with the remedy.
the log stream breaks                 It is opened again where it broke; a line is printed once.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import urllib3
import yaml
from kubernetes.client.exceptions import ApiException

from osft.kubernetes.api import AlreadyExists, ClusterApi, NotServed
from osft.kubernetes.kinds import JobKind, Object, Outcome, condition, moment
from osft.kubernetes.manifest import SPEC_HASH, differences
from osft.kubernetes.pods import (
    LogPosition,
    PodEnd,
    end_in_events,
    is_active,
    is_refused_for_good,
    newest_pods,
    pod_end,
    root_failure,
    waiting_reason,
)
from osft.process.exit_codes import ABANDONED, FIRST_RETRYABLE
from osft.training.job import JobStatus, JobUnreachable, Phase

logger = logging.getLogger(__name__)

_LAST_LINES = 40


class JobLauncher:
    """One job, given as its manifests: what it needs, if anything, and last the job itself."""

    def __init__(
        self,
        api: ClusterApi,
        kind: JobKind,
        manifests: Sequence[Object],
        *,
        other_kinds: Sequence[JobKind] = (),
        poll_seconds: float = 2.0,
    ) -> None:
        self._api, self._kind, self._others, self._poll = api, kind, other_kinds, poll_seconds
        *self._needs, self._manifest = manifests
        self._name: str = self._manifest["metadata"]["name"]
        self._expected = kind.num_pods(self._manifest)
        self._pods_seen: dict[int, list[str]] = {}  # of each node in this attempt: uids, one more after each restart
        self._attempt = 0  # how often all of them were restarted together
        self._resumed = ""  # when the job was last taken out of a suspension
        self._earlier_restarts = 0  # those before that
        self._ends: dict[str, PodEnd] = {}  # uid -> how it ended; pods that are recreated are deleted
        self._ended = False
        self._uid = ""  # of the job, once it was seen

    def describe(self) -> str:
        """The manifests as YAML."""
        return yaml.safe_dump_all([*self._needs, self._manifest], sort_keys=False)

    def submit(self) -> None:
        """Create the job, or find the one that an earlier attempt has created.

        Raises ValueError if that one has another spec, the API server refuses it or does not know such jobs,
        PermissionError without the rights, and JobUnreachable.
        """
        kind = self._kind.resource.kind
        while True:
            found = self._get()
            if found is None:
                try:
                    self._create()
                except AlreadyExists:
                    continue  # by another attempt, or by this one, whose answer got lost
                logger.info(f"train: created {kind} {self._api.namespace}/{self._name}")
                return
            if "deletionTimestamp" in found["metadata"]:
                logger.info(f"train: waiting until the {kind} {self._name} is gone, which is being deleted")
                self._wait_until_gone(found["metadata"]["uid"])
                continue
            self._check_same(found)
            self._uid = found["metadata"]["uid"]
            if not self._has_failed(found) or self._program_error(found):
                logger.info(f"train: found {kind} {self._api.namespace}/{self._name}, watching it")
                return
            logger.warning("train: the job of an earlier attempt has failed; it is recreated and resumes from there")
            self._delete(self._uid)
            self._pods_seen.clear()
            self._attempt, self._uid = 0, ""

    def status(self) -> JobStatus:
        """How the job is, from its conditions and its pods."""
        job = self._get()
        if job is None or "deletionTimestamp" in job["metadata"]:
            self._ended = True
            return JobStatus(
                phase=Phase.FAILED,
                since=datetime.now(UTC),
                reason=f"the {self._kind.resource.kind} {self._name} is gone: somebody has deleted it",
            )
        self._uid = job["metadata"]["uid"]
        pods = self._pods()
        self._remember(job, pods)
        pods = newest_pods(pods, self._kind)
        seen: dict[str, Any] = {
            "restarts": self._restarts(),
            "failure": str(list(self._ends.values())[-1]) if self._ends else "",
        }
        outcome = self._kind.outcome(job)
        if outcome is not None:
            self._ended = True
            reason = self._failure(outcome) if outcome.phase is Phase.FAILED else ""
            return JobStatus(phase=outcome.phase, since=moment(outcome.since), reason=reason, **seen)
        if len(pods) >= self._expected and all(is_active(pod) for pod in pods):
            since = self._kind.running_since(job, pods)
            if since is not None:
                return JobStatus(phase=Phase.RUNNING, since=moment(since), **seen)
        waits_for = waiting_reason(job, pods, self._api.events, kind=self._kind, expected=self._expected)
        since = self._queued_since(job, pods)
        never = is_refused_for_good(waits_for)
        if never:
            waits_for = ". ".join(filter(None, (waits_for, self._kind.refusal_hint(waits_for))))
        reason = waits_for or seen["failure"]
        return JobStatus(phase=Phase.QUEUED, since=moment(since), reason=reason, cannot_start=never, **seen)

    def logs(self, stop: threading.Event) -> Iterator[str]:
        """Rank 0's log: over restarts of its pod, and over broken streams without a line twice."""
        uid, position = "", LogPosition()
        while not stop.is_set():
            ended = self._ended
            try:
                pods = newest_pods(self._pods(), self._kind)
                pod = next((pod for pod in pods if self._kind.node_rank(pod) == 0), None)
                if pod is not None and pod.get("status", {}).get("phase", "Pending") != "Pending":
                    if pod["metadata"]["uid"] != uid:
                        uid, position = pod["metadata"]["uid"], LogPosition()
                    name, since = pod["metadata"]["name"], position.reopen()
                    for line in self._api.follow_log(name, self._kind.container, since_seconds=since):
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
            job = self._get()
            self._uid = job["metadata"]["uid"] if job is not None and self._is_ours(job) else ""
        if self._uid:
            self._delete(self._uid)
            logger.info(f"train: {self._kind.resource.kind} {self._api.namespace}/{self._name} is deleted")
        self._ended = True

    def _get(self) -> Object | None:
        return self._api.get(self._kind.resource, self._name)

    def _pods(self) -> list[Object]:
        return self._api.pods(self._kind.pod_selector(self._name))

    def _create(self) -> None:
        """Create the job, and before it what it needs that is not there. Raises AlreadyExists if the job is."""
        try:
            for resource, needed in zip(self._kind.needs, self._needs, strict=True):
                self._api.ensure(resource, needed)
            self._api.create(self._kind.resource, self._manifest)
        except NotServed:
            raise ValueError(self._not_served()) from None
        except ValueError as error:
            hint = self._kind.refusal_hint(str(error))
            raise ValueError(f"{error}. {hint}" if hint else str(error)) from None

    def _not_served(self) -> str:
        """What to do on a cluster that does not know such jobs."""
        resource = self._kind.resource
        text = (
            f"the cluster knows no {resource.kind}s, or there is no namespace {self._api.namespace}. "
            f"Is {resource.brought_by} installed?"
        )
        others = [other for other in self._others if self._api.serves(other.resource)]
        return text + "".join(f" It knows {each.resource.kind}s: use launcher={each.launcher}" for each in others)

    def _has_failed(self, job: Object) -> bool:
        outcome = self._kind.outcome(job)
        return outcome is not None and outcome.phase is Phase.FAILED

    def _program_error(self, job: Object) -> bool:
        """Whether the job that is there failed by an error that it would meet again."""
        self._remember(job, self._pods())
        end = self._root_failure()
        return end is not None and _is_program_error(end) and end.exit_code != ABANDONED

    def _delete(self, uid: str) -> None:
        self._api.delete(self._kind.resource, self._name, uid)
        self._wait_until_gone(uid)

    def _wait_until_gone(self, uid: str) -> None:
        """Returns when neither the job nor a pod of it is there."""
        while True:
            job = self._get()
            if (job is None or job["metadata"]["uid"] != uid) and not self._pods():
                return
            time.sleep(self._poll)

    def _is_ours(self, found: Object) -> bool:
        ours: str = self._manifest["metadata"]["annotations"][SPEC_HASH]
        return bool(found["metadata"].get("annotations", {}).get(SPEC_HASH) == ours)

    def _check_same(self, found: Object) -> None:
        if not self._is_ours(found):
            differing = differences(self._manifest["spec"], found["spec"]) or ["its annotation"]
            raise ValueError(
                f"there is a {self._kind.resource.kind} {self._api.namespace}/{self._name} of this step already, with "
                f"another spec: {'; '.join(dict.fromkeys(differing))}. Delete it ({self._deletion()}), or start a new "
                "run"
            )

    def _deletion(self) -> str:
        return f"kubectl delete {self._kind.resource.kind.lower()} {self._name}"

    def _restarts(self) -> int:
        return self._attempt + self._earlier_restarts + self._restarted_alone()

    def _restarted_alone(self) -> int:
        return max((len(uids) - 1 for uids in self._pods_seen.values()), default=0)

    def _remember(self, job: Object, pods: list[Object]) -> None:
        """Note the pods, and how those ended that did, before they are deleted and recreated.

        Those from before a suspension are being deleted for it: they have not failed, nor do others restart them.
        """
        if condition(job, "Suspended"):
            return
        resumed = condition(job, "Suspended", status="False")
        if resumed and resumed["lastTransitionTime"] != self._resumed:
            self._earlier_restarts += self._restarted_alone()
            self._resumed = resumed["lastTransitionTime"]
            self._pods_seen.clear()
        for pod in sorted(pods, key=lambda pod: (self._kind.attempt(pod), pod["metadata"]["creationTimestamp"])):
            if pod["metadata"]["creationTimestamp"] < self._resumed:
                continue
            if self._kind.attempt(pod) > self._attempt:
                self._attempt = self._kind.attempt(pod)
                self._pods_seen.clear()
                logger.warning(f"train: all pods were restarted together, {self._attempt} times by now")
            rank, uid = self._kind.node_rank(pod), pod["metadata"]["uid"]
            seen = self._pods_seen.setdefault(rank, [])
            if uid not in seen:
                if seen and seen[-1] not in self._ends:  # deleted before it was looked at
                    events = self._api.events(self._name)
                    self._note_end(seen[-1], end_in_events(pod, self._kind, events))
                seen.append(uid)
            self._note_end(uid, pod_end(pod, self._kind))

    def _note_end(self, uid: str, end: PodEnd | None) -> None:
        if end and uid not in self._ends:
            self._ends[uid] = end
            logger.warning(f"train: {end}")

    def _root_failure(self) -> PodEnd | None:
        """Of the pods that are there last: how earlier ones ended is history."""
        last = [uids[-1] for uids in self._pods_seen.values()]
        return root_failure(self._ends[uid] for uid in last if uid in self._ends)

    def _failure(self, outcome: Outcome) -> str:
        """The reason of the rank that failed first, with its last lines."""
        end = self._root_failure()
        if end is None:
            told = ": ".join(filter(None, (outcome.reason, outcome.message)))
            return told or f"the {self._kind.resource.kind} failed"
        lines = self._api.log(end.pod, self._kind.container, tail_lines=_LAST_LINES)
        lines = lines or end.message.splitlines()[-_LAST_LINES:]
        # What would have been restarted ended the job by a limit.
        limit = "" if _is_program_error(end) else f"{outcome.reason}: {outcome.message}. "
        return (
            f"{end}. {limit}The job stays for people to look at ({self._deletion()} lets a retried step restart it). "
            "The last lines of its log:\n" + "\n".join(lines)
        )

    def _queued_since(self, job: Object, pods: list[Object]) -> str | None:
        """Since the creation, the last restart, or the last time that it was suspended or resumed."""
        suspended = (condition(job, "Suspended"), condition(job, "Suspended", status="False"))
        times = [
            job["metadata"].get("creationTimestamp"),
            *(each.get("lastTransitionTime") for each in suspended if each),
            *self._kind.queued_since(job, pods),
        ]
        return max(filter(None, times), default=None)


def _is_program_error(end: PodEnd) -> bool:
    return end.exit_code is not None and end.exit_code < FIRST_RETRYABLE
