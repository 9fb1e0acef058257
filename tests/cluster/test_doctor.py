"""`osft doctor` on the stand-in cluster: a healthy one has no faults, and each thing that is spoilt is found."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from osft.cli import app
from osft.doctor.checks import examine
from osft.doctor.cluster_view import ClusterView
from osft.doctor.configuration import Configuration
from osft.doctor.finding import Finding
from osft.doctor.rights import rights_of
from osft.doctor.subject import Subject
from osft.kubernetes.training_job import KINDS
from pipelines.continual_learning.pipeline import YAML
from tests.cluster.cluster import Cluster
from tests.cluster.installation import GPU, GPU_TAINT
from tests.cluster.training_step import ROLE

pytestmark = pytest.mark.cluster

AREAS = ("cluster", "pods")
SECRET = "a-value-that-the-doctor-must-not-see"


@dataclass
class Setup:
    """A cluster, and the parameters that a round is to have on it."""

    cluster: Cluster
    parameters: dict[str, Any]
    compiled: Configuration

    @property
    def job(self) -> dict[str, Any]:
        return self.parameters["job"]

    @property
    def installation(self) -> Any:
        return self.cluster.installation

    def examine(self, areas: tuple[str, ...] = AREAS, **given: Any) -> list[Finding]:
        configured = replace(self.compiled, values={**self.compiled.values, **self.parameters})
        return list(examine(Subject(configured=configured, **given), areas))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make compile IMAGE=… TRAINING_IMAGE=…` writes it."""
    file = tmp_path_factory.mktemp("pipeline") / "pipeline.yaml"
    file.write_text(YAML.read_text().replace("localhost/osft", "registry.example/osft"))
    return file


@pytest.fixture(scope="session")
def compiled(pipeline: Path) -> Configuration:
    return Configuration.read(pipeline, None, [])


@pytest.fixture
def setup(cluster: Cluster, compiled: Configuration) -> Setup:
    """Everything that the parameters name is there."""
    cluster.add_secret("osft-huggingface", {"HF_TOKEN": SECRET})
    cluster.add("configmaps", {"metadata": {"name": "nccl"}, "data": {"NCCL_DEBUG": "WARN"}})
    job = {
        "num_workers": 2,
        "gpus": 8,
        "memory": "256Gi",
        "image": "registry.example/osft-training:1",
        "kueue_queue": "research",
        "env": {"HF_TOKEN": {"secret": "osft-huggingface", "key": "HF_TOKEN"}},
        "env_from": [{"config_map": "nccl"}],
        "tolerations": [{"key": GPU, "operator": "Exists"}],
        "node_selector": {"pool": "gpu"},
    }
    parameters = {
        "base_model": "org/model",
        "data_uri": "/mnt/osft/inbox/*.jsonl",
        "launcher": "pytorchjob",
        "job": job,
    }
    return Setup(cluster, parameters, compiled)


def faults(found: list[Finding]) -> list[Finding]:
    return [one for one in found if one.level in ("warning", "error")]


def test_healthy_setup_has_no_faults_and_nothing_is_left_unchecked_but_images(setup):
    found = setup.examine()
    assert faults(found) == []
    assert {one.about.partition(" ")[0] for one in found if one.level == "not checked"} == {"image"}
    assert {one.area for one in found} == set(AREAS)


def test_nothing_on_the_cluster_is_changed(setup):
    setup.examine()
    assert setup.cluster.jobs() == setup.cluster.pods() == []
    assert {call.verb for call in setup.cluster.calls if call.resource not in ("pods", "pytorchjobs")} <= {
        "get",
        "list",
    }


def test_no_value_of_a_secret_reaches_the_doctor(setup, monkeypatch):
    answers: list[Any] = []
    call = ClusterView._call

    def noted(*arguments: Any, **more: Any) -> Any:
        answers.append(call(*arguments, **more))
        return answers[-1]

    monkeypatch.setattr(ClusterView, "_call", noted)
    found = setup.examine()
    assert [one.level for one in found if one.about == "secret osft-huggingface"] == ["ok"]
    assert base64.b64encode(SECRET.encode()).decode() not in json.dumps(answers)


def no_operator(setup: Setup) -> None:
    del setup.installation.groups["kubeflow.org"]


def no_trainer(setup: Setup) -> None:
    no_operator(setup)
    del setup.installation.groups["trainer.kubeflow.org"]


def other_version(setup: Setup) -> None:
    setup.installation.groups["kubeflow.org"] = {"v2": {"pytorchjobs"}}


def operator_down(setup: Setup) -> None:
    setup.installation.deployment("training-operator", "kubeflow/training-operator:v1.9.4", ready=0)


def old_operator(setup: Setup) -> None:
    setup.installation.deployment("training-operator", "kubeflow/training-operator:v1.7.0")


def old_kubernetes(setup: Setup) -> None:
    setup.installation.version = {"major": "1", "minor": "24+", "gitVersion": "v1.24.9"}


def no_right_to_delete(setup: Setup) -> None:
    rules = yaml.safe_load(ROLE.read_text())["rules"]
    for rule in rules:
        if rule["resources"] == ["pytorchjobs"]:
            rule["verbs"] = [verb for verb in rule["verbs"] if verb != "delete"]
    setup.cluster.api.role = {"rules": rules}


def no_namespace(setup: Setup) -> None:
    del setup.installation.objects["namespaces", setup.cluster.namespace]


def restricted(setup: Setup) -> None:
    namespace = setup.installation.objects["namespaces", setup.cluster.namespace]
    namespace["metadata"]["labels"] = {"pod-security.kubernetes.io/enforce": "restricted"}


def quota_of_limits(setup: Setup) -> None:
    setup.installation.put("resourcequotas", "team", spec={"hard": {"limits.cpu": "100"}}, status={})


def full_quota(setup: Setup) -> None:
    amounts = {"requests.nvidia.com/gpu": "16"}
    setup.installation.put("resourcequotas", "team", spec={"hard": amounts}, status={"hard": amounts, "used": amounts})


def no_claim(setup: Setup) -> None:
    del setup.installation.objects["persistentvolumeclaims", "osft-storage"]


def claim_of_one_node(setup: Setup) -> None:
    setup.installation.objects["persistentvolumeclaims", "osft-storage"]["spec"]["accessModes"] = ["ReadWriteOnce"]


def pending_claim(setup: Setup) -> None:
    claim = setup.installation.objects["persistentvolumeclaims", "osft-storage"]
    claim["spec"]["storageClassName"], claim["status"] = "cephfs", {"phase": "Pending"}


def no_secret(setup: Setup) -> None:
    setup.cluster.delete("secrets", "osft-huggingface")


def no_config_map(setup: Setup) -> None:
    setup.cluster.delete("configmaps", "nccl")


def no_account(setup: Setup) -> None:
    setup.job["service_account"] = "trainer"


def no_priority(setup: Setup) -> None:
    setup.job["priority_class"] = "urgent"


def too_many_gpus(setup: Setup) -> None:
    setup.job["gpus"] = 16


def too_many_workers(setup: Setup) -> None:
    setup.job["num_workers"] = 3


def taint(setup: Setup) -> None:
    setup.job["tolerations"] = []


def no_such_label(setup: Setup) -> None:
    setup.job["node_selector"] = {"pool": "a100"}


def step_that_tolerates_nothing(setup: Setup) -> None:
    setup.parameters["evaluation_gpus"] = "1"


def no_kueue(setup: Setup) -> None:
    del setup.installation.groups["kueue.x-k8s.io"]


def no_queue(setup: Setup) -> None:
    setup.job["kueue_queue"] = "reserch"


def stopped_queue(setup: Setup) -> None:
    inactive = {"type": "Active", "status": "False", "reason": "Stopped", "message": "clusterQueue is stopped"}
    setup.installation.objects["localqueues", "research"]["status"]["conditions"] = [inactive]


def queue_without_gpus(setup: Setup) -> None:
    groups = [{"coveredResources": ["cpu", "memory"]}]
    setup.installation.objects["clusterqueues", "all"]["spec"]["resourceGroups"] = groups


def no_gang_scheduler(setup: Setup) -> None:
    setup.job["gang_scheduling"] = True


def image_of_this_machine(setup: Setup) -> None:
    setup.job["image"] = "localhost/osft-training:0.1.0"


@pytest.mark.parametrize(
    ("spoil", "about", "told", "remedy"),
    [
        (no_operator, "Kubeflow's training operator", "does not serve pytorchjobs", "set launcher: trainjob"),
        (
            no_trainer,
            "Kubeflow's training operator",
            "does not serve pytorchjobs",
            "Install Kubeflow's training operator",
        ),
        (other_version, "Kubeflow's training operator", "as v2 only, and osft writes v1", "Install"),
        (
            operator_down,
            "controller of Kubeflow's training operator",
            "has no pod that is ready",
            "describe deployment",
        ),
        (old_operator, "controller of Kubeflow's training operator", "older than 1.9", "Upgrade it to 1.9"),
        (old_kubernetes, "Kubernetes at", "v1.24.9 is older than 1.27", "Upgrade the cluster to 1.27"),
        (no_right_to_delete, "right to delete pytorchjobs", "may not delete pytorchjobs", "manifests/base"),
        (no_namespace, "namespace kubeflow-user", "does not exist", "kubectl create namespace kubeflow-user"),
        (restricted, "init container", "violates PodSecurity", "--pytorch-init-container-template-file"),
        (quota_of_limits, "dry run of a pod of the job", "must specify limits.cpu for: pytorch", "Set cpu_limit"),
        (full_quota, "ResourceQuota team", "requests.nvidia.com/gpu 16 of 16", "have the quota raised"),
        (no_claim, "claim osft-storage", "does not exist", "kubectl apply -k"),
        (claim_of_one_node, "claim osft-storage", "has ReadWriteOnce", "accessModes: [ReadWriteMany]"),
        (pending_claim, "claim osft-storage", "storage class cephfs does not exist", "kubectl get storageclass"),
        (no_secret, "secret osft-huggingface", "does not exist", "create secret generic osft-huggingface"),
        (no_config_map, "config map nccl", "does not exist", "create configmap nccl"),
        (no_account, "service account trainer", "does not exist", "create serviceaccount trainer"),
        (no_account, "dry run of a pod of the job", 'serviceaccount "trainer" not found', "service_account"),
        (no_priority, "PriorityClass urgent", "does not exist", "priority_class"),
        (too_many_gpus, "the job's pods", "no node has as much (the most of each: 64 cpu", "Ask for less"),
        (too_many_workers, "the job's pods", "2 of 3 pods", "Lower num_workers"),
        (taint, "the job's pods", f"{GPU}=present:NoSchedule", "'operator': 'Equal'"),
        (no_such_label, "the job's pods", "the labels pool=a100", "Correct node_selector"),
        (step_that_tolerates_nothing, "evaluate_model", GPU_TAINT["key"], "tolerations in the pipeline's parameters"),
        (no_kueue, "LocalQueue research", "Kueue is not installed", "Install Kueue"),
        (no_queue, "LocalQueue reserch", "would stay suspended", "Set kueue_queue of the job to one of: research"),
        (stopped_queue, "LocalQueue research", "clusterQueue is stopped", "kubectl describe localqueue research"),
        (queue_without_gpus, "ClusterQueue all", f"no quota of {GPU}", "resourceGroups"),
        (no_gang_scheduler, "gang scheduler", "serves no PodGroups", "gang_scheduling: false"),
        (image_of_this_machine, "image localhost/osft-training:0.1.0", "names this machine", "make compile IMAGE="),
    ],
)
def test_what_is_spoilt_is_found_with_its_remedy(
    setup: Setup, spoil: Callable[[Setup], None], about: str, told: str, remedy: str
) -> None:
    spoil(setup)
    found = [one for one in faults(setup.examine()) if one.about.startswith(about)]
    assert len(found) >= 1, f"nothing of {about}"
    assert any(told in one.text and remedy in one.remedy for one in found), found


@pytest.fixture
def trainjob(setup: Setup) -> Setup:
    """The same round, with the other operator alone."""
    setup.parameters["launcher"] = "trainjob"
    no_operator(setup)
    return setup


def test_healthy_setup_for_a_trainjob_has_no_faults_also_where_pods_are_restricted(trainjob):
    assert faults(trainjob.examine()) == []
    restricted(trainjob)
    assert faults(trainjob.examine()) == []


def no_trainer_but_operator(setup: Setup) -> None:
    del setup.installation.groups["trainer.kubeflow.org"]
    setup.installation.groups["kubeflow.org"] = {"v1": {"pytorchjobs"}}


def no_jobset(setup: Setup) -> None:
    del setup.installation.groups["jobset.x-k8s.io"]


def older_trainer(setup: Setup) -> None:
    setup.cluster.api.older_trainer = True


@pytest.mark.parametrize(
    ("spoil", "about", "told", "remedy"),
    [
        (no_trainer_but_operator, "Kubeflow Trainer", "does not serve", "set launcher: pytorchjob"),
        (no_jobset, "Kubeflow Trainer", "works with jobset.x-k8s.io", "Install Kubeflow Trainer"),
        (older_trainer, "dry run of the TrainJob", "runtimePatches", "Kubeflow Trainer 2.2 or newer"),
        (quota_of_limits, "dry run of a pod of the job", "must specify limits.cpu for: node", "Set cpu_limit"),
    ],
)
def test_what_is_spoilt_for_a_trainjob_is_found_with_its_remedy(
    trainjob: Setup, spoil: Callable[[Setup], None], about: str, told: str, remedy: str
) -> None:
    spoil(trainjob)
    found = [one for one in faults(trainjob.examine()) if one.about.startswith(about)]
    assert any(told in one.text and remedy in one.remedy for one in found), found


def test_rights_that_are_asked_for_are_those_of_the_role():
    rules = yaml.safe_load(ROLE.read_text())["rules"]
    granted = {
        (g, r, verb) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for verb in rule["verbs"]
    }
    asked = {(one.group, one.resource, verb) for kind in KINDS for one in rights_of(kind) for verb in one.verbs}
    assert asked == granted


def test_rights_of_a_service_account_are_those_that_are_told(setup):
    """Asked for by somebody who may do everything, and told by name."""
    (found,) = [one for one in setup.examine(("cluster",), account="pipeline-runner") if one.about == "rights"]
    assert found.text.startswith("account pipeline-runner may do all")


def test_every_fault_names_a_remedy(setup):
    for spoil in (no_operator, restricted, quota_of_limits, no_claim, no_secret, too_many_gpus, no_kueue):
        spoil(setup)
    found = faults(setup.examine())
    assert len(found) > 5
    assert all(one.remedy for one in found)


def test_operator_with_a_template_for_its_init_container_is_doubted_only(setup):
    restricted(setup)
    argument = "--pytorch-init-container-template-file=/etc/osft/init.yaml"
    setup.installation.deployment("training-operator", "kubeflow/training-operator:v1.9.4", argument)
    (found,) = faults(setup.examine())
    assert (found.level, found.about) == ("warning", "init container of the training operator")


def test_account_of_the_steps_is_told_what_it_may_not_look_at(setup):
    """With the role and nothing else: what only an administrator may read is not checked, and no error."""
    setup.cluster.api.role = yaml.safe_load(ROLE.read_text())
    found = setup.examine()
    assert faults(found) == []
    unchecked = [one for one in found if one.level == "not checked"]
    assert {"nodes", "claims", "secret osft-huggingface", "dry run of its pods"} <= {one.about for one in unchecked}
    assert all("may not" in one.text or "pull-images" in one.text for one in unchecked), unchecked


def test_claim_that_binds_to_the_first_pod_is_no_fault(setup):
    pending_claim(setup)
    setup.installation.put("storageclasses", "cephfs", volumeBindingMode="WaitForFirstConsumer")
    assert faults(setup.examine()) == []


def test_image_that_is_not_in_its_registry_is_found_by_a_pod_that_goes_again(setup):
    setup.cluster.kubelet.faults.missing_images = {"registry.example/osft-training:1"}
    found = {one.about: one for one in setup.examine(("pods",), pull_images=True) if one.about.startswith("image ")}
    assert found["image registry.example/osft-training:1"].level == "error"
    assert "not found" in found["image registry.example/osft-training:1"].text
    assert {one.level for one in found.values()} == {"error", "ok"}
    setup.cluster.wait_until(lambda: not setup.cluster.pods())


def test_check_that_fails_is_a_finding(setup):
    setup.installation.put("nodes", "broken", spec={}, status={"allocatable": {"cpu": "many"}})
    found = [one for one in setup.examine(("pods",)) if one.about == "nodes"]
    assert [one.level for one in found] == ["not checked"]
    assert found[0].text.startswith("could not be checked: ")


def test_api_server_that_does_not_answer_is_one_error(setup):
    setup.cluster.api.stop()
    found = setup.examine()
    (fault,) = faults(found)
    assert (fault.level, fault.about) == ("error", "API server")
    setup.cluster.api._listen(setup.cluster.api.port)


@pytest.fixture
def doctor(setup: Setup, pipeline: Path, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """`osft doctor parameters.yaml …`: its exit code and what it prints."""
    file = tmp_path / "parameters.yaml"
    file.write_text(yaml.safe_dump(setup.parameters))
    given = ["doctor", str(file), "--pipeline", str(pipeline), "--only", "cluster", "--only", "pods"]

    def invoke(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*given, *arguments])
        return result.exit_code, result.stdout

    return invoke


def test_command_ends_with_1_where_there_are_errors_and_prints_a_line_each(setup, doctor):
    code, text = doctor()
    assert code == 0, text
    assert text.splitlines()[-1].startswith(tuple("0123456789"))
    no_claim(setup)
    code, text = doctor()
    assert code == 1
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: pods: claim osft-storage: does not exist in namespace kubeflow-user -> kubectl")


def test_json_holds_every_finding(setup, doctor):
    no_claim(setup)
    code, text = doctor("--json")
    assert code == 1
    printed = json.loads(text)
    assert printed["counts"]["error"] == 1
    assert {"level", "about", "text", "remedy", "area"} == set(printed["findings"][0])
