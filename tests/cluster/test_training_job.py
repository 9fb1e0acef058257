"""A training run's job of either kind as it arrives on the cluster: whose it is, what it may, what stands in it."""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

from osft.kubernetes.manifest import Storage
from osft.kubernetes.settings import JobSettings
from osft.kubernetes.training_job import KINDS, training_job
from osft.settings.training import TrainConfig
from osft.training.job import run_job
from tests.cluster.api_server import Call
from tests.cluster.training_step import ROLE, STEP_POD, WORKFLOW

pytestmark = pytest.mark.cluster

IMAGE = "registry.example/osft-training:0.1.0"


@pytest.fixture
def job(kind):
    """Makes the launcher of a job of that kind."""
    return lambda **given: job_of(kind, **given)


@pytest.fixture(autouse=True)
def in_the_step(monkeypatch) -> None:
    monkeypatch.setenv("KFP_POD_NAME", STEP_POD)


def job_of(kind, *, storage=Storage(claim="osft-storage"), image=IMAGE, settings=None, **given):  # noqa: B008
    config = {
        "model_path": "/mnt/osft/models/m",
        "data_path": "/mnt/osft/data/d",
        "factors": "/mnt/osft/factors/sets/f.json",
        "ckpt_output_dir": "/mnt/osft/rounds/r/train",
        "unfreeze_rank_ratio": 0.25,
        "effective_batch_size": 8,
        "max_tokens_per_gpu": 128,
        "max_seq_len": 128,
        "learning_rate": 1e-5,
    }
    return training_job(
        TrainConfig(**(config | given)),
        JobSettings(**({"gpus": 0} | (settings or {}))),
        launcher=kind.launcher,
        image=image,
        storage=storage,
        pipeline_run_id="4f1c9f0e-53a8-4d0c-9f6e-0f8f4c1f2a77",
        mlflow_run_id="0123456789abcdef",
    )


def test_job_belongs_to_the_workflow_and_goes_with_it(cluster, job):
    cluster.add_step_pod(STEP_POD, WORKFLOW)
    cluster.never_schedule()
    job().submit()
    (created,) = cluster.jobs()
    (owner,) = created["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("Workflow", WORKFLOW)
    cluster.delete("workflows", WORKFLOW)
    cluster.wait_until(lambda: not cluster.jobs())
    cluster.wait_until(lambda: not cluster.pods())


def test_job_outlives_the_pod_of_its_first_attempt(cluster, job):
    cluster.add_step_pod(STEP_POD, WORKFLOW)
    cluster.never_schedule()
    job().submit()
    cluster.wait_until(lambda: len(cluster.pods()) > 1)
    cluster.delete_pod(STEP_POD)
    cluster.wait_until(lambda: STEP_POD not in [pod["metadata"]["name"] for pod in cluster.pods()])
    assert len(cluster.jobs()) == 1


def test_without_a_pod_of_its_own_the_job_has_no_owner(cluster, job):
    cluster.never_schedule()
    job().submit()
    assert "ownerReferences" not in cluster.jobs()[0]["metadata"]


def test_labels_lead_from_job_and_pods_to_the_runs(cluster, job):
    cluster.never_schedule()
    job().submit()
    cluster.wait_until(cluster.pods)
    for found in cluster.jobs() + cluster.pods():
        labels = found["metadata"]["labels"]
        assert labels["osft/pipeline-run-id"] == "4f1c9f0e-53a8-4d0c-9f6e-0f8f4c1f2a77"
        assert labels["osft/mlflow-run-id"] == "0123456789abcdef"
    (container,) = cluster.pods()[0]["spec"]["containers"]
    told = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert told["OSFT_LOG_CONTEXT"] == "train-osft 0f8f4c1f2a77", "for the lines of its log"


def test_launcher_uses_the_rights_of_the_role_and_no_others(cluster, tmp_path):
    """A whole life of each kind: created, waiting, failing, its log read, found again, deleted."""
    (tmp_path / "osft").write_text("#!/bin/sh\nexit 2\n")
    (tmp_path / "osft").chmod(0o755)
    cluster.kubelet.image_environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    cluster.add_step_pod(STEP_POD, WORKFLOW)
    role = yaml.safe_load(ROLE.read_text())
    cluster.api.role = role
    for kind in KINDS:
        cluster.never_schedule()
        first = job_of(kind)
        first.submit()
        while "nodes are available" not in first.status().reason:
            pass
        cluster.recover()
        with redirect_stdout(io.StringIO()), pytest.raises(RuntimeError, match="ended with exit code 2"):
            run_job(first, limits=JobSettings().limits, output=tmp_path, poll_seconds=0.1)
        first.cancel()
        assert cluster.jobs() == []
    allowed = {
        Call(verb, group, resource)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert set(cluster.calls) == allowed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nproc_per_node": 2}, "give num_workers and num_procs_per_worker there"),
        ({"image": ""}, "Set job.image"),
        ({"model_path": "/home/me/model"}, "model_path /home/me/model is not below /mnt/osft"),
        ({"ckpt_output_dir": "/mnt/osft/../other"}, "ckpt_output_dir .* is not below /mnt/osft"),
    ],
)
def test_what_no_pod_could_do_is_refused_before_anything_is_created(cluster, job, given, message):
    with pytest.raises(ValueError, match=message):
        job(**given)
    assert cluster.jobs() == []


def test_object_store_needs_no_claim_and_gives_the_credentials_by_reference(cluster, job):
    cluster.never_schedule()
    uris = {name: f"s3://bucket/{name}" for name in ("model_path", "data_path", "factors", "ckpt_output_dir")}
    job(storage=Storage(secret="osft-s3"), **uris).submit()
    (pod, *_) = cluster.wait_until(cluster.pods)
    assert {"secretRef": {"name": "osft-s3"}} in pod["spec"]["containers"][0]["envFrom"]
    assert "persistentVolumeClaim" not in str(pod["spec"])


def test_without_a_cluster_the_error_says_what_to_do(job, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="there is no cluster to train on.*or use launcher=local"):
        job()
