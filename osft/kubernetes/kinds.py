"""What a launcher has to know of a kind of job: where it is in the API, and how its objects and pods are read.

There is a class for each: `osft.kubernetes.pytorchjob`, `osft.kubernetes.trainjob`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from osft.kubernetes.manifest import JobIdentity, Storage
from osft.kubernetes.settings import JobSettings
from osft.training.job import Phase

Object = dict[str, Any]
"""An object of the Kubernetes API, as its JSON."""


class Resource(NamedTuple):
    """A kind of objects of the Kubernetes API, and its address there."""

    group: str
    version: str
    plural: str
    kind: str
    brought_by: str
    """What has to be installed for it."""

    @property
    def api_version(self) -> str:
        """As an object says it."""
        return f"{self.group}/{self.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a job has ended, by its conditions."""

    phase: Phase
    since: str | None
    reason: str
    message: str


class JobKind(Protocol):
    """A kind of job. It has no state: what was seen of a job is the launcher's."""

    resource: Resource
    launcher: str
    """What the pipeline's parameter `launcher` calls it."""
    controller: str
    """What makes pods of it."""
    container: str
    """The container of its pods that trains."""
    needs: tuple[Resource, ...]
    """What has to be there before a job."""

    def manifests(
        self, identity: JobIdentity, settings: JobSettings, *, image: str, command: list[str], storage: Storage
    ) -> list[Object]:
        """One of each of `needs`, which may be there already, and last the job.

        Raises ValueError for settings that such a job, or Kubernetes, cannot have.
        """

    def num_pods(self, manifest: Object) -> int:
        """How many pods train together."""

    def pod_selector(self, name: str) -> str:
        """The label selector of the pods of the job `name`."""

    def node_rank(self, pod: Object) -> int:
        """The pod's place in the job."""

    def attempt(self, pod: Object) -> int:
        """How often all pods of the job were restarted together before this one was made."""

    def is_suspended(self, job: Object) -> bool:
        """Whether the job has to wait, for Kueue or for a person."""

    def is_taken_up(self, job: Object) -> bool:
        """Whether the controller has done something about it."""

    def outcome(self, job: Object) -> Outcome | None:
        """How it has ended; None if it has not."""

    def running_since(self, job: Object, pods: Sequence[Object]) -> str | None:
        """Since when it runs, given that all of its `pods` do; None if it is only about to."""

    def queued_since(self, job: Object, pods: Sequence[Object]) -> list[str | None]:
        """Times from which on it may have had to wait, besides its creation and its suspensions."""

    def event_sources(self, name: str) -> tuple[str, ...]:
        """The objects whose events tell why pods are missing."""

    def refusal_hint(self, message: str) -> str:
        """What may help if the API server refuses the job, or a pod of it, in these words; "" if that is not known."""


def condition(job: Object, kind: str, *, status: str = "True") -> Object | None:
    """The condition of that type, if it has that status."""
    for found in job.get("status", {}).get("conditions", []):
        if found["type"] == kind and found["status"] == status:
            return dict(found)
    return None


def ended(job: Object, kind: str, phase: Phase) -> Outcome | None:
    """The outcome that the condition `kind` stands for, if it is true."""
    found = condition(job, kind)
    if found is None:
        return None
    return Outcome(
        phase=phase,
        since=found.get("lastTransitionTime"),
        reason=found.get("reason", ""),
        message=found.get("message", ""),
    )


def moment(text: str | None) -> datetime:
    """A time of the API, or now."""
    return datetime.fromisoformat(text) if text else datetime.now(UTC)
