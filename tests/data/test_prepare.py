"""Prepared data: split by content, deduplicated, reused, and never half-written."""

import json
import random
import shutil

import numpy as np
import pytest
from datasets import load_from_disk

from osft.data.chat import tokenize
from osft.data.dataset_folder import load_split
from osft.data.prepare import prepare
from osft.data.record_hashes import HASH, RECORDS_FILE, contains, read_hashes, record_hash
from osft.data.records import DataError, parse_record, read_records
from tests.conftest import arithmetic, write_jsonl

LONG = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}


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
    assert twice["longest_sample_source"].startswith(str(tmp_path / "in" / "a.jsonl")), "the first one stays"
    assert twice["num_duplicates"] == once["num_duplicates"] + 40


def test_second_run_reuses_and_changed_input_does_not(model_folder, tmp_path, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", arithmetic(40))
    first = prepare(str(file), model_folder, tmp_path / "out")
    assert prepare(str(file), model_folder, tmp_path / "out").reused
    assert "data: reused" in capsys.readouterr().out
    write_jsonl(file, arithmetic(41))
    assert prepare(str(file), model_folder, tmp_path / "out").folder != first.folder
    assert not prepare(str(file), model_folder, tmp_path / "out", max_seq_len=50).reused


def test_maximum_is_a_choice_by_hash(chats, model_folder, tmp_path):
    few = prepare(str(chats), model_folder, tmp_path, max_train_samples=10, max_validation_samples=3)
    assert few.statistics["num_train_samples"] == 10
    assert few.statistics["num_validation_samples"] == 3
    assert sources(few.folder) < sources(prepare(str(chats), model_folder, tmp_path).folder)


def has_taken(folder, records) -> list[bool]:
    """Which of the records the dataset says it took."""
    hashes = np.array([record_hash(record) for record in records], HASH)
    return contains(read_hashes(folder / RECORDS_FILE), hashes).tolist()


def test_records_that_are_left_out_are_not_among_those_that_it_took(model_folder, tmp_path, caplog):
    file = write_jsonl(tmp_path / "a.jsonl", [*arithmetic(40), LONG])
    options = {"max_seq_len": 200, "max_train_samples": 10, "max_validation_samples": 2}
    few = prepare(str(file), model_folder, tmp_path / "out", **options)
    records = list(read_records(str(file)))
    used = [r.source in sources(few.folder) or r.to_dict() in held_out(few.folder) for r in records]
    assert has_taken(few.folder, records) == used
    assert len(read_hashes(few.folder / RECORDS_FILE)) == 12
    assert few.statistics["num_over_maximum"] == few.statistics["num_records"] - few.statistics["num_duplicates"] - 12
    assert "records beyond max_train_samples or max_validation_samples were left out" in caplog.messages[0]


def test_a_record_that_was_too_long_is_taken_where_there_is_room(model_folder, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [*arithmetic(9), LONG])
    records = list(read_records(str(file)))
    for max_seq_len, fits in ((200, False), (400, True)):
        prepared = prepare(str(file), model_folder, tmp_path / "o", max_seq_len=max_seq_len, validation_fraction=0)
        assert has_taken(prepared.folder, records) == [True] * 9 + [fits]


def test_a_held_out_record_that_is_too_long_is_taken_for_it_is_measured(model_folder, tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", arithmetic(9))
    validation = write_jsonl(tmp_path / "b.jsonl", [*arithmetic(3, seed=5), LONG])
    options = {"validation_fraction": 0, "validation_data": str(validation), "max_seq_len": 200}
    prepared = prepare(str(train), model_folder, tmp_path / "out", **options)
    assert len(held_out(prepared.folder)) == 4
    assert all(has_taken(prepared.folder, read_records(str(validation))))


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
    assert not any((tmp_path / "out").glob("*"))


def test_report_says_how_much_was_dropped(model_folder, tmp_path, caplog):
    file = write_jsonl(tmp_path / "a.jsonl", [*arithmetic(9), LONG])
    prepared = prepare(str(file), model_folder, tmp_path / "out", max_seq_len=200, validation_fraction=0)
    dropped, kept = prepared.statistics["dropped_as_too_long"], prepared.statistics["num_tokens"]
    assert dropped["share_of_tokens"] == dropped["tokens"] / (dropped["tokens"] + kept)
    assert caplog.messages == [
        f"data: 9 training samples ({kept} tokens, {prepared.statistics['num_loss_tokens']} with loss), 0 held out; "
        f"dropped 0 duplicates and 1 samples longer than 200 tokens ({dropped['share_of_tokens']:.1%} of all tokens)"
    ]


def test_without_a_fraction_everything_trains(chats, model_folder, tmp_path):
    prepared = prepare(str(chats), model_folder, tmp_path, validation_fraction=0)
    assert prepared.statistics["num_train_samples"] == 120 - prepared.statistics["num_duplicates"]
    assert held_out(prepared.folder) == []
    assert len(load_split(prepared.folder, "validation")) == 0


def test_duplicates_stay_on_request(model_folder, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", arithmetic(3) * 4)
    for fraction in (0, 0.5):
        options = {"validation_fraction": fraction, "deduplicate": False}
        prepared = prepare(str(file), model_folder, tmp_path / "out", **options)
        assert prepared.statistics["num_duplicates"] == 0
        held_out_samples = prepared.statistics["num_validation_samples"]
        assert held_out_samples % 4 == 0, "all of one question are on one side"
        assert prepared.statistics["num_train_samples"] == 12 - held_out_samples


def test_held_out_samples_are_tokenized_like_those_that_train(chats, model_folder, tmp_path, tokenizer):
    prepared = prepare(str(chats), model_folder, tmp_path)
    validation = load_split(prepared.folder, "validation")
    records = [parse_record(json.dumps(record), "f:1") for record in held_out(prepared.folder)]
    assert [validation[i] for i in range(len(validation))] == [tokenize(record, tokenizer) for record in records]
    assert prepared.statistics["validation"]["num_loss_tokens"] == sum(validation.num_loss_tokens)


@pytest.mark.parametrize("deduplicate", [True, False])
def test_validation_data_is_held_out_whole_and_never_trains(model_folder, tmp_path, deduplicate):
    records = arithmetic(30)
    train = write_jsonl(tmp_path / "train.jsonl", records[:20])
    validation = write_jsonl(tmp_path / "validation.jsonl", records[20:])
    options = {"validation_fraction": 0, "validation_data": str(validation), "deduplicate": deduplicate}
    prepared = prepare(str(train), model_folder, tmp_path / "out", **options)
    assert sources(prepared.folder) == {f"{train}:{line}" for line in range(1, 21)}
    assert {row["source"] for row in load_from_disk(prepared.folder / "validation")} == {
        f"{validation}:{line}" for line in range(1, 11)
    }
    assert len(held_out(prepared.folder)) == prepared.statistics["num_validation_samples"] == 10


def test_training_records_in_validation_data_are_dropped_unless_every_line_counts(model_folder, tmp_path, caplog):
    records = arithmetic(20)
    train = write_jsonl(tmp_path / "train.jsonl", records)
    validation = write_jsonl(tmp_path / "validation.jsonl", records[15:])
    options = {"validation_fraction": 0, "validation_data": str(validation)}
    prepared = prepare(str(train), model_folder, tmp_path / "out", **options)
    assert sources(prepared.folder) == {f"{train}:{line}" for line in range(1, 16)}
    all_lines = {"deduplicate": False}
    kept = prepare(str(train), model_folder, tmp_path / "out", **options, **all_lines).statistics
    assert (kept["num_train_samples"], kept["num_also_held_out"]) == (20, 5)
    assert "5 training records that validation_data holds were dropped" in caplog.messages[0]
    assert "5 training records that validation_data holds were kept" in caplog.messages[1]
    with pytest.raises(DataError, match="validation_data='.*' holds all of its records"):
        prepare(str(validation), model_folder, tmp_path / "out", validation_fraction=0, validation_data=str(train))


def test_unmasked_messages_have_loss_in_both_sides(chats, model_folder, tmp_path):
    masked = prepare(str(chats), model_folder, tmp_path).statistics
    unmasked = prepare(str(chats), model_folder, tmp_path, unmask_messages=True).statistics
    assert unmasked["num_tokens"] == masked["num_tokens"]
    assert unmasked["num_loss_tokens"] > 2 * masked["num_loss_tokens"]
    assert unmasked["validation"]["num_loss_tokens"] > 2 * masked["validation"]["num_loss_tokens"]


@pytest.mark.parametrize(
    "change", [{"deduplicate": False}, {"unmask_messages": True}, {"max_seq_len": 900}, {"validation_fraction": 0.2}]
)
def test_every_option_is_part_of_the_address(chats, model_folder, tmp_path, change):
    first = prepare(str(chats), model_folder, tmp_path)
    assert prepare(str(chats), model_folder, tmp_path, **change).folder != first.folder


def test_changed_validation_data_is_prepared_again(chats, model_folder, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", arithmetic(5, seed=7))
    options = {"validation_fraction": 0, "validation_data": str(file)}
    first = prepare(str(chats), model_folder, tmp_path / "out", **options)
    write_jsonl(file, arithmetic(5, seed=8))
    assert prepare(str(chats), model_folder, tmp_path / "out", **options).folder != first.folder


def test_changed_chat_template_is_prepared_again(chats, model_folder, tmp_path):
    first = prepare(str(chats), model_folder, tmp_path / "out")
    shutil.copytree(model_folder, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert prepare(str(chats), tmp_path / "model", tmp_path / "out").folder != first.folder


def test_everything_too_long_is_refused(chats, model_folder, tmp_path):
    with pytest.raises(DataError, match="every training sample is longer than max_seq_len=5"):
        prepare(str(chats), model_folder, tmp_path / "out", max_seq_len=5)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "setting",
    [
        {"max_seq_len": 1},
        {"validation_fraction": -0.1},
        {"validation_fraction": 1},
        {"validation_data": "held-out.jsonl"},  # beside the default fraction
        {"max_train_samples": -1},
    ],
)
def test_settings_out_of_range_are_refused_by_name(chats, model_folder, tmp_path, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        prepare(str(chats), model_folder, tmp_path, **setting)


@pytest.mark.parametrize(("fraction", "wanted"), [(0.001, False), (0.999, False), (0, True)])
def test_two_prompts_are_enough_for_both_sides(model_folder, tmp_path, fraction, wanted):
    records = [record for record in arithmetic(40) if " please" not in record["messages"][0]["content"]][:2]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    options = {"validation_fraction": fraction, "hold_out_a_prompt": wanted}
    prepared = prepare(str(file), model_folder, tmp_path / "out", **options).statistics
    assert (prepared["num_train_samples"], prepared["num_held_out_records"]) == (1, 1)


def test_one_prompt_is_refused_where_one_must_be_measured(model_folder, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", arithmetic(1) * 3)
    with pytest.raises(DataError, match="a.jsonl: the records have one prompt in all, and one to measure is needed"):
        prepare(str(file), model_folder, tmp_path / "out", validation_fraction=0, hold_out_a_prompt=True)


def test_conversions_are_counted_and_shown(model_folder, tmp_path, caplog):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    records = [{"conversations": turns, "id": 1}, {"conversations": [*turns, *turns]}, *arithmetic(3)]
    records.append({"messages": [{"role": "developer", "content": "d"}, *records[2]["messages"]]})
    file = write_jsonl(tmp_path / "a.jsonl", records)
    options = {"validation_fraction": 0}
    prepared = prepare(str(file), model_folder, tmp_path / "out", **options).statistics
    assert prepared["conversions"] == {
        "converted from ShareGPT": 2,
        "key 'id' ignored": 1,
        "role 'developer' taken as 'system'": 1,
    }
    assert caplog.messages[1:] == [
        "data: 2 records: converted from ShareGPT",
        "data: 1 record: key 'id' ignored",
        "data: 1 record: role 'developer' taken as 'system'",
    ]
