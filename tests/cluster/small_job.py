"""A step that follows a job on the cluster, and what the job's pod runs: all of a training but the training.

python -m tests.cluster.small_job follow LAUNCHER OUTPUT LEASE_MINUTES     in the pod of the step
python -m tests.cluster.small_job train OUTPUT                             in the pod of the job
"""

import signal
import sys
import time
from pathlib import Path
from types import FrameType

from osft.kubernetes.api import ClusterApi
from osft.kubernetes.launcher import JobLauncher
from osft.kubernetes.manifest import JobIdentity, Storage
from osft.kubernetes.settings import JobSettings
from osft.kubernetes.training_job import KINDS
from osft.process import logs
from osft.process.exit_codes import ABANDONED, INTERRUPTED
from osft.training.job import run_job
from osft.training.lease import LeaseWatch


def follow(launcher: str, output: str, lease_minutes: str) -> None:
    """Start the job, or find it, and follow it to its end."""
    logs.configure(step="train-osft")
    api = ClusterApi()
    settings = JobSettings(gpus=0, num_workers=1, lease_minutes=float(lease_minutes))
    (kind,) = (kind for kind in KINDS if kind.launcher == launcher)
    manifests = kind.manifests(
        JobIdentity(name="osft-small", namespace=api.namespace),
        settings,
        image="registry.example/osft:1",
        command=["python", "-m", "tests.cluster.small_job", "train", output],
        storage=Storage(claim="osft-storage"),
    )
    run_job(JobLauncher(api, kind, manifests, poll_seconds=0.2), limits=settings.limits, output=output)


def train(output: str) -> None:
    """Ends as training does: with its state saved if it is asked to end, or has lost its lease; then it resumes.

    The first attempt makes no end of itself, the second one is done soon.
    """
    state = Path(output) / "state"
    begun = time.monotonic()

    def save(code: int) -> None:
        state.write_text("saved")
        sys.exit(code)

    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        save(INTERRUPTED)

    signal.signal(signal.SIGTERM, on_sigterm)
    watch = LeaseWatch.of_this_process(output)
    resumed = state.exists()
    print("resumes" if resumed else "begins", flush=True)
    while not (resumed and time.monotonic() - begun > 1):
        if watch and watch.is_lost:
            save(ABANDONED)
        time.sleep(0.05)


if __name__ == "__main__":
    {"follow": follow, "train": train}[sys.argv[1]](*sys.argv[2:])
