"""The manifests, rendered by kubectl and checked against schemas: `make check-manifests`."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

pytestmark = pytest.mark.manifests

MANIFESTS = Path(__file__).parents[2] / "pipelines" / "continual_learning" / "manifests"
KUSTOMIZATIONS = ["base", "overlays/kueue", "overlays/s3"]
NAMESPACE = "kubeflow"

KUEUE = json.loads((Path(__file__).parent / "kueue.schema.json").read_text(encoding="utf-8"))
"""Ours, of the fields that the manifests use; not Kueue's own schema."""
CLUSTER_WIDE = {"ResourceFlavor", "ClusterQueue"}


def kubectl_minor() -> int:
    found = subprocess.run(["kubectl", "version", "--client", "--output=json"], capture_output=True, check=True).stdout
    return int(re.sub(r"\D", "", json.loads(found)["clientVersion"]["minor"]))


def rendered(folder: Path) -> list[dict[str, Any]]:
    command = ["kubectl", "kustomize", str(folder)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "deprecated" not in found.stderr
    return [document for document in yaml.safe_load_all(found.stdout) if document]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, in which an old kubectl finds its words: before 1.21 it takes folders as `bases` only."""
    copy = shutil.copytree(MANIFESTS, tmp_path_factory.mktemp("copy") / "manifests")
    if kubectl_minor() < 21:
        for file in copy.rglob("kustomization.yaml"):
            content = yaml.safe_load(file.read_text())
            resources = content.pop("resources")
            content["bases"] = [entry for entry in resources if not entry.endswith(".yaml")]
            content["resources"] = [entry for entry in resources if entry.endswith(".yaml")]
            file.write_text(yaml.safe_dump(content))
    return copy


@pytest.fixture(scope="module")
def installations(manifests: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: rendered(manifests / name) for name in KUSTOMIZATIONS}


def check_schema(document: dict[str, Any]) -> None:
    """Raises if a document of a built-in kind or of Kueue's has a missing, an unknown or a mistyped field."""
    if document["apiVersion"].startswith("kueue.x-k8s.io/"):
        jsonschema.validate(document, KUEUE)
    else:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_document_fits_its_schema(installations, name):
    assert installations[name]
    for document in installations[name]:
        check_schema(document)


@pytest.mark.parametrize("file", sorted(MANIFESTS.glob("examples/*.yaml")), ids=lambda file: file.name)
def test_every_example_fits_its_schema(file):
    for document in yaml.safe_load_all(file.read_text()):
        check_schema(document)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Role", ("rules", 0, "verb"), ["get"]),  # unknown
        ("PersistentVolumeClaim", ("spec", "accessModes"), "ReadWriteMany"),  # a list
        ("NetworkPolicy", ("spec", "egress", 1, "ports", 0, "port"), [53]),  # mistyped, deep inside
        ("ClusterQueue", ("spec", "resourceGroups", 0, "flavours"), []),
        ("LocalQueue", ("spec", "clusterQueue"), 1),
    ],
)
def test_schema_check_refuses_what_is_wrong(installations, kind, path, value):
    (document,) = [d for d in installations["overlays/kueue"] if d["kind"] == kind]
    document = json.loads(json.dumps(document))
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        check_schema(document)


def kinds(documents: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(document["kind"], document["metadata"]["name"]) for document in documents}


def test_installations_hold_what_their_names_say(installations):
    common = {
        ("ServiceAccount", "osft-pipeline"),
        ("Role", "osft-pipeline"),
        ("RoleBinding", "osft-pipeline"),
        ("NetworkPolicy", "osft-training"),
    }
    base = common | {("PersistentVolumeClaim", "osft-storage")}
    queues = {("ResourceFlavor", "osft"), ("ClusterQueue", "osft"), ("LocalQueue", "osft")}
    expected = {"base": base, "overlays/kueue": base | queues, "overlays/s3": common | {("Secret", "osft-s3")}}
    assert {name: kinds(documents) for name, documents in installations.items()} == expected


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_everything_of_a_namespace_is_in_one(installations, name):
    for document in installations[name]:
        expected = None if document["kind"] in CLUSTER_WIDE else NAMESPACE
        assert document["metadata"].get("namespace") == expected, document["metadata"]["name"]
    (binding,) = [document for document in installations[name] if document["kind"] == "RoleBinding"]
    assert [subject["namespace"] for subject in binding["subjects"]] == [NAMESPACE]


def test_another_namespace_takes_the_binding_along(manifests):
    mine = manifests / "overlays" / "mine"
    mine.mkdir()
    entry = "bases" if kubectl_minor() < 21 else "resources"
    (mine / "kustomization.yaml").write_text(
        f"apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: team-a\n{entry}: [../../base]\n"
    )
    documents = rendered(mine)
    assert {document["metadata"]["namespace"] for document in documents} == {"team-a"}
    (binding,) = [document for document in documents if document["kind"] == "RoleBinding"]
    assert [subject["namespace"] for subject in binding["subjects"]] == ["team-a"]


def test_claim_is_the_one_that_the_pipeline_mounts(installations):
    yaml_file = MANIFESTS.parent / "continual_learning.yaml"
    pipeline = next(yaml.safe_load_all(yaml_file.read_text(encoding="utf-8")))
    default = pipeline["root"]["inputDefinitions"]["parameters"]["storage_claim"]["defaultValue"]
    (claim,) = [document for document in installations["base"] if document["kind"] == "PersistentVolumeClaim"]
    assert claim["metadata"]["name"] == default
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_training_pods_reach_each_other_on_any_port_and_nobody_else_reaches_them(installations):
    (policy,) = [document["spec"] for document in installations["base"] if document["kind"] == "NetworkPolicy"]
    training = {"matchLabels": {"app.kubernetes.io/name": "osft-training"}}
    assert policy["podSelector"] == training
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["ingress"] == [{"from": [{"podSelector": training}]}]
    assert {"to": [{"podSelector": training}]} in policy["egress"]
    elsewhere = [rule for rule in policy["egress"] if "to" not in rule]
    ports = {(port["protocol"], port["port"]) for rule in elsewhere for port in rule["ports"]}
    assert {("UDP", 53), ("TCP", 53), ("TCP", 443)} <= ports
    assert ("TCP", 6443) not in ports


def test_secrets_in_the_repository_are_placeholders():
    files = [file for file in MANIFESTS.rglob("*.yaml") if "kind: Secret" in file.read_text()]
    assert {file.name for file in files} == {"secret.yaml", "secret_huggingface.yaml", "secret_mlflow.yaml"}
    for file in files:
        (document,) = yaml.safe_load_all(file.read_text())
        assert set(document["stringData"].values()) <= {"REPLACE-ME", "https://object-store.example"}
        assert "data" not in document


def test_queues_name_each_other(installations):
    found = {document["kind"]: document for document in installations["overlays/kueue"]}
    cluster_queue = found["ClusterQueue"]
    assert found["LocalQueue"]["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    for group in cluster_queue["spec"]["resourceGroups"]:
        for flavor in group["flavors"]:
            assert flavor["name"] == found["ResourceFlavor"]["metadata"]["name"]
            assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]
