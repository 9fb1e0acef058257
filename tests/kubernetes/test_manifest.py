"""The PyTorchJob's manifest: strictly valid, safe by default, and comparable with the one that is there."""

import copy

import pytest

from osft.kubernetes.manifest import (
    SPEC_HASH,
    JobIdentity,
    JobOwner,
    Storage,
    differences,
    job_name,
    label_value,
)
from osft.kubernetes.pytorchjob import PyTorchJob
from osft.kubernetes.settings import JobSettings
from osft.settings.training import TrainConfig
from osft.training.job import train_arguments
from tests.cluster.schema import job_problems, metadata_problems

RUN = "4f1c9f0e-53a8-4d0c-9f6e-0f8f4c1f2a77"
AFFINITY = {
    "podAntiAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"a": "b"}}}
        ]
    }
}
EVERYTHING = {
    "num_workers": 4,
    "num_procs_per_worker": 8,
    "gpus": 8,
    "gpu_resource": "amd.com/gpu",
    "cpu": "500m",
    "cpu_limit": "2",
    "memory": "256Gi",
    "shared_memory": "16Gi",
    "image": "registry.example/other:1",
    "image_pull_secrets": ["registry"],
    "image_pull_policy": "Always",
    "env": {"HF_TOKEN": {"secret": "hf", "key": "token"}, "NCCL_DEBUG": {"config_map": "nccl", "key": "debug"}},
    "env_from": [{"secret": "s"}, {"config_map": "c"}],
    "volumes": [{"claim": "datasets", "mount_path": "/data", "read_only": True}],
    "node_selector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": AFFINITY,
    "priority_class": "high",
    "service_account": "trainer",
    "run_as_user": 1234,
    "fs_group": 0,
    "kueue_queue": "research",
    "gang_scheduling": True,
    "gang_queue": "gang",
    "active_deadline_seconds": 3600,
}


def manifest(given=None, *, storage=Storage(claim="osft-storage"), command=("osft", "train"), owner=None):  # noqa: B008
    settings = JobSettings.from_parameters(given or {})
    identity = JobIdentity(
        name=job_name(RUN, "train-osft"), namespace="user", labels={"osft/pipeline-run-id": RUN}, owner=owner
    )
    image = settings.image or "registry.example/osft:1"
    (job,) = PyTorchJob().manifests(identity, settings, image=image, command=list(command), storage=storage)
    return job


def pod_specs(job):
    return [replica["template"]["spec"] for replica in job["spec"]["pytorchReplicaSpecs"].values()]


@pytest.mark.parametrize(
    "job",
    [manifest(), manifest(EVERYTHING), manifest(storage=Storage(secret="osft-s3")), manifest({"gpus": 0})],
    ids=["defaults", "everything", "object-store", "cpu"],
)
def test_manifest_is_strictly_valid(job):
    assert metadata_problems(job["metadata"]) == []
    assert job_problems(job) == []


def test_pods_are_one_master_and_the_other_workers():
    replicas = manifest({"num_workers": 4})["spec"]["pytorchReplicaSpecs"]
    assert {kind: replica["replicas"] for kind, replica in replicas.items()} == {"Master": 1, "Worker": 3}
    assert set(manifest({"num_workers": 1})["spec"]["pytorchReplicaSpecs"]) == {"Master"}


def check_pod_of_everything(spec: dict) -> None:
    """That of a pod of EVERYTHING, in a job of any kind."""
    (container,) = spec["containers"]
    assert container["resources"]["requests"] == {"cpu": "500m", "memory": "256Gi", "amd.com/gpu": "8"}
    assert container["resources"]["limits"] == {"cpu": "2", "memory": "256Gi", "amd.com/gpu": "8"}
    assert (container["image"], container["imagePullPolicy"]) == ("registry.example/other:1", "Always")
    environment = {variable["name"]: variable.get("valueFrom") for variable in container["env"]}
    assert environment["HF_TOKEN"] == {"secretKeyRef": {"name": "hf", "key": "token"}}
    assert environment["NCCL_DEBUG"] == {"configMapKeyRef": {"name": "nccl", "key": "debug"}}
    assert container["envFrom"] == [{"secretRef": {"name": "s"}}, {"configMapRef": {"name": "c"}}]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert volumes[mounts["/mnt/osft"]]["persistentVolumeClaim"]["claimName"] == "osft-storage"
    assert volumes[mounts["/data"]]["persistentVolumeClaim"] == {"claimName": "datasets", "readOnly": True}
    assert spec["nodeSelector"] == {"gpu": "h100"}
    assert spec["tolerations"] == EVERYTHING["tolerations"]
    assert spec["affinity"] == AFFINITY
    assert spec["serviceAccountName"] == "trainer"
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert container["securityContext"]["runAsUser"] == 1234
    assert spec["priorityClassName"] == "high"
    assert spec["securityContext"]["fsGroup"] == 0


def test_what_is_set_arrives_where_kubernetes_reads_it():
    job = manifest(EVERYTHING)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert job["spec"]["nprocPerNode"] == "8"
    policy = job["spec"]["runPolicy"]
    assert policy["schedulingPolicy"] == {"minAvailable": 4, "queue": "gang", "priorityClass": "high"}
    assert policy["activeDeadlineSeconds"] == 3600
    for spec in pod_specs(job):
        check_pod_of_everything(spec)


def test_pods_have_no_rights_that_training_does_not_need():
    for spec in pod_specs(manifest()):
        assert spec["automountServiceAccountToken"] is False
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("settings", [{}, {"run_as_user": 1234, "fs_group": 5}], ids=["defaults", "given"])
def test_nothing_of_the_pod_forbids_the_operators_init_container_to_be_root(settings):
    for spec in pod_specs(manifest(settings)):
        assert not spec["securityContext"].keys() & {"runAsNonRoot", "runAsUser", "runAsGroup"}
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


def test_istio_is_kept_out_by_label_and_annotation_unless_it_is_wanted():
    (template,) = [r["template"] for r in manifest()["spec"]["pytorchReplicaSpecs"].values()]
    assert template["metadata"]["annotations"]["sidecar.istio.io/inject"] == "false"
    assert template["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"
    (template,) = [r["template"] for r in manifest({"istio_sidecar": True})["spec"]["pytorchReplicaSpecs"].values()]
    assert "sidecar.istio.io/inject" not in str(template)


def test_life_cycle_is_set_deliberately():
    job = manifest({"max_restarts": 3})
    policy = job["spec"]["runPolicy"]
    assert policy == {"cleanPodPolicy": "Running", "backoffLimit": 3, "ttlSecondsAfterFinished": 86400}
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        assert replica["restartPolicy"] == "ExitCode"
        assert replica["template"]["spec"]["terminationGracePeriodSeconds"] == 150
        assert replica["template"]["spec"]["containers"][0]["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_without_a_claim_pods_have_scratch_space_and_the_store_credentials_by_reference():
    (spec,) = pod_specs(manifest(storage=Storage(secret="osft-s3")))
    (container,) = spec["containers"]
    assert {"secretRef": {"name": "osft-s3"}} in container["envFrom"]
    scratch = next(variable["value"] for variable in container["env"] if variable["name"] == "OSFT_SCRATCH")
    assert scratch in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert not any("persistentVolumeClaim" in volume for volume in spec["volumes"])


def test_owner_is_referred_to_without_holding_up_its_deletion():
    owner = JobOwner(api_version="argoproj.io/v1alpha1", kind="Workflow", name="w", uid="u")
    (reference,) = manifest(owner=owner)["metadata"]["ownerReferences"]
    assert (reference["kind"], reference["uid"]) == ("Workflow", "u")
    assert reference["blockOwnerDeletion"] is False


def test_labels_connect_job_and_pods_with_the_run():
    job = manifest()
    (template,) = [r["template"] for r in job["spec"]["pytorchReplicaSpecs"].values()]
    for labels in (job["metadata"]["labels"], template["metadata"]["labels"]):
        assert labels["osft/pipeline-run-id"] == RUN
        assert labels["app.kubernetes.io/name"] == "osft-training"


def test_name_is_the_same_for_each_attempt_another_for_each_run_and_short_enough_for_pods():
    assert job_name(RUN, "train-osft") == job_name(RUN, "train-osft")
    assert len({job_name(RUN, "train-osft"), job_name(RUN, "other"), job_name(RUN[:-1] + "8", "train-osft")}) == 3
    for run in (RUN, "x" * 200, "Ünïcode RUN/7", "-"):
        name = job_name(run, "t")
        assert len(f"{name}-worker-999") <= 63
        assert name.replace("-", "").isalnum()
        assert name == name.lower()
        assert not name.endswith("-")


def test_label_values_are_valid():
    assert label_value("a/b c" + "x" * 100) == ("a-b-c" + "x" * 100)[:63]
    assert label_value("-._") == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"affinity": {"nodeAffinitty": {}}}, "affinity: Kubernetes knows no field 'nodeAffinitty'"),
        ({"tolerations": [{"keys": "a"}]}, r"tolerations\[0\]: Kubernetes knows no field 'keys'"),
        ({"affinity": {"nodeAffinity": "ssd"}}, "affinity.nodeAffinity must be a dict"),
    ],
)
def test_fields_that_kubernetes_would_drop_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        manifest(given)


def test_equal_specs_have_equal_hashes_and_different_ones_say_where():
    before, same = manifest({"memory": "32Gi"}), manifest({"memory": "32Gi"})
    assert before["metadata"]["annotations"][SPEC_HASH] == same["metadata"]["annotations"][SPEC_HASH]
    now = manifest({"memory": "64Gi"}, command=("osft", "train", "--set", "seed=7"))
    assert before["metadata"]["annotations"][SPEC_HASH] != now["metadata"]["annotations"][SPEC_HASH]
    found = differences(now["spec"], before["spec"])
    assert any("memory: '32Gi' there, '64Gi' now" in line for line in found)
    assert any("command: nothing there, --set, seed=7 now" in line for line in found)


def test_what_the_server_added_is_no_difference():
    job = manifest()
    server = copy.deepcopy(job)
    server["spec"]["runPolicy"]["suspend"] = False
    server["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["ports"] = [{"name": "x"}]
    assert differences(job["spec"], server["spec"]) == []


def config(**given):
    required = {
        "model_path": "/m",
        "data_path": "/d",
        "unfreeze_rank_ratio": 0.25,
        "effective_batch_size": 8,
        "max_tokens_per_gpu": 128,
        "max_seq_len": 128,
        "learning_rate": 1e-5,
        "ckpt_output_dir": "/o",
    }
    return TrainConfig(**(required | given))


def test_command_restores_the_very_same_settings():
    from osft.cli import read_parameters

    wanted = config(
        target_patterns=["q_proj", "up_.*"],
        lr_scheduler_kwargs={"num_cycles": 2},
        num_epochs=3,
        document_column_name="7",
    )
    command, *arguments = train_arguments(wanted)
    assert command == "train"
    assert set(arguments[::2]) == {"--set"}
    assert TrainConfig.from_parameters(read_parameters(None, arguments[1::2])) == wanted


def test_credentials_in_a_uri_do_not_get_into_the_command():
    with pytest.raises(ValueError, match="mlflow_tracking_uri holds credentials") as error:
        train_arguments(config(mlflow_tracking_uri="https://me:hunter2@mlflow.example"))
    assert "hunter2" not in str(error.value)
