"""Versions that are never overwritten, and their aliases."""

from pathlib import Path

import pytest

from osft.tracking import registry
from tests.tracking.rounds import new_run


@pytest.fixture
def register(mlflow, tmp_path, request):
    """Makes a version of the test's own model, in a new run unless one is given."""

    def make(name: str, content: str = "", run_id: str = "") -> int:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(content or name)
        run_id = run_id or new_run(mlflow, folder)
        tags = {"osft.checkpoint": name}
        return registry.register(mlflow, request.node.name, folder, run_id=run_id, description="d", tags=tags)

    return make


@pytest.fixture
def model(request) -> str:
    return request.node.name


def content(mlflow, model: str, version: int) -> str:
    run_id = mlflow.get_model_version(model, str(version)).run_id
    return Path(mlflow.download_artifacts(run_id, "model/config.json")).read_text()


def test_versions_count_up_and_the_candidate_is_the_newest(mlflow, model, register):
    assert registry.champion(mlflow, model) is None
    assert [register("first"), register("second")] == [1, 2]
    assert registry.version_of(mlflow, model, "candidate") == 2
    assert registry.champion(mlflow, model) is None, "it moves by promotion only"
    assert content(mlflow, model, 1) == "first"


def test_version_that_is_registered_by_its_address_has_no_copy(mlflow, model, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    settings = {"description": "d", "model_card": "a card"}
    for number, address in ((1, str(folder)), (2, "s3://bucket/rounds/r/checkpoint")):
        run_id, tags = new_run(mlflow, tmp_path / str(number)), {"osft.checkpoint": address}
        registry.register(mlflow, model, folder, run_id=run_id, tags=tags, address=address, **settings)
        assert [file.path for file in mlflow.list_artifacts(run_id, "model")] == ["model/README.md"]
    sources = [mlflow.get_model_version_download_uri(model, version) for version in ("1", "2")]
    assert sources == [folder.as_uri(), "s3://bucket/rounds/r/checkpoint"]


def test_a_retried_step_registers_once_and_takes_the_alias_from_no_newer_version(mlflow, model, register):
    register("first")
    assert [register("second"), register("second")] == [2, 2]
    assert register("first") == 1
    assert registry.version_of(mlflow, model, "candidate") == 2


def test_a_retry_sets_the_alias_that_the_first_attempt_did_not_come_to(mlflow, model, register):
    register("first")
    mlflow.delete_registered_model_alias(model, "candidate")
    assert register("first") == 1
    assert registry.version_of(mlflow, model, "candidate") == 1


def test_other_content_under_the_same_name_is_refused_and_changes_nothing(mlflow, model, register):
    register("first", "these bytes")
    with pytest.raises(ValueError, match="not what version 1 of .* was registered from"):
        register("first", "other bytes")
    assert content(mlflow, model, 1) == "these bytes"
    assert register("first", "these bytes") == 1


def test_a_second_version_does_not_overwrite_the_first_ones_files_in_their_run(mlflow, model, register):
    register("first")
    run_id = mlflow.get_model_version(model, "1").run_id
    with pytest.raises(ValueError, match=f"run {run_id} holds version 1"):
        register("second", run_id=run_id)
    assert content(mlflow, model, 1) == "first"


def test_a_refused_version_is_the_challenger_with_the_reason(mlflow, model, register):
    register("first")
    mlflow.set_registered_model_alias(model, "champion", "1")
    register("second")
    registry.refuse(mlflow, model, 2, "loss of the anchor web-text +4.0%, at most +2.0%")
    assert registry.version_of(mlflow, model, "challenger") == 2
    assert registry.champion(mlflow, model) == 1
    assert mlflow.get_model_version(model, "2").tags["osft.refused"].startswith("loss of the anchor web-text")
