"""What pods tell that the stand-in cluster cannot have: volumes that are not mounted."""

import pytest

from osft.kubernetes.pods import waiting_reason
from osft.kubernetes.pytorchjob import PyTorchJob

STARTING = {"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}


@pytest.mark.parametrize(
    ("kind", "reason"), [("Warning", "job-master-0: FailedMount: no such export"), ("Normal", "")], ids=str
)
def test_pod_whose_volume_cannot_be_mounted_says_so(kind, reason):
    pod = {"metadata": {"name": "job-master-0"}, "status": STARTING}
    told = {"job-master-0": [{"type": kind, "reason": "FailedMount", "message": "no such export"}]}
    assert waiting_reason({"spec": {}}, [pod], told.__getitem__, kind=PyTorchJob(), expected=1) == reason
