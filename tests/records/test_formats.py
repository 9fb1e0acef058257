"""Records of this release are read back as they were, those of earlier ones are migrated, and others refused by name.

`format_0/` holds files as the release before records had a format wrote them.
"""

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from osft.evaluation.record import Evaluation
from osft.models.origin import Origin
from osft.models.training_summary import TrainingSummary
from osft.rounds.pipeline_run import RegisteredVersion
from osft.rounds.resolution import ResolvedRound
from osft.storage.record import Record, RecordError, RecordPart
from osft.storage.sealed import DamagedFile, write_sealed
from osft.subspace.factor_set import FactorManifest, FactorManifestByInputs
from osft.subspace.statistics_store import StatisticsManifest
from osft.tracking.lineage import Lineage

FORMAT_0 = Path(__file__).parent / "format_0"
KINDS = {
    "round.json": ResolvedRound,
    "version.json": RegisteredVersion,
    "evaluation.json": Evaluation,
    "training.json": TrainingSummary,
    "lineage.json": Lineage,
    "osft.json": Origin,
    "factors_of_weights.json": FactorManifest,
    "factors_of_activations.json": FactorManifestByInputs,
    "statistics.json": StatisticsManifest,
}


class Step(RecordPart):
    loss: float
    names: tuple[str, ...] = ()


class Curve(Record):
    """Format 0 had no count, format 1 called the steps `points`."""

    FORMAT: ClassVar[int] = 2
    MIGRATIONS: ClassVar[dict] = {
        0: lambda found: found | {"count": len(found["points"])},
        1: lambda found: {"steps": found["points"], "count": found["count"]},
    }

    count: int
    steps: tuple[Step, ...]


CURVE = Curve(count=2, steps=(Step(loss=1.5), Step(loss=math.inf, names=("a",))))


def plain(name: str) -> dict[str, Any]:
    """What a file of the earlier release holds, without its hash."""
    found = json.loads((FORMAT_0 / name).read_text())
    found.pop("sha256", None)
    return found


def contained(part: Any, whole: Any) -> bool:
    """Whether all that `part` says is in `whole`, which may say more."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(k in whole and contained(v, whole[k]) for k, v in part.items())
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(contained, part, whole))
    return part == whole


@pytest.mark.parametrize("name", KINDS)
def test_file_of_the_release_before_is_read_and_keeps_all_that_it_says(name):
    record = KINDS[name].read(FORMAT_0 / name)
    assert contained(plain(name), record.to_dict())
    assert KINDS[name].from_json(record.to_json(), name) == record


@pytest.mark.parametrize("name", ["factors_of_weights.json", "factors_of_activations.json"])
def test_manifest_of_factors_keeps_its_content_which_names_it(name):
    assert KINDS[name].read(FORMAT_0 / name).to_dict() == plain(name)


@pytest.mark.parametrize("name", KINDS)
def test_file_of_a_newer_release_is_refused_by_name(name):
    with pytest.raises(RecordError, match=f"{name} has the format 99, this release reads .*\\d\\. Use the release"):
        KINDS[name].from_dict(plain(name) | {"format": 99}, name)


@pytest.mark.parametrize("name", KINDS)
def test_field_that_is_not_known_is_refused_by_name(name):
    with pytest.raises(RecordError, match=f"{name} is not valid: colour: Extra inputs"):
        KINDS[name].from_dict(plain(name) | {"colour": "red"}, name)


def test_evaluation_of_the_first_releases_has_nothing_of_what_they_did_not_measure():
    found = plain("evaluation.json")
    for name in ("exact", "drift", "benchmarks"):
        del found[name]
    del found["matrix"]["drift"]
    for model in found["models"].values():
        del model["version"]
    for described in found["sets"].values():
        del described["notes"]
    for scores in found["results"].values():
        for score in scores.values():
            del score["num_ties"]
    record = Evaluation.from_dict(found, "evaluation.json")
    assert (record.exact, record.drift, record.benchmarks, record.matrix.drift) == (None, {}, None, {})
    assert record.models["champion"].version is None
    assert record.results["base"]["more"].loss == found["results"]["base"]["more"]["loss"]


def test_training_of_the_first_releases_has_nothing_of_what_they_did_not_measure():
    found = plain("training.json")
    lacking = ("checkpoint_files", "metrics_sha256", "preflight", "fitted_step", "sampled_drift", "saved", "statistics")
    for name in (*lacking, "replay"):
        del found[name]
    for layout in found["rank_layout"].values():
        for name in ("effective_rank", "weight_norm", "frozen_share", "update_lost", "predicted_drift"):
            del layout[name]
    record = TrainingSummary.from_dict(found, "training.json")
    assert (record.saved, record.replay, record.checkpoint_files) == (None, None, {})
    assert record.steps == found["steps"]


def test_numbers_of_a_training_are_those_that_were_logged_before():
    found = plain("training.json")
    numbers = TrainingSummary.from_dict(found, "training.json").numbers()
    assert numbers == {name: value for name, value in found.items() if isinstance(value, int | float)}


def test_record_is_read_back_with_its_format_and_numbers_that_are_not_finite(tmp_path):
    write_sealed(tmp_path / "curve.json", CURVE.to_dict())
    assert json.loads((tmp_path / "curve.json").read_text())["format"] == 2
    assert Curve.read(tmp_path / "curve.json") == CURVE
    unknown = CURVE.replace(steps=(Step(loss=math.nan),))
    assert math.isnan(Curve.from_json(unknown.to_json(), "it").steps[0].loss)


@pytest.mark.parametrize(
    "value",
    [
        {"points": [{"loss": 1.5}, {"loss": math.inf, "names": ["a"]}]},
        {"format": 1, "points": [{"loss": 1.5}, {"loss": math.inf, "names": ["a"]}], "count": 2},
    ],
)
def test_migrations_follow_each_other_from_the_format_that_is_found(value):
    assert Curve.from_dict(value, "curve.json") == CURVE


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"format": 3}, "curve.json has the format 3, this release reads 0, 1, 2"),
        ({"format": "2"}, "curve.json has the format '2', this release reads 0, 1, 2"),
        ({"format": 2, "count": "2", "steps": []}, "curve.json is not valid: count: .*valid integer"),
        ({"format": 2, "steps": [{"loss": None}]}, "count: Field required; steps.0.loss: .*valid number"),
        ({"dots": []}, "curve.json is not valid in the format 0: KeyError.'points'."),
        ([], "curve.json holds no JSON object, but list"),
    ],
)
def test_what_is_not_such_a_record_is_refused_with_its_name_and_the_field(value, problem):
    with pytest.raises(RecordError, match=problem):
        Curve.from_dict(value, "curve.json")


def test_text_that_is_not_json_is_refused_with_its_name():
    with pytest.raises(RecordError, match="curve.json is not JSON: "):
        Curve.from_json('{"format": 2', "curve.json")


def test_file_that_was_changed_is_damaged_and_the_remedy_is_said(tmp_path):
    write_sealed(tmp_path / "curve.json", CURVE.to_dict())
    (tmp_path / "curve.json").write_text((tmp_path / "curve.json").read_text().replace("1.5", "2.5"))
    with pytest.raises(DamagedFile, match="curve.json is damaged.*Draw it again"):
        Curve.read(tmp_path / "curve.json", "Draw it again")


def test_record_does_not_change_and_what_replaces_a_field_is_checked():
    with pytest.raises(ValidationError, match="frozen"):
        CURVE.count = 3
    assert (CURVE.replace(count=3).count, CURVE.count) == (3, 2)
    with pytest.raises(ValidationError, match="valid integer"):
        CURVE.replace(count="3")


def test_fields_are_described_by_the_strings_behind_them():
    described = {name: field.description for name, field in TrainingSummary.model_fields.items()}
    assert described["steps"] == "Optimizer steps."
