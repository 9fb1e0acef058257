"""A job of either kind as a test launches it: a small shell script in each pod; and what is left of it at the end."""

import contextlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from osft.kubernetes.api import ClusterApi
from osft.kubernetes.kinds import JobKind
from osft.kubernetes.launcher import JobLauncher
from osft.kubernetes.manifest import JobIdentity, Storage
from osft.kubernetes.settings import JobSettings
from osft.kubernetes.training_job import KINDS
from osft.training.job import JobStatus, Limits, run_job
from tests.cluster.cluster import Cluster

NAME = "osft-run-1a2b3c4d"
POLL = 0.1


class Launched:
    """One attempt at a job, and what it printed."""

    def __init__(
        self, cluster: Cluster, kind: JobKind, folder: Path, script: str, settings: dict[str, Any], patience: float
    ) -> None:
        api = ClusterApi(cluster.namespace, patience_seconds=patience)
        self.settings = JobSettings.from_parameters({"gpus": 0, "num_workers": 2} | settings)
        manifests = kind.manifests(
            JobIdentity(name=NAME, namespace=cluster.namespace),
            self.settings,
            image="registry.example/osft:1",
            command=["sh", "-c", script],
            storage=Storage(claim="osft-storage"),
        )
        self.runtime, self.manifest = manifests[0], manifests[-1]
        self.launcher = JobLauncher(api, kind, manifests, other_kinds=KINDS, poll_seconds=POLL)
        self.output = folder / "output"
        self.printed = io.StringIO()

    def run(self, limits: Limits | None = None) -> str:
        """Follow the job to its end; what was printed."""
        with contextlib.redirect_stdout(self.printed):
            run_job(self.launcher, limits=limits or self.settings.limits, output=self.output, poll_seconds=POLL)
        return self.printed.getvalue()

    def status(self, condition: Callable[[JobStatus], Any]) -> JobStatus:
        """The first status that is so."""
        deadline = time.monotonic() + 10
        while not condition(status := self.launcher.status()):
            assert time.monotonic() < deadline, status
            time.sleep(POLL)
        return status


def uids(cluster: Cluster) -> list[str]:
    return [job["metadata"]["uid"] for job in cluster.jobs()]


def assert_only_job(cluster: Cluster, condition: str) -> None:
    """`condition`: Succeeded or Failed, as a PyTorchJob calls them."""
    (job,) = cluster.jobs()
    wanted = {"PyTorchJob": ["Created", condition], "TrainJob": [condition.replace("Succeeded", "Complete")]}
    assert [c["type"] for c in job["status"]["conditions"] if c["status"] == "True"] == wanted[job["kind"]]
    cluster.wait_until(lambda: not cluster.processes())


def pod_of_rank_0(cluster: Cluster) -> str:
    """The name of the Master, or of the first node."""
    names = [pod["metadata"]["name"] for pod in cluster.pods()]
    (name,) = [name for name in names if name.startswith((f"{NAME}-master-0", f"{NAME}-node-0-0-"))]
    return name


def assert_nothing_left(cluster: Cluster) -> None:
    assert cluster.jobs() == []
    assert cluster.pods() == []
    assert not cluster.processes()
