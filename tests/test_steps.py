"""The pipeline's steps with an object store as storage root: all that passes between them are URIs."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from osft import steps
from osft.config import SubspaceConfig
from osft.tracking import runs
from tests.conftest import write_jsonl
from tests.object_store import SECRET
from tests.training.in_process import run_in_process

QUARTER = SubspaceConfig(unfreeze_rank_ratio=0.25)


def new_pod(root: str, run_id: str, tracking: str, mlflow_run_id: str = "") -> steps.Round:
    """What a step is given, with an empty scratch folder."""
    shutil.rmtree(os.environ["OSFT_SCRATCH"], ignore_errors=True)
    return steps.Round(
        storage_root=root, pipeline_run_id=run_id, mlflow_tracking_uri=tracking, mlflow_run_id=mlflow_run_id
    )


def learn(where: tuple[str, str, str], base_model: str, data: str, anchor: str) -> dict:
    """The steps up to training, `where` as in `new_pod`. Returns what they hand on."""
    prepared = steps.prepare_data(
        new_pod(*where),
        base_model=base_model,
        data_uri=data,
        anchor_uris=[anchor],
        experiment="tiny",
        run_name=where[1],
        max_seq_len=128,
        validation_fraction=0.2,
        max_train_samples=0,
        max_validation_samples=0,
    )
    parent, model = prepared.mlflow_run_id, prepared.model_path
    factors = steps.precompute_svd(
        new_pod(*where, parent), model_path=model, data_path=prepared.data_path, subspace=QUARTER
    )
    summary = steps.train_osft(
        new_pod(*where, parent),
        steps.LauncherSettings(),
        manifest_file=Path(os.environ["OSFT_SCRATCH"]).with_name("manifest"),
        model_path=model,
        data_path=prepared.data_path,
        factors=factors,
        unfreeze_rank_ratio=0.25,
        effective_batch_size=16,
        max_tokens_per_gpu=300,
        max_seq_len=128,
        learning_rate=0.02,
        nproc_per_node=1,
    )
    return {
        "model_path": model,
        "data_path": prepared.data_path,
        "factors_path": factors,
        "checkpoint_path": summary["checkpoint"],
        "task": prepared.task,
        "anchor_paths": prepared.anchor_paths,
        "mlflow_run_id": parent,
    }


def measure_and_promote(where: tuple[str, str, str], learned: dict) -> tuple[dict, int]:
    """The other steps. Returns the evaluation and the version."""
    handed = dict(learned)
    pod = (*where, handed.pop("mlflow_run_id"))
    evaluation = steps.evaluate_model(
        new_pod(*pod),
        **handed,
        max_anchor_samples=0,
        min_task_improvement=0.0,
        max_anchor_increase=10.0,
    )
    version = steps.register_model(new_pod(*pod), model_name="tiny", checkpoint_path=learned["checkpoint_path"])
    steps.promote_model(new_pod(*pod), model_name="tiny", version=version)
    return evaluation, version


@pytest.mark.slow
def test_pipeline_runs_on_an_object_store_and_reuses_what_is_there(
    bucket, object_store, model_folder, chats, tmp_path, monkeypatch, capsys
):
    run_in_process(monkeypatch)
    text = write_jsonl(tmp_path / "prose.jsonl", [{"text": f"a plain text, number {i}"} for i in range(8)])
    object_store.files.put(str(model_folder), f"{bucket}/base/tiny", recursive=True)
    object_store.files.put(str(chats), f"{bucket}/raw/larger-number.jsonl")
    object_store.files.put(str(text), f"{bucket}/raw/prose.jsonl")
    root, tracking = f"{bucket}/osft", f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    inputs = (f"{bucket}/base/tiny", f"{bucket}/raw/larger-number.jsonl", f"{bucket}/raw/prose.jsonl")

    first = learn((root, "first", tracking), *inputs)
    assert first["data_path"].startswith(f"{root}/data/")
    assert first["factors_path"].startswith(f"{root}/factors/sets/")
    assert first["checkpoint_path"].startswith(f"{root}/rounds/first/train/hf_format/samples_")
    evaluation, version = measure_and_promote((root, "first", tracking), first)
    scores = evaluation["results"]
    assert scores["candidate"]["larger-number"]["loss"] < scores["base"]["larger-number"]["loss"]
    files = object_store.names(f"{root}/rounds/first")
    assert {"evaluation.json", "report.html", "version.json", "train/training.json"} <= files
    assert b"<html" in object_store.files.cat(f"{root}/rounds/first/report.html")
    assert json.loads(object_store.files.cat(f"{root}/rounds/first/evaluation.json")) == evaluation
    mlflow = runs.client(tracking, root)
    assert mlflow.get_model_version_by_alias("tiny", "champion").version == version
    assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())

    # A set of another ratio lies in the same store; the second round has no use for it.
    steps.precompute_svd(
        new_pod(root, "first", tracking, first["mlflow_run_id"]),
        model_path=first["model_path"],
        data_path=first["data_path"],
        subspace=SubspaceConfig(unfreeze_rank_ratio=0.5),
    )
    needed = {entry["file"] for entry in json.loads(object_store.files.cat(first["factors_path"]))["weights"].values()}
    before = object_store.names(root)
    capsys.readouterr()
    object_store.requests.clear()
    second = learn((root, "second", tracking), *inputs)
    printed = capsys.readouterr().out
    for name in ("model_path", "data_path", "factors_path"):
        assert second[name] == first[name]
    assert f"data: reused {first['data_path']}" in printed
    assert "factors: computed 0, reused 14 of 14" in printed
    assert all(name.startswith("rounds/second/") for name in object_store.names(root) - before)
    path = f"/{root.removeprefix('s3://')}/factors/"
    read = {name.removeprefix(path) for method, name in object_store.requests if method == "GET" and path in name}
    assert {name for name in read if name.startswith("weights/")} == needed


def test_model_and_data_that_are_fetched_by_name_are_kept_in_the_store(bucket, object_store, monkeypatch):
    from osft import examples

    def convert(wheel: object, folder: Path) -> None:
        made.append(folder.name)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    made: list[str] = []
    monkeypatch.setitem(examples._EXAMPLES, "tiny", (examples._EVALS, convert, ""))
    monkeypatch.setattr(examples, "_fetched", lambda package: nullcontext())
    for _ in range(2):
        assert examples.resolve("example:tiny", f"{bucket}/examples") == f"{bucket}/examples/tiny"
        shutil.rmtree(os.environ["OSFT_SCRATCH"])
    assert len(made) == 1
    assert object_store.names(f"{bucket}/examples") == {"tiny/config.json"}


def test_object_store_without_a_tracking_server_is_refused_at_once(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="s3://bucket/osft cannot hold MLflow's database.*MLFLOW_TRACKING_URI"):
        steps.Round(storage_root="s3://bucket/osft", pipeline_run_id="1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert steps.Round(storage_root="s3://bucket/osft", pipeline_run_id="1").address() == "s3://bucket/osft/rounds/1"


def test_data_address_with_credentials_is_not_written_down(tmp_path):
    with pytest.raises(ValueError, match="must not hold credentials") as found:
        steps.prepare_data(
            steps.Round(storage_root=str(tmp_path), pipeline_run_id="1"),
            base_model="org/model",
            data_uri="s3://me:hunter2@bucket/data.jsonl",
            anchor_uris=[],
            experiment="tiny",
            run_name="1",
            max_seq_len=128,
            validation_fraction=0.2,
            max_train_samples=0,
            max_validation_samples=0,
        )
    assert "hunter2" not in str(found.value)
    assert not list(tmp_path.rglob("*"))
