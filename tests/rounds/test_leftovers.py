"""What rounds leave below their storage root, and what `osft clean` makes of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from osft import storage
from osft.cli import app
from osft.data.record_hashes import NONE
from osft.models.origin import StoredStatistics
from osft.rounds import leftovers
from osft.storage.sealed import sealed
from osft.subspace.factor_set import FactorManifest, SplitWeight
from osft.subspace.statistics import Part
from osft.subspace.statistics_store import StatisticsManifest, StoredInput
from osft.tracking import lineage, registry, runs
from osft.tracking.champion import promote
from tests.tracking.rounds import a_lineage

MODEL = "m"
UNMEASURED: dict[str, Any] = {"model_sha256": "", "weight_rms": 0.0, "mean_curvature": 0.0}
KEPT_OF_A_ROUND = {"round.json", "train/training.json", "train/hf_format/samples_8.0/model.safetensors"}


class Rounds:
    """Rounds that write what real ones do, one byte a file, and register real versions."""

    def __init__(self, root: str, mlflow: Any, folder: Path) -> None:
        self.root, self.mlflow, self.folder = root, mlflow, folder
        self.champion: tuple[int, lineage.Lineage] | None = None

    def write(self, name: str, value: dict[str, Any] | None = None) -> None:
        storage.write(storage.join(self.root, name), b"x" if value is None else json.dumps(sealed(value)).encode())

    def play(self, id: str, outcome: str) -> None:
        """One round from the champion. One that "failed" did so long ago."""
        parent = runs.pipeline_run(
            self.mlflow, experiment="e", pipeline_run_id=id, name=id, storage_root=self.folder / "root"
        )
        self.write(f"rounds/{id}/round.json")
        if outcome != "nothing":
            self.learn(id)
        if outcome in ("promoted", "refused"):
            version = self.register(id, parent)
            self.mlflow.set_terminated(parent)
            if outcome == "promoted":
                number, entry = version
                expected = self.champion[0] if self.champion else None
                promote(self.mlflow, MODEL, number, storage_root=self.root, expected_champion=expected)
                self.champion = (number, entry)
                leftovers.remove_factors(self.mlflow, self.root, ended=id)
        elif outcome != "running":
            long_ago = 1 if outcome == "failed" else None
            self.mlflow.set_terminated(parent, "FINISHED" if outcome == "nothing" else "FAILED", long_ago)

    @property
    def start(self) -> str:
        """What the next round starts from."""
        return f"v{self.champion[0]}" if self.champion else "base"

    def learn(self, id: str) -> None:
        for name in (f"records/{id}.jsonl", f"scores/{id}.json", f"data/{id}/dataset.json", f"data/{id}/train/a.arrow"):
            self.write(name)
        train = ("training.json", "state/step-2/position.json", "hf_format/samples_8.0_best_val_loss/config.json")
        for name in (*(f"train/{name}" for name in train), "train/hf_format/samples_8.0/model.safetensors"):
            self.write(f"rounds/{id}/{name}")
        weight = SplitWeight(sha256="0" * 64, shape=(2, 2), rank=1, file=f"weights/{self.start}.safetensors")
        split = {"unfreeze_rank_ratio": 0.5, "free_subspace": "core", "weights": {"q": weight}}
        self.write(f"factors/weights/{self.start}.safetensors")
        self.write(f"factors/sets/{self.start}.json", FactorManifest(**split).to_dict())
        texts = [Part(name="base", source="", num_tokens=1, text_sha256="base", **UNMEASURED)]
        stored = StoredInput(
            targets=("q",), transposed=False, shape=(2, 2), error_bound=0.0, file=f"moments/{id}.safetensors", sha256=""
        )
        found = StatisticsManifest(content_sha256=id, parts=tuple(texts), inputs=(stored,))
        for name in (f"moments/{id}.safetensors", "texts/base.jsonl", f"texts/{id}.json"):
            self.write(f"factors/{name}")
        self.write(f"factors/statistics/{id}.json", found.to_dict())

    def register(self, id: str, run_id: str) -> tuple[int, lineage.Lineage]:
        number, before = self.champion or (None, None)
        entry = a_lineage(
            before,
            number,
            task=id,
            model_name=MODEL,
            checkpoint=f"/mounted/elsewhere/rounds/{id}/train/hf_format/samples_8.0",
            settings={"dataset": id},
            factor_key=self.start,
            statistics=StoredStatistics(address=f"factors/statistics/{id}.json", sha256=id),
            pipeline_run_id=id,
        )
        checkpoint = self.folder / "checkpoints" / id
        checkpoint.mkdir(parents=True)
        lineage.write(self.folder / "lineages" / id, entry, record_hashes=NONE, held_out=None)
        settings = {"description": "", "tags": {registry.CHECKPOINT_TAG: id}, "digest": id, "address": entry.checkpoint}
        folder = self.folder / "lineages" / id
        return registry.register(self.mlflow, MODEL, checkpoint, run_id=run_id, lineage=folder, **settings), entry

    def clean(self, **options: Any) -> None:
        leftovers.remove(self.root, leftovers.sort_files(self.mlflow, self.root, **options))

    def files(self) -> set[str]:
        return {name for name in storage.names(self.root) if not name.startswith(("mlflow/", "champions/"))}


@pytest.fixture
def rounds(tmp_path, empty_registry) -> Rounds:
    root = tmp_path / "root"
    database = root / "mlflow" / "mlflow.db"
    database.parent.mkdir(parents=True)
    shutil.copyfile(empty_registry, database)
    return Rounds(str(root), runs.client(runs.local_tracking_uri(root), root), tmp_path)


def held(id: str) -> set[str]:
    """What a version holds."""
    files = {f"rounds/{id}/{name}" for name in KEPT_OF_A_ROUND} | {
        f"data/{id}/dataset.json",
        f"data/{id}/train/a.arrow",
    }
    return files | {f"factors/statistics/{id}.json", f"factors/moments/{id}.safetensors", "factors/texts/base.jsonl"}


def factors(*keys: str) -> set[str]:
    return {name for key in keys for name in (f"factors/sets/{key}.json", f"factors/weights/{key}.safetensors")}


def test_storage_of_twenty_rounds_grows_by_what_the_versions_hold(rounds):
    outcomes = ["promoted", "refused", "nothing", "failed", "promoted"] * 4
    for number, outcome in enumerate(outcomes):
        rounds.play(f"r{number}", outcome)
    sets = {name for name in rounds.files() if name.startswith("factors/sets/")}
    trained_with = rounds.champion[1].factor_key
    assert sets == {f"factors/sets/{trained_with}.json"}, "those of earlier champions go with the promotion"
    rounds.play("last", "refused")
    rounds.clean()
    versions = ["last", *(f"r{i}" for i, outcome in enumerate(outcomes) if outcome in ("promoted", "refused"))]
    kept = factors(trained_with, rounds.start)
    assert rounds.files() == set.union(kept, *map(held, versions))
    rounds.mlflow.delete_model_version(MODEL, "2")
    rounds.clean()
    assert rounds.files() == set.union(kept, *map(held, set(versions) - {"r1"})), "one that was deleted is left over"
    assert not Path(rounds.root, "rounds", "r1").exists()


def test_running_round_keeps_its_files_and_what_it_may_use(rounds):
    rounds.play("first", "promoted")
    rounds.play("second", "running")
    rounds.play("third", "failed just now")
    before = rounds.files()
    rounds.clean()
    assert rounds.files() == before - {
        f"rounds/first/train/{name}"
        for name in ("state/step-2/position.json", "hf_format/samples_8.0_best_val_loss/config.json")
    }
    rounds.clean(ended=["second", "third"])
    assert rounds.files() == held("first") | factors("base")
    with pytest.raises(ValueError, match="there is no round fourth below"):
        rounds.clean(ended=["fourth"])


def test_nothing_goes_where_it_cannot_be_known(rounds, empty_registry, tmp_path):
    rounds.play("first", "refused")
    storage.write(storage.join(rounds.root, "rounds/first/notes.txt"), b"a person's")
    storage.write(storage.join(rounds.root, "inbox/chats.jsonl"), b"a person's")
    before = rounds.files()
    other = runs.client(f"sqlite:///{empty_registry}", "")
    assert {part.fate for part in leftovers.sort_files(other, rounds.root)} == {"stay", "unknown"}
    artifacts = Path(rounds.root, "mlflow", "artifacts")
    artifacts.rename(tmp_path / "away")
    with pytest.raises(lineage.LineageError, match="version 1 of m"):
        rounds.clean()
    assert rounds.files() == before
    (tmp_path / "away").rename(artifacts)
    rounds.clean()
    assert {"rounds/first/notes.txt", "inbox/chats.jsonl"} <= rounds.files()
    parts = {part.place: part for part in leftovers.sort_files(rounds.mlflow, rounds.root) if part.fate == "unknown"}
    assert parts["rounds/first"].files == ["rounds/first/notes.txt"]
    assert parts["inbox"].files == ["inbox/chats.jsonl"]


def test_object_store_is_cleaned_too(rounds, bucket):
    remote = Rounds(f"{bucket}/osft", rounds.mlflow, rounds.folder)
    for id, outcome in (("first", "promoted"), ("second", "refused"), ("third", "failed")):
        remote.play(id, outcome)
    remote.clean()
    assert remote.files() == held("first") | held("second") | factors("base", "v1")


def test_command_removes_nothing_unless_it_is_told_to(rounds, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    rounds.play("first", "refused")
    before = rounds.files()
    shown = CliRunner().invoke(app, ["clean", rounds.root])
    assert shown.exit_code == 0, shown.output
    assert rounds.files() == before
    assert "Nothing was removed. With --yes, 5 bytes are." in shown.output
    done = CliRunner().invoke(app, ["clean", rounds.root, "--yes"])
    assert "5 bytes were removed." in done.output
    assert rounds.files() == held("first") | factors("base")
    refused = CliRunner().invoke(app, ["clean", str(rounds.folder / "lineages")])
    assert refused.exit_code == 2


def test_command_ends_the_runs_of_a_round_that_is_said_to_be_over(rounds, monkeypatch):
    """A cancelled pipeline whose step was killed at once: nothing else would ever end them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    rounds.play("first", "running")
    rounds.play("second", "running")

    def states() -> dict[str, str]:
        found = rounds.mlflow.search_runs([rounds.mlflow.get_experiment_by_name("e").experiment_id])
        return {run.info.run_name: run.info.status for run in found if run.info.run_name in ("first", "second")}

    for told in ([], ["--ended", "first"]):
        CliRunner().invoke(app, ["clean", rounds.root, *told])
        assert states() == {"first": "RUNNING", "second": "RUNNING"}
    done = CliRunner().invoke(app, ["clean", rounds.root, "--ended", "first", "--yes"])
    assert "MLflow took 1 for running: now KILLED" in done.output
    assert states() == {"first": "KILLED", "second": "RUNNING"}
