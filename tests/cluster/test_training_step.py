"""The training step of the compiled pipeline on the stand-in cluster: two pods that really train, and what goes wrong.

Each test ends with what is left on the cluster: which jobs, and which processes.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from osft import osft, rounds
from osft.kubernetes.training_job import KINDS
from osft.models.training_summary import TrainingSummary
from osft.tracking import runs
from osft.training import TrainResult
from osft.training.job import Phase
from tests.cluster.cluster import Cluster
from tests.cluster.training_step import ROLE, STEP_POD, WORKFLOW, TrainingStep, step_environment
from tests.conftest import arithmetic, byte_tokenizer, write_jsonl
from tests.object_store import SECRET as STORE_SECRET
from tests.object_store import ObjectStore

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

NUM_STEPS = 24
LAUNCHERS = [kind.launcher for kind in KINDS]
SECRET = "hf_planted-secret-value-0123456789"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def small_smollm2(storage: Path) -> Path:
    """SmolLM2's architecture (grouped-query attention 9:3, tied embeddings, its ratios) at a tenth of its width."""
    folder = storage / "models" / "smollm2"
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=72,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(storage: Path, small_smollm2: Path) -> dict[str, Any]:
    """A storage root on which the steps before the training have run, and the parameters that they hand on."""
    root = storage
    data = write_jsonl(root / "larger-number.jsonl", arithmetic(8 * NUM_STEPS + 40))
    resolved, mlflow_run_id = rounds.resolve_round(
        rounds.PipelineRun(storage_root=str(root), pipeline_run_id="prepared"),
        model_name="small",
        base_model=str(small_smollm2),
        data_uri=str(data),
        anchor_uris=[],
        gate={},
        min_new_samples=1,
        experiment="cluster",
        run_name="prepared",
    )
    found = rounds.prepare_data(
        rounds.PipelineRun(storage_root=str(root), pipeline_run_id="prepared", mlflow_run_id=mlflow_run_id),
        base_model=str(small_smollm2),
        model=resolved.model,
        records=resolved.records,
        anchor_uris=[],
        max_seq_len=128,
        validation_fraction=0.1,
        max_train_samples=8 * NUM_STEPS,
        max_validation_samples=8,
    )
    return {
        "model_path": found.model_path,
        "data_path": found.data_path,
        "factors_path": str(root / "factors"),
        "unfreeze_rank_ratio": 0.5,
        "protect": "weights",
        "stiffness": 0.0,
        "free_subspace": "complement",
        "target_patterns": [],
        "effective_batch_size": 8,
        "max_tokens_per_gpu": 256,
        "learning_rate": 5e-3,
        "num_epochs": 1,
        "lr_scheduler": "cosine",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "replay_ratio": 0.0,
        "nproc_per_node": 0,
        "seed": 42,
        "max_seq_len": 128,
        "rank_allocation": "uniform",
        "more_settings": {"save_state_steps": 1},
        "job": {"num_workers": 2, "gpus": 0, "cpu": "1", "memory": "2Gi", "storage_mount": str(root)},
        "pytorchjob": {},
        "training_image": "registry.example/osft-training:0.1.0",
        "storage_claim": "osft-storage",
        "storage_secret": "osft-s3",
        "storage_root": str(root),
        "mlflow_tracking_uri": runs.local_tracking_uri(root),  # all pods of this cluster are on one machine
        "mlflow_run_id": mlflow_run_id,
    }


@pytest.fixture(scope="module")
def reference(prepared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of `osft()` with two processes of this machine."""
    names = ("model_path", "data_path", "unfreeze_rank_ratio", "effective_batch_size", "max_tokens_per_gpu")
    more = ("max_seq_len", "learning_rate", "lr_scheduler", "seed")
    result = osft(
        **{name: prepared[name] for name in names + more},
        ckpt_output_dir=str(tmp_path_factory.mktemp("reference")),
        factors=prepared["factors_path"],
        use_processed_dataset=True,
        nproc_per_node=2,
    )
    return [step["loss"] for step in result.history]


@contextmanager
def cluster_of_a_step(folder: Path) -> Iterator[Cluster]:
    """A cluster on which the service account may do what the Role allows, with the step's pod and a secret."""
    with Cluster(folder / "cluster", role=yaml.safe_load(ROLE.read_text())) as running:
        environment = step_environment(running)
        for name in ("KUBECONFIG", "KFP_POD_NAME"):
            del environment[name]
        running.kubelet.image_environment |= environment
        running.add_step_pod(STEP_POD, WORKFLOW)
        running.add_secret("osft-huggingface", {"HF_TOKEN": SECRET})
        yield running


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with cluster_of_a_step(tmp_path) as running:
        yield running


class Round:
    """One pipeline run's training: its parameters, its attempts, what it leaves."""

    def __init__(self, cluster: Cluster, folder: Path, prepared: dict[str, Any], launcher: str) -> None:
        self.cluster, self.folder = cluster, folder
        self.kind = next(kind for kind in KINDS if kind.launcher == launcher)
        self.id = f"{folder.name.strip('_').replace('_', '-')}-{time.time_ns()}"
        self.parameters = prepared | {"pipeline_run_id": self.id, "launcher": launcher}
        self.output = Path(prepared["storage_root"]) / "rounds" / self.id / "train"
        self.attempts: list[TrainingStep] = []

    def start(self, job: dict[str, Any] | None = None, **changes: Any) -> TrainingStep:
        parameters = self.parameters | changes
        parameters["job"] = parameters["job"] | (job or {})
        folder = self.folder / f"attempt-{len(self.attempts)}"
        self.attempts.append(TrainingStep(self.cluster, folder, parameters))
        return self.attempts[-1]

    def wait_for_steps(self, number: int, seconds: float = 120.0) -> None:
        """Until so many training steps are done."""
        file, deadline = self.output / "metrics.jsonl", time.monotonic() + seconds
        while not (file.is_file() and len(file.read_text().splitlines()) >= number):
            assert time.monotonic() < deadline, self.attempts[-1].log
            assert self.attempts[-1].runs(), self.attempts[-1].log
            time.sleep(0.02)

    def pods(self) -> list[dict[str, Any]]:
        """Those of the job, by rank."""
        pods = [pod for pod in self.cluster.pods() if pod["metadata"]["name"] != STEP_POD]
        return sorted(pods, key=self.kind.node_rank)

    def kill(self, rank: int) -> str:
        """Kill a pod with SIGKILL; its name."""
        name = str(self.pods()[rank]["metadata"]["name"])
        self.cluster.kill_pod(name)
        return name

    def losses(self) -> list[float]:
        result = TrainResult(self.output, TrainingSummary.read(self.output / "training.json"))
        assert result.summary.world_size == 2
        assert LlamaForCausalLM.from_pretrained(result.checkpoint).num_parameters() > 0
        return [step["loss"] for step in result.history]

    def phase(self) -> Phase:
        """How the only job there is has ended."""
        (job,) = self.cluster.jobs()
        outcome = self.kind.outcome(job)
        assert outcome is not None, job["status"]
        return outcome.phase


@pytest.fixture
def launcher() -> str:
    """Of tests of what both backends do alike; the others say which."""
    return "pytorchjob"


@pytest.fixture
def training(cluster: Cluster, tmp_path: Path, prepared: dict[str, Any], launcher: str) -> Iterator[Round]:
    running = Round(cluster, tmp_path, prepared, launcher)
    yield running
    for attempt in running.attempts:
        if attempt.runs():
            attempt.signal(signal.SIGKILL)


@pytest.fixture(scope="module", params=LAUNCHERS)
def undisturbed(
    request: pytest.FixtureRequest, prepared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Round]:
    """A run to which nothing happens, with a secret in its pods' environment."""
    folder = tmp_path_factory.mktemp(f"undisturbed-{request.param}")
    with cluster_of_a_step(folder) as running:
        finished = Round(running, folder, prepared, request.param)
        reference = {"HF_TOKEN": {"secret": "osft-huggingface", "key": "HF_TOKEN"}}
        step = finished.start({"env": reference, "env_from": [{"secret": "osft-huggingface"}]})
        assert step.wait() == 0, step.log
        yield finished


def test_two_pods_train_to_the_losses_of_two_local_processes(undisturbed, reference):
    assert undisturbed.losses() == pytest.approx(reference, abs=1e-5)
    assert undisturbed.phase() is Phase.SUCCEEDED
    assert not undisturbed.cluster.processes()


def test_step_puts_out_the_checkpoint_the_manifest_and_its_progress(undisturbed):
    (step,) = undisturbed.attempts
    outputs = json.loads(step.outputs.read_text())
    model = undisturbed.output / "hf_format" / f"samples_{8 * NUM_STEPS}.0"
    assert outputs["parameterValues"]["Output"] == str(model)
    (job,) = undisturbed.cluster.jobs()
    *_, manifest = yaml.safe_load_all(step.manifest.read_text())
    assert (manifest["kind"], manifest["metadata"]["name"]) == (job["kind"], job["metadata"]["name"])
    for text in (f"created {job['kind']}", "train: running", f"step {NUM_STEPS}/{NUM_STEPS}", "tokens/s", "s left"):
        assert text in step.log, step.log


def test_metrics_of_the_pods_are_in_mlflow(undisturbed):
    mlflow = runs.client("", undisturbed.parameters["storage_root"])
    (job,) = undisturbed.cluster.jobs()
    parent = mlflow.get_run(job["metadata"]["labels"]["osft/mlflow-run-id"])
    children = mlflow.search_runs(
        [parent.info.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    (training,) = [run for run in children if run.info.run_name == "train_osft" and _is_of(run, undisturbed)]
    logged = mlflow.get_metric_history(training.info.run_id, "train/loss")
    assert [round(metric.value, 6) for metric in logged] == [round(loss, 6) for loss in undisturbed.losses()]


def _is_of(run: Any, training: Round) -> bool:
    return run.data.params["ckpt_output_dir"] == str(training.output)


def test_secret_is_in_the_pods_environment_and_in_nothing_that_was_written(undisturbed):
    # The training operator may have deleted the worker by now: it does so if the master ended first.
    pods = undisturbed.pods()
    assert pods
    for pod in pods:
        variables = [variable for container in pod["spec"]["containers"] for variable in container.get("env", [])]
        assert [variable["name"] for variable in variables].count("HF_TOKEN") == 1
    told = json.dumps([undisturbed.cluster.jobs(), undisturbed.cluster.pods(), undisturbed.cluster.events()])
    assert SECRET not in told
    assert SECRET not in undisturbed.attempts[0].log
    written = [undisturbed.folder, Path(undisturbed.parameters["storage_root"])]
    files = [file for folder in written for file in folder.rglob("*") if file.is_file()]
    assert any(file.name == "manifest" for file in files)
    assert any(file.name == "mlflow.db" for file in files)
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []


@pytest.mark.timeout(600)  # five processes import torch, two of them twice
def test_pods_without_a_shared_volume_train_the_same_from_an_object_store(
    training, cluster, reference, object_store, bucket, prepared
):
    """Each pod has an empty folder of its own; the master is killed, and its scratch folder is lost with it."""
    parameters = {"storage_root": f"{bucket}/osft"}
    for name in ("model_path", "data_path", "factors_path"):
        path = Path(prepared[name])
        parameters[name] = f"{bucket}/osft/{path.relative_to(prepared['storage_root'])}"
        object_store.files.put(str(path), parameters[name], recursive=True)
    cluster.add_secret("osft-s3", object_store.environment)
    step = training.start(**parameters)
    output = f"{bucket}/osft/rounds/{training.id}/train"
    cluster.wait_until(lambda: _has_state(object_store, output), seconds=200)
    training.kill(0)
    assert step.wait() == 0, step.log
    assert "train: resumes from" in step.log
    history = object_store.files.cat(f"{output}/metrics.jsonl").splitlines()
    assert [json.loads(line)["loss"] for line in history] == pytest.approx(reference, abs=1e-5)
    assert json.loads(step.outputs.read_text())["parameterValues"]["Output"].startswith(f"{output}/hf_format/samples_")
    assert training.phase() is Phase.SUCCEEDED
    assert STORE_SECRET not in step.manifest.read_text() + step.log


def _has_state(object_store: ObjectStore, output: str) -> bool:
    return any(name.startswith("state/") and name.endswith("position.json") for name in object_store.names(output))


@pytest.mark.parametrize(("launcher", "rank"), [("pytorchjob", 0), ("pytorchjob", 1), ("trainjob", 1)])
def test_killed_pod_is_recreated_and_the_losses_are_the_same(training, cluster, reference, rank):
    step = training.start()
    training.wait_for_steps(4)
    killed = training.kill(rank)
    assert step.wait() == 0, step.log
    assert training.losses() == pytest.approx(reference, abs=1e-5)
    assert "train: resumes from" in step.log
    assert f"(pod {killed}) ended with exit code 137" in step.log
    assert training.phase() is Phase.SUCCEEDED
    assert not cluster.processes()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_terminated_step_ends_when_job_and_processes_are_gone(training, cluster):
    step = training.start()
    training.wait_for_steps(2)
    step.signal(signal.SIGTERM)
    assert step.wait(60) != 0
    assert "is deleted" in step.log
    assert cluster.jobs() == []
    assert cluster.pods() == [] or [pod["metadata"]["name"] for pod in cluster.pods()] == [STEP_POD]
    assert not cluster.processes()
    assert list((training.output / "state").glob("step-*")), "the pods did not save their state"


def test_killed_step_finds_its_job_again(training, cluster, reference):
    first = training.start()
    training.wait_for_steps(2)
    first.signal(signal.SIGKILL)
    assert first.wait() != 0
    (job,) = cluster.jobs()
    second = training.start()
    assert second.wait() == 0, second.log
    assert "found PyTorchJob" in second.log
    assert training.losses() == pytest.approx(reference, abs=1e-5)
    (same,) = cluster.jobs()
    assert same["metadata"]["uid"] == job["metadata"]["uid"]
    assert training.phase() is Phase.SUCCEEDED


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_step_without_the_right_fails_with_its_name_and_leaves_its_manifest(training, cluster):
    cluster.api.role = {"rules": []}
    step = training.start()
    assert step.wait() != 0
    kind = training.kind.resource.kind
    assert f"the service account may not get {kind}s in namespace kubeflow-user (403)" in step.log
    assert [found["kind"] for found in yaml.safe_load_all(step.manifest.read_text())][-1] == kind
    assert cluster.jobs() == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_failed_job_fails_the_step_with_the_reason_of_the_rank(training, cluster):
    step = training.start(more_settings={"attn_implementation": "no_such_attention"})
    assert step.wait() != 0
    assert training.phase() is Phase.FAILED
    assert "ended with exit code" in step.log
    error = step.log[step.log.rindex("error: ") :]
    assert "no_such_attention" in error
    assert not cluster.processes()
