"""Prepared data: split by content, deduplicated, reused, and never half-written."""

import json
import random

import pytest
from datasets import load_from_disk

from osft.data.prepare import prepare
from osft.data.records import DataError
from tests.conftest import arithmetic, write_jsonl


def sources(folder) -> set[str]:
    return {row["source"] for row in load_from_disk(folder / "train")}


def held_out(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def test_every_distinct_record_is_on_one_side(chats, model_folder, tmp_path):
    prepared = prepare(str(chats), model_folder, tmp_path)
    counts = prepared.statistics
    assert counts["num_records"] == 120
    assert counts["num_train_samples"] + counts["num_validation_samples"] + counts["num_duplicates"] == 120
    train = [row["input_ids"] for row in load_from_disk(prepared.folder / "train")]
    assert counts["num_tokens"] == sum(map(len, train))
    assert counts["longest_sample"] == max(map(len, train))


def test_split_does_not_depend_on_order_or_on_new_records(model_folder, tmp_path):
    records = arithmetic(60)
    first = prepare(str(write_jsonl(tmp_path / "a.jsonl", records)), model_folder, tmp_path / "out")
    random.Random(0).shuffle(records)
    second = prepare(str(write_jsonl(tmp_path / "b.jsonl", records)), model_folder, tmp_path / "out")
    assert held_out(first.folder) == held_out(second.folder)
    grown = write_jsonl(tmp_path / "c.jsonl", records + arithmetic(60, seed=9))
    third = prepare(str(grown), model_folder, tmp_path / "out")
    assert all(record in held_out(third.folder) for record in held_out(first.folder))


def test_same_question_with_other_answers_stays_on_one_side(model_folder, tmp_path):
    records = []
    for number in range(40):
        for answer in ("red", "blue", "green"):
            question = {"role": "user", "content": f"colour of {number}?"}
            records.append({"messages": [question, {"role": "assistant", "content": answer}]})
    file = write_jsonl(tmp_path / "colours.jsonl", records)
    prepared = prepare(str(file), model_folder, tmp_path / "out", validation_fraction=0.3)
    questions = [record["messages"][0]["content"] for record in held_out(prepared.folder)]
    assert questions
    assert all(questions.count(question) == 3 for question in questions)


def test_duplicates_are_dropped_within_and_across_files(model_folder, tmp_path):
    records = arithmetic(40)
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", records)
    write_jsonl(tmp_path / "in" / "b.jsonl", records)
    twice = prepare(str(tmp_path / "in"), model_folder, tmp_path / "out").statistics
    once = prepare(str(tmp_path / "in" / "a.jsonl"), model_folder, tmp_path / "out").statistics
    assert twice["num_train_samples"] == once["num_train_samples"]
    assert twice["num_duplicates"] == once["num_duplicates"] + 40


def test_second_run_reuses_and_changed_input_does_not(model_folder, tmp_path, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", arithmetic(40))
    first = prepare(str(file), model_folder, tmp_path / "out")
    assert prepare(str(file), model_folder, tmp_path / "out").reused
    assert "data: reused" in capsys.readouterr().out
    write_jsonl(file, arithmetic(41))
    assert prepare(str(file), model_folder, tmp_path / "out").folder != first.folder
    assert not prepare(str(file), model_folder, tmp_path / "out", max_seq_len=50).reused


def test_long_samples_are_dropped_and_counted(model_folder, tmp_path):
    records = arithmetic(40)
    long = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}
    file = write_jsonl(tmp_path / "a.jsonl", [*records, long])
    statistics = prepare(str(file), model_folder, tmp_path / "out", max_seq_len=200).statistics
    assert statistics["dropped_as_too_long"]["samples"] == 1
    assert statistics["dropped_as_too_long"]["tokens"] > 300
    assert statistics["longest_sample"] <= 200


def test_maximum_is_a_choice_by_hash(chats, model_folder, tmp_path):
    few = prepare(str(chats), model_folder, tmp_path, max_train_samples=10, max_validation_samples=3)
    assert few.statistics["num_train_samples"] == 10
    assert few.statistics["num_validation_samples"] == 3
    assert sources(few.folder) < sources(prepare(str(chats), model_folder, tmp_path).folder)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"messages": [', "not valid JSON"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant message"),
        ("", "holds no record"),
        ('{"messages": [{"role": "assistant", "content": "only one"}]}', "side of the split empty"),
    ],
)
def test_refused_data_leaves_nothing_behind(model_folder, tmp_path, content, problem):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(DataError, match=rf"bad\.jsonl.*{problem}"):
        prepare(str(tmp_path / "bad.jsonl"), model_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_everything_too_long_is_refused(chats, model_folder, tmp_path):
    with pytest.raises(DataError, match="every training sample is longer than max_seq_len=5"):
        prepare(str(chats), model_folder, tmp_path / "out", max_seq_len=5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", [{"max_seq_len": 1}, {"validation_fraction": 0}, {"max_train_samples": -1}])
def test_settings_out_of_range_are_refused_by_name(chats, model_folder, tmp_path, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        prepare(str(chats), model_folder, tmp_path, **setting)
