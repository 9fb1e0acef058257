"""What a version says about where it comes from, and what is refused."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from osft import cli
from osft.data.record_hashes import contains, read_hashes, record_hash
from osft.data.records import read_records
from osft.evaluation import matrix
from osft.models.origin import StoredStatistics
from osft.tracking import lineage, registry
from osft.tracking.champion import promote
from osft.tracking.lineage import LineageError
from tests.conftest import arithmetic, write_jsonl
from tests.tracking.rounds import a_lineage, new_run, register_round


@pytest.fixture(scope="module")
def three_rounds(mlflow, tmp_path_factory):
    """A model with two promoted rounds and a third that was refused; each held out 2 of its records."""
    folder = tmp_path_factory.mktemp("rounds")
    entry, parent = None, None
    for number, task in enumerate(("first", "second: 50% größer?", "third")):
        entry = a_lineage(
            entry, parent, task=task, model_name="three", parent_scores={task: {"loss": 3.0, "accuracy": None}}
        )
        records = arithmetic(10, seed=number)
        parent = register_round(mlflow, folder / str(number), entry, records[2:], records[:2])
    promote(mlflow, "three", 2, storage_root=str(folder))
    registry.refuse(mlflow, "three", 3, "forgot")
    return entry


def stored_file(mlflow, version: int, name: str) -> Path:
    """The file in MLflow's own artifacts."""
    run = mlflow.get_run(mlflow.get_model_version("three", str(version)).run_id)
    return Path(run.info.artifact_uri.removeprefix("file://")) / "lineage" / name


def test_what_is_read_is_what_was_written(mlflow, three_rounds):
    found = lineage.read(mlflow, "three", 3)
    assert found == three_rounds.replace(records=found.records, evaluation_set=found.evaluation_set)
    assert (found.records.num_records, found.evaluation_set.num_records) == (10, 2)


def test_history_goes_from_the_base_model_to_the_version(mlflow, three_rounds):
    assert list(lineage.history(mlflow, "three", 3)) == [1, 2, 3]
    assert list(lineage.history(mlflow, "three", 1)) == [1]


def test_records_of_all_ancestors_are_known_on_both_sides_of_the_split(mlflow, three_rounds, tmp_path):
    file = write_jsonl(tmp_path / "all.jsonl", [r for seed in range(4) for r in arithmetic(10, seed=seed)])
    hashes = [record_hash(record) for record in read_records(str(file))]
    known = lineage.known_records(mlflow, "three", lineage.history(mlflow, "three", 2))
    assert contains(known, hashes).tolist() == [True] * 20 + [False] * 20


def earlier_sets(mlflow, model_name: str, version: int, to: Path) -> dict[str, Path]:
    return lineage.earlier_evaluation_sets(mlflow, model_name, lineage.history(mlflow, model_name, version), to)


def test_evaluation_sets_of_all_ancestors_can_be_fetched_again(mlflow, three_rounds, tmp_path):
    found = earlier_sets(mlflow, "three", 2, tmp_path)
    assert list(found) == ["first", "second: 50% größer?"]
    for number, path in enumerate(found.values()):
        assert [json.loads(line) for line in path.read_text().splitlines()] == arithmetic(10, seed=number)[:2]
    written = [path.stat().st_mtime_ns for path in found.values()]
    again = earlier_sets(mlflow, "three", 2, tmp_path)
    assert [path.stat().st_mtime_ns for path in again.values()] == written, "what is there is not fetched"
    found["first"].write_text("damaged")
    earlier_sets(mlflow, "three", 2, tmp_path)
    assert json.loads(found["first"].read_text().splitlines()[0]) == arithmetic(10, seed=0)[0]


@pytest.mark.parametrize("name", ["evaluation_sets/first.jsonl", "records.bin"])
def test_a_file_that_was_changed_in_the_store_is_refused(mlflow, three_rounds, tmp_path, name):
    file = stored_file(mlflow, 1, name)
    content = file.read_bytes()
    file.write_bytes(content + content)
    try:
        with pytest.raises(LineageError, match=f"version 1 of three: its {name} is not what it was registered with"):
            if name == "records.bin":
                lineage.known_records(mlflow, "three", lineage.history(mlflow, "three", 2))
            else:
                earlier_sets(mlflow, "three", 2, tmp_path)
    finally:
        file.write_bytes(content)


def test_a_round_without_held_out_records_has_no_evaluation_set(mlflow, tmp_path):
    version = register_round(mlflow, tmp_path / "r", a_lineage(model_name="none-held-out"), arithmetic(3), [])
    assert lineage.read(mlflow, "none-held-out", version).evaluation_set is None
    assert earlier_sets(mlflow, "none-held-out", version, tmp_path) == {}


def test_a_cycle_is_refused(mlflow, tmp_path):
    first = a_lineage(model_name="cycle")
    second = a_lineage(first, 1, task="second", model_name="cycle")
    looped = second.replace(parent_version=2, rows=second.rows)
    register_round(mlflow, tmp_path / "1", looped, arithmetic(3), [])
    register_round(mlflow, tmp_path / "2", second, arithmetic(3), [])
    with pytest.raises(LineageError, match="version 2 of cycle is its own ancestor: 2 -> 1 -> 2"):
        lineage.history(mlflow, "cycle", 2)


def test_a_missing_parent_is_refused(mlflow, tmp_path):
    first = a_lineage(model_name="orphan")
    version = register_round(
        mlflow, tmp_path / "1", a_lineage(first, 7, task="second", model_name="orphan"), arithmetic(3), []
    )
    with pytest.raises(LineageError, match="parent of version 1 of orphan cannot be read: version 7 of orphan is not"):
        lineage.history(mlflow, "orphan", version)


def test_a_version_that_does_not_go_on_from_its_parent_is_refused(mlflow, tmp_path):
    register_round(mlflow, tmp_path / "1", a_lineage(model_name="other"), arithmetic(3), [])
    elsewhere = a_lineage(task="elsewhere", model_name="other")
    register_round(mlflow, tmp_path / "2", a_lineage(elsewhere, 1, task="t", model_name="other"), arithmetic(3), [])
    with pytest.raises(LineageError, match="version 2 of other does not continue its parent, version 1"):
        lineage.history(mlflow, "other", 2)


def test_a_version_without_lineage_is_refused(mlflow, tmp_path):
    run_id = new_run(mlflow, tmp_path / "checkpoint")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    tags = {"osft.checkpoint": "c"}
    version = registry.register(mlflow, "bare", checkpoint, run_id=run_id, description="d", tags=tags)
    with pytest.raises(LineageError, match="version 1 of bare has no lineage.json"):
        lineage.read(mlflow, "bare", version)


def changed(**changes) -> str:
    return json.dumps(a_lineage().to_dict() | changes)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (changed(format=2), "has the format 2, this release reads 1"),
        ("[]", "holds no JSON object"),
        ("{", "is not JSON"),
        (changed(parent_version="1"), "parent_version"),
        (changed(surprise=1), "surprise"),
        (changed(rows=[]), "rows must be of different tasks"),
        (changed(task="../../etc"), "rows must be|cannot be a task's name"),
        (changed(parent_version=3), "does not fit 1 rounds"),
    ],
)
def test_what_is_no_lineage_is_refused_with_the_version(text, problem):
    with pytest.raises(LineageError, match=rf"^version 5 of m: .*({problem})"):
        lineage.parse(text, "version 5 of m")


@pytest.mark.parametrize("task", ["../x", ".hidden", "a/b", "", "new\nline"])
def test_a_task_that_cannot_be_a_files_name_is_refused(task):
    with pytest.raises(ValueError, match="cannot be a task's name"):
        a_lineage(task=task)


def test_rows_make_the_matrix_with_losses_negated():
    first = a_lineage(scores={"first": {"loss": 1.0, "accuracy": 0.75}, "anchor": {"loss": 3.0, "accuracy": None}})
    second = a_lineage(
        first,
        1,
        task="second",
        parent_scores={"second": {"loss": 2.5, "accuracy": 0.25}},
        scores={"first": {"loss": 1.5, "accuracy": 0.5}, "second": {"loss": 1.0, "accuracy": 1.0}},
        baseline={"first": {"loss": 2.0, "accuracy": 0.25}, "second": {"loss": 3.0, "accuracy": None}},
    )
    assert second.matrix("accuracy") == ([[0.75, 0.25], [0.5, 1.0]], [0.25, None])
    rows, baseline = second.matrix("loss")
    assert rows == [[-1.0, -2.5], [-1.5, -1.0]]
    assert matrix.backward_transfer(rows) == -0.5
    assert matrix.forward_transfer(rows, baseline) == 0.5


def test_a_damaged_set_of_hashes_is_refused(tmp_path):
    for content in (b"x" * 17, b"b" * 16 + b"a" * 16, b"a" * 32):
        (tmp_path / "records.bin").write_bytes(content)
        with pytest.raises(ValueError, match="not a sorted set"):
            read_hashes(tmp_path / "records.bin")


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["lineage", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_the_history_as_a_tree(registry_root, three_rounds):
    code, output, _ = invoke("three@champion", "--storage-root", registry_root)
    assert code == 0
    lines = output.splitlines()
    assert lines[0] == "org/base"
    assert lines[1] == "└── three version 1  first"
    assert "    └── three version 2 (champion)  second: 50% größer?" in lines
    assert "        ├── data: second: 50% größer?.jsonl, 2 new of 3 records" in lines
    assert "version 3" not in output
    assert "version 3 (candidate, challenger)" in invoke("three/3", "--storage-root", registry_root)[1]


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("three", "names no version"),
        ("three@nobody", "no model three with the alias 'nobody'"),
        ("three/9", "version 9"),
    ],
)
def test_the_command_refuses_what_names_no_version(registry_root, three_rounds, reference, problem):
    code, _, errors = invoke(reference, "--storage-root", registry_root)
    assert (code, problem in errors) == (2, True)


def test_the_command_makes_no_database_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, _, errors = invoke("m@champion", "--storage-root", tmp_path)
    assert (code, "holds no mlflow/mlflow.db" in errors) == (2, True)
    assert list(tmp_path.iterdir()) == []
    assert "MLFLOW_TRACKING_URI" in invoke("m@champion")[2]


def test_lineage_from_before_statistics_were_recorded_has_none():
    entry = a_lineage(statistics=StoredStatistics(address="factors/statistics/k.json", sha256="k"))
    written = entry.to_dict()
    assert lineage.parse(json.dumps(written), "it") == entry
    del written["statistics"]
    assert lineage.parse(json.dumps(written), "it").statistics is None
