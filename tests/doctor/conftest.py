"""A subject without a cluster, whose parameters a test sets."""

from collections.abc import Callable
from typing import Any

import pytest

from osft.doctor.configuration import Configuration
from osft.doctor.finding import Finding
from osft.doctor.subject import Subject

Ask = Callable[..., list[Finding]]


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nonexistent/kubeconfig")
    for name in ("KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT", "KUBERNETES_SERVICE_HOST", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def subject(parameters: dict[str, Any] | None = None, **given: Any) -> Subject:
    values = {"storage_root": "/nonexistent/root", "unfreeze_rank_ratio": 0.25} | (parameters or {})
    return Subject(configured=Configuration(values=values, step_images=(), training_image=""), **given)
