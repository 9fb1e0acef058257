"""The two images, run with podman as a cluster runs them: any user of group 0, no network, data on a mounted folder.

`make test-images` builds them for CPUs first.
"""

import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from osft.models.training_summary import TrainingSummary
from osft.training import TrainResult
from tests.conftest import write_jsonl

pytestmark = [pytest.mark.images, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "pipelines" / "continual_learning" / "continual_learning.yaml"
MOUNT = "/mnt/osft"
USER = "1234567"
"""No name in /etc/passwd, as OpenShift's."""
RESTRICTED = [f"--user={USER}:0", "--network=none", "--cap-drop=ALL", "--security-opt=no-new-privileges"]

IMAGES = {"steps": "OSFT_STEPS_IMAGE", "training": "OSFT_TRAINING_IMAGE"}


OF_THE_BUILD = re.compile(r"(src|wheels|package)/|.*(/pip\.conf|/\.cache/pip)$")
"""Paths of files that belong into no layer."""

IMPORT_EVERYTHING = """
import importlib, pkgutil, osft
names = [module.name for module in pkgutil.walk_packages(osft.__path__, "osft.")]
for name in names:
    importlib.import_module(name)
import accelerate, gguf, kfp.dsl.executor_main, kfp.kubernetes, kubeflow.training, matplotlib.pyplot, s3fs
import mlflow.store.tracking.sqlalchemy_store, torch.distributed.checkpoint, torch.distributed.run
print(len(names))
"""
"""Ours, and what ours import in a function."""


def podman(*arguments: str) -> str:
    found = subprocess.run(["podman", *arguments], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found.stdout


def run_in(image: str, *command: str, options: tuple[str, ...] = ()) -> str:
    return podman("run", "--rm", "--pull=never", *RESTRICTED, *options, image, *command)


@pytest.fixture(scope="module", params=IMAGES)
def image(request: pytest.FixtureRequest) -> str:
    return os.environ[IMAGES[request.param]]


@pytest.fixture(scope="module")
def steps_image() -> str:
    return os.environ[IMAGES["steps"]]


@pytest.fixture(scope="module")
def training_image() -> str:
    return os.environ[IMAGES["training"]]


@pytest.fixture(scope="module")
def inspected(image: str) -> dict:
    return json.loads(podman("image", "inspect", image))[0]


@pytest.fixture
def storage(tmp_path: Path, model_folder: Path, chats: Path) -> Path:
    """A volume with a model and chats on it that group 0 may write to."""
    folder = tmp_path / "storage"
    folder.mkdir()
    shutil.copytree(model_folder, folder / "model")
    shutil.copy(chats, folder / "chats.jsonl")
    write_jsonl(folder / "prose.jsonl", [{"text": f"a plain text, number {i}"} for i in range(5)])
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 0, 0)
        path.chmod(0o0770 if path.is_dir() else 0o0660)
    return folder


def mounted(storage: Path) -> tuple[str, str]:
    return ("--volume", f"{storage}:{MOUNT}")


def run_step(image: str, storage: Path, name: str, values: dict) -> dict:
    """Run a step as Kubeflow's launcher does: the command of the YAML, with inputs and outputs in place of `{{$}}`."""
    pipeline = next(yaml.safe_load_all(PIPELINE.read_text(encoding="utf-8")))
    container = pipeline["deploymentSpec"]["executors"][f"exec-{name}"]["container"]
    outputs = pipeline["components"][f"comp-{name}"]["outputDefinitions"]
    folder = f"{MOUNT}/kfp/{name}"
    launcher_input = {
        "inputs": {"parameterValues": values},
        "outputs": {
            "outputFile": f"{folder}/executor_output.json",
            "parameters": {output: {"outputFile": f"{folder}/{output}"} for output in outputs["parameters"]},
            "artifacts": {
                output: {"artifacts": [{"name": output, "uri": f"{folder}/{output}", "type": artifact["artifactType"]}]}
                for output, artifact in outputs.get("artifacts", {}).items()
            },
        },
    }
    command = [
        part.replace("{{$}}", json.dumps(launcher_input)) for part in (*container["command"], *container["args"])
    ]
    run_in(image, *command, options=mounted(storage))
    return json.loads((storage / "kfp" / name / "executor_output.json").read_text())["parameterValues"]


def test_compiled_steps_find_and_prepare_data_in_the_steps_image(steps_image, storage):
    model, anchors = f"{MOUNT}/model", [f"{MOUNT}/prose.jsonl"]
    where = {"storage_root": MOUNT, "pipeline_run_id": "run-1", "mlflow_tracking_uri": ""}
    given = {"base_model": model, "anchor_uris": anchors, "data_uri": f"{MOUNT}/chats.jsonl", "gate": {}}
    names = {"model_name": "m", "min_new_samples": 1, "mlflow_experiment": "e", "pipeline_name": "test"}
    resolved = run_step(steps_image, storage, "resolve-round", where | given | names)
    assert (resolved["Output"], resolved["task"], resolved["model"]) == (True, "chats", model)
    limits = {"max_seq_len": 512, "validation_fraction": 0.1, "max_train_samples": 0, "max_validation_samples": 0}
    handed = {name: resolved[name] for name in ("model", "records", "mlflow_run_id")}
    prepared = run_step(
        steps_image,
        storage,
        "prepare-data",
        where | handed | limits | {"base_model": model, "anchor_uris": anchors},
    )
    dataset = storage / Path(prepared["data_path"]).relative_to(MOUNT)
    counts = json.loads((dataset / "dataset.json").read_text())
    chats = set((storage / "chats.jsonl").read_text().splitlines())
    assert counts["num_train_samples"] + counts["num_validation_samples"] == len(chats)
    assert os.stat(dataset / "dataset.json").st_uid == int(USER)


def test_training_image_can_run_public_benchmarks(training_image):
    run_in(training_image, "python3", "-c", "import lm_eval.models.huggingface")


def test_two_processes_train_in_the_training_image(training_image, storage):
    settings = {
        "model_path": f"{MOUNT}/model",
        "data_path": f"{MOUNT}/chats.jsonl",
        "ckpt_output_dir": f"{MOUNT}/trained",
        "unfreeze_rank_ratio": 0.25,
        "effective_batch_size": 60,
        "max_tokens_per_gpu": 2048,
        "max_seq_len": 64,
        "learning_rate": 1e-2,
        "num_epochs": 1,
        "nproc_per_node": 2,
    }
    given = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    run_in(training_image, "osft", "train", *given, options=(*mounted(storage), "--env", "OMP_NUM_THREADS=1"))
    summary = TrainingSummary.read(storage / "trained" / "training.json")
    assert summary.world_size == 2
    checkpoint = storage / "trained" / TrainResult(Path("."), summary).checkpoint
    changed = 0
    with (
        safe_open(checkpoint / "model.safetensors", framework="pt") as after,
        safe_open(storage / "model" / "model.safetensors", framework="pt") as before,
    ):
        assert set(after.keys()) == set(before.keys())
        for name in before.keys():  # noqa: SIM118 (a file, not a dictionary)
            changed += not before.get_tensor(name).to(after.get_tensor(name).dtype).equal(after.get_tensor(name))
    assert changed == 14  # the seven projections of two layers


def test_every_module_can_be_imported(image):
    """What was removed from the packages to make the image small is needed by none of ours, nor by what they import."""
    assert int(run_in(image, "python3", "-c", IMPORT_EVERYTHING)) > 40


def test_image_names_what_it_is(inspected, image):
    labels = inspected["Labels"]
    title = {os.environ[IMAGES["steps"]]: "osft", os.environ[IMAGES["training"]]: "osft-training"}[image]
    assert labels["org.opencontainers.image.title"] == title
    version = run_in(image, "python3", "-c", "import osft; print(osft.__version__)").strip()
    assert labels["org.opencontainers.image.version"] == version
    assert len(labels["org.opencontainers.image.revision"].removesuffix("-dirty")) == 40
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.description"]


def test_image_runs_as_an_ordinary_user_without_healthcheck_or_entrypoint(inspected):
    assert inspected["Config"]["User"] == "1000:0"
    assert not inspected.get("HealthCheck")
    assert not inspected["Config"].get("Healthcheck")
    assert not inspected["Config"].get("Entrypoint")


def test_image_has_no_compiler(image):
    names = "cc c++ gcc g++ clang clang++ tcc c99 ld as make cmake nvcc rustc go"
    found = run_in(image, "sh", "-c", f"for name in {names}; do command -v $name || true; done")
    assert found == ""
    packages = run_in(image, "dpkg-query", "--show", "--showformat=${Package}\\n").split()
    assert [
        name for name in packages if re.fullmatch(r"(gcc|g\+\+|cpp|clang|llvm)(-\d+)?|binutils|build-essential", name)
    ] == []


def test_image_has_no_folder_of_the_machine_that_built_it(image):
    assert run_in(image, "ls", "/opt").split() == ["osft"]


def test_stand_in_for_the_compiler_hands_over_one_module_and_refuses_the_rest(tmp_path):
    """Called as Triton calls a compiler. The module itself is built with torch for CUDA only."""
    stand_in = shutil.copy(ROOT / "images" / "triton-driver", tmp_path / "cc")
    (tmp_path / "cuda_utils.so").write_text("the module")
    (tmp_path / "out").mkdir()
    wanted = tmp_path / "out" / "cuda_utils.cpython-311-x86_64-linux-gnu.so"
    subprocess.run([stand_in, "driver.c", "-O3", "-shared", "-fPIC", "-o", wanted, "-lcuda"], check=True)
    assert wanted.read_text() == "the module"
    other = tmp_path / "out" / "other.so"
    refused = subprocess.run([stand_in, "other.c", "-shared", "-o", other], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "no compiler in this image" in refused.stderr
    assert not other.exists()


def test_bill_of_materials_lists_what_is_installed(image):
    script = (ROOT / "images" / "sbom.py").read_text()
    bill = json.loads(run_in(image, "python3", "-c", script, image))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    assert bill["metadata"]["component"]["name"] == image
    versions = {component["name"]: component["version"] for component in bill["components"]}
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    listed = {name: version.removesuffix("+cpu") for name, version in versions.items() if name in pinned}
    assert listed == {name: pinned[name] for name in listed}
    assert {"torch", "transformers", "kfp", "mlflow"} <= listed.keys()
    assert len(listed) > 100
    debian = run_in(image, "dpkg-query", "--show", "--showformat=${Package}=${Version}\\n").split()
    purls = {c["purl"].split("?")[0] for c in bill["components"] if c["purl"].startswith("pkg:deb/")}
    assert len(debian) == len([c for c in bill["components"] if c["purl"].startswith("pkg:deb/")])
    assert any(purl.startswith("pkg:deb/debian/libc6@") for purl in purls)
    references = [component["bom-ref"] for component in bill["components"]]
    assert len(references) == len(set(references))


@pytest.fixture(scope="module")
def archive(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The image with all its layers, as an uncompressed archive."""
    file = tmp_path_factory.mktemp("archive") / "image.tar"
    podman("save", "--format=docker-archive", f"--output={file}", image)
    yield file
    file.unlink()


def test_nothing_of_the_build_is_left_in_a_layer_or_in_the_history(archive):
    """Neither pip's configuration, by a mark that was put into it, nor the files that the build needed."""
    mark = os.environ["OSFT_TEST_MARK"].encode()
    kept = b""
    with archive.open("rb") as bytes_of_archive:  # history and configuration are in it too
        while block := bytes_of_archive.read(1 << 24):
            assert mark not in kept[-len(mark) :] + block
            kept = block
    left = []
    with tarfile.open(archive) as layers:
        for layer in [member for member in layers if member.name.endswith(".tar")]:
            with tarfile.open(fileobj=layers.extractfile(layer)) as files:
                left += [file.name for file in files if OF_THE_BUILD.match(file.name)]
    assert left == []
