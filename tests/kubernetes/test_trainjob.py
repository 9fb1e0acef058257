"""The TrainJob and its TrainingRuntime, checked against the real CRDs: what stands where, and what cannot be had."""

import copy

import pytest

from osft.kubernetes.manifest import JobIdentity, Storage
from osft.kubernetes.settings import JobSettings
from osft.kubernetes.trainjob import TrainJob
from tests.cluster import crds
from tests.cluster.schema import jobset_problems, metadata_problems
from tests.cluster.trainer import jobset_of
from tests.kubernetes.test_manifest import EVERYTHING, check_pod_of_everything

POSSIBLE = {name: value for name, value in EVERYTHING.items() if not name.startswith("gang_")}
PLURALS = ("trainingruntimes", "trainjobs")


def manifests(given=None, *, storage=Storage(claim="osft-storage"), labels=None):  # noqa: B008
    settings = JobSettings.from_parameters(given or {})
    identity = JobIdentity(name="osft-run-1a2b3c4d", namespace="user", labels=labels or {"osft/task": "train-osft"})
    image = settings.image or "registry.example/osft:1"
    return TrainJob().manifests(identity, settings, image=image, command=["osft", "train"], storage=storage)


def jobset(given=None, **more):
    """What Kubeflow Trainer makes of it."""
    runtime, job = manifests(given, **more)
    return jobset_of(
        job | {"metadata": job["metadata"] | {"uid": "u"}, "spec": job["spec"] | {"suspend": False}}, runtime
    )


def pod_template(found):
    (node,) = found["spec"]["replicatedJobs"]
    return node["template"]["spec"]["template"]


@pytest.mark.parametrize(
    "found",
    [manifests(), manifests(POSSIBLE), manifests(storage=Storage(secret="osft-s3")), manifests({"gpus": 0})],
    ids=["defaults", "everything", "object-store", "cpu"],
)
def test_manifests_are_strictly_valid(found):
    for plural, manifest in zip(PLURALS, found, strict=True):
        assert metadata_problems(manifest["metadata"]) == []
        assert list(crds.unknown_fields(manifest, crds.schema(plural))) == []
        assert crds.problems(plural, manifest) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda job: job["metadata"].update(name="7job"), "RFC 1035"),
        (lambda job: job["metadata"].update(name="j" * 64), "no more than 63"),
        (lambda job: job["spec"]["trainer"].update(numNodes="two"), "'two' is not of type 'integer'"),
        (lambda job: job["spec"].pop("runtimeRef"), "'runtimeRef' is a required property"),
        (lambda job: job["spec"].update(managedBy="me"), "ManagedBy must be"),
    ],
)
def test_what_the_crd_forbids_is_found(change, problem):
    """Also by its CEL rules: otherwise the test above shows nothing."""
    job = copy.deepcopy(manifests()[1])
    change(job)
    assert any(problem in told for told in crds.problems("trainjobs", job))


@pytest.mark.parametrize("given", [{}, POSSIBLE], ids=["defaults", "everything"])
def test_jobset_that_is_made_of_it_is_valid(given):
    found = jobset(given) | {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet"}
    assert list(crds.unknown_fields(found, crds.schema("jobsets"))) == []
    assert crds.problems("jobsets", found) == []
    assert jobset_problems(found) == []


def test_what_is_set_arrives_where_kubernetes_reads_it():
    _, job = manifests(POSSIBLE)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert job["spec"]["activeDeadlineSeconds"] == 3600
    assert (job["spec"]["trainer"]["numNodes"], job["spec"]["trainer"]["numProcPerNode"]) == (4, 8)
    spec = pod_template(jobset(POSSIBLE))["spec"]
    (container,) = spec["containers"]
    assert container["name"] == "node"
    check_pod_of_everything(spec)


def test_pods_have_no_rights_that_training_does_not_need_and_keep_their_last_lines():
    template = pod_template(jobset())
    spec = template["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["restartPolicy"] == "Never"
    assert spec["terminationGracePeriodSeconds"] == 150
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert container["securityContext"] == {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert template["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"
    assert template["metadata"]["labels"]["app.kubernetes.io/name"] == "osft-training"
    assert template["metadata"]["labels"]["osft/task"] == "train-osft"


def test_program_errors_fail_the_job_lost_peers_are_replaced_and_the_rest_restarts_all():
    spec = jobset({"max_restarts": 3, "ttl_seconds_after_finished": 60})["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 3
    assert spec["ttlSecondsAfterFinished"] == 60
    (node,) = spec["replicatedJobs"]
    assert node["template"]["spec"]["backoffLimit"] == 0
    fail, ignore = node["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", list(range(1, 128)))
    assert (ignore["action"], ignore["onExitCodes"]["values"]) == ("Ignore", [141])


def test_runtime_is_named_by_its_content():
    def name(given, **more):
        runtime, job = manifests(given, **more)
        assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
        return runtime["metadata"]["name"]

    same = name({"memory": "1Gi"})
    assert same == name({"memory": "2Gi", "image": "other", "num_workers": 4}, labels={"osft/task": "another"})
    others = [{"max_restarts": 1}, {"ttl_seconds_after_finished": 1}, {"priority_class": "high"}]
    others += [{"image_pull_policy": "Always"}, {"env_from": [{"secret": "s"}]}]
    assert len({same, *(name(given) for given in others)}) == 6


@pytest.mark.parametrize("given", [{"gang_scheduling": True}, {"gang_queue": "q"}])
def test_what_a_trainjob_cannot_have_is_refused_by_name(given):
    with pytest.raises(
        ValueError, match=f"{next(iter(given))} cannot be had with launcher=trainjob.*launcher=pytorchjob"
    ):
        manifests(given)
