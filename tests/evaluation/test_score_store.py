"""What was measured is found again by content, and nothing else is."""

import json
import math
from pathlib import Path

import pytest

from osft.evaluation import score_store
from osft.evaluation.score_store import FORMAT, ScoreStore, measurement_key, model_hash

VALUE = {"nll": [1 / 3, math.pi], "correct": [True, False], "kind": None}


def test_value_is_found_by_another_process_to_the_last_bit(tmp_path):
    ScoreStore(tmp_path).put("key", VALUE)
    assert ScoreStore(tmp_path).get("key") == VALUE
    assert ScoreStore(tmp_path).get("other") is None


def test_store_of_an_object_store_is_shared(bucket):
    ScoreStore(f"{bucket}/scores").put("key", VALUE)
    assert ScoreStore(f"{bucket}/scores").get("key") == VALUE


def test_without_a_place_values_are_kept_for_the_objects_life():
    store = ScoreStore(None)
    store.put("key", VALUE)
    assert store.get("key") == VALUE
    assert ScoreStore(None).get("key") is None


def truncated(content: str) -> str:
    return content[: len(content) // 2]


def changed_value(content: str) -> str:
    return content.replace("3.14159", "3.24159")


def changed_format(content: str) -> str:
    return content.replace(f'"format": {FORMAT}', '"format": 0')


@pytest.mark.parametrize(
    "damage", [truncated, changed_value, changed_format, lambda _: "", lambda _: "[]", lambda _: "1"]
)
def test_damaged_entry_is_measured_again_and_written_over(tmp_path, damage):
    ScoreStore(tmp_path).put("key", VALUE)
    file = tmp_path / "key.json"
    content = file.read_text()
    file.write_text(damage(content))
    assert file.read_text() != content
    assert ScoreStore(tmp_path).get("key") is None
    assert ScoreStore(tmp_path).measured("key", lambda: VALUE) == VALUE
    assert file.read_text() == content


def test_entry_under_another_name_is_not_trusted(tmp_path):
    ScoreStore(tmp_path).put("key", VALUE)
    (tmp_path / "key.json").rename(tmp_path / "other.json")
    assert ScoreStore(tmp_path).get("other") is None


def test_what_is_there_is_not_measured(tmp_path):
    ScoreStore(tmp_path).put("key", VALUE)
    assert ScoreStore(tmp_path).measured("key", lambda: pytest.fail("measured again")) == VALUE


def test_interrupted_measurement_leaves_nothing(tmp_path):
    def measure() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ScoreStore(tmp_path).measured("key", measure)
    assert list(tmp_path.iterdir()) == []


def test_key_depends_on_everything_that_is_given(monkeypatch):
    key = measurement_key("scores", model="m", records=["a", "b"], max_tokens=10)
    assert key == measurement_key("scores", max_tokens=10, records=["a", "b"], model="m")
    others = [
        measurement_key("answers", model="m", records=["a", "b"], max_tokens=10),
        measurement_key("scores", model="n", records=["a", "b"], max_tokens=10),
        measurement_key("scores", model="m", records=["b", "a"], max_tokens=10),
        measurement_key("scores", model="m", records=["a", "b"], max_tokens=11),
    ]
    monkeypatch.setattr(score_store, "FORMAT", score_store.FORMAT + 1)
    others.append(measurement_key("scores", model="m", records=["a", "b"], max_tokens=10))
    monkeypatch.undo()
    monkeypatch.setattr(score_store, "version", lambda name: "0")
    others.append(measurement_key("scores", model="m", records=["a", "b"], max_tokens=10))
    assert len({key, *others}) == 7


def test_model_is_its_files_content_wherever_it_lies(tmp_path):
    def folder(name: str, **files: str) -> Path:
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        return tmp_path / name

    same = model_hash(folder("a", config="1", weights="2"))
    assert model_hash(folder("b", weights="2", config="1")) == same
    assert model_hash(folder("hidden", weights="2", config="1", **{".cache": "3"})) == same
    different = [
        model_hash(folder("c", config="1", weights="3")),
        model_hash(folder("d", config="2", weights="1")),
        model_hash(folder("e", config="1", weights="2", template="")),
        model_hash(folder("f", config="1", model="2")),
    ]
    assert len({same, *different}) == 5


def test_entry_says_what_it_is(tmp_path):
    ScoreStore(tmp_path).put("key", VALUE)
    entry = json.loads((tmp_path / "key.json").read_text())
    assert (entry["format"], entry["key"], entry["value"]) == (FORMAT, "key", VALUE)
