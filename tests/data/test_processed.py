"""Tokenized data is taken over as it is, or refused with its place."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_from_disk

from osft.data.chat import IGNORE, Sample
from osft.data.dataset_folder import load_split
from osft.data.prepare import prepare
from osft.data.processed import import_processed, read_rows
from osft.data.processed_row import check_row
from osft.data.records import DataError
from tests.conftest import write_jsonl
from tests.data.test_dataset_folder import samples

SIZES = {"max_seq_len": 64, "vocabulary_size": 258}


def rows(count: int, seed: int = 0) -> list[dict]:
    learnable = (sample for sample in samples(10 * count, seed) if sample.num_loss_tokens)
    return [{"input_ids": s.input_ids, "labels": s.labels} for s, _ in zip(learnable, range(count), strict=False)]


def read(folder, side="train") -> list[Sample]:
    split = load_split(folder, side)
    return [split[i] for i in range(len(split))]


def stored(made: list[dict], form: str, path) -> str:
    """The rows in one of the forms that are read; returns their path."""
    if form == "jsonl":
        return str(write_jsonl(path.with_suffix(".jsonl"), made))
    if form == "datasets":
        Dataset.from_list(made).save_to_disk(path)
        return str(path)
    path.mkdir()
    if form == "parquet":
        Dataset.from_list(made).to_parquet(path / "a.parquet")
        return str(path / "a.parquet")
    Dataset.from_list(made[:7]).to_parquet(path / "a.parquet")
    write_jsonl(path / "b.jsonl", made[7:])
    return str(path)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "datasets", "folder"])
def test_samples_come_back_in_order(tmp_path, form):
    made = rows(20)
    prepared = import_processed(stored(made, form, tmp_path / "data"), tmp_path / "out", **SIZES)
    assert read(prepared.folder) == [Sample(row["input_ids"], row["labels"]) for row in made]
    assert prepared.statistics["num_records"] == prepared.statistics["num_train_samples"] == 20


@pytest.mark.parametrize("form", ["jsonl", "parquet", "datasets"])
def test_what_was_exported_from_a_prepared_dataset_comes_back(chats, model_folder, tmp_path, form):
    prepared = prepare(str(chats), model_folder, tmp_path / "prepared", validation_fraction=0)
    made = [
        {"input_ids": s.input_ids, "labels": s.labels, "len": len(s.input_ids), "num_loss_counted_tokens": count}
        for s, count in zip(read(prepared.folder), load_split(prepared.folder, "train").num_loss_tokens, strict=True)
    ]
    imported = import_processed(stored(made, form, tmp_path / "data"), tmp_path / "out", **SIZES | {"max_seq_len": 512})
    assert read(imported.folder) == read(prepared.folder)
    for name in ("num_tokens", "num_loss_tokens", "longest_sample"):
        assert imported.statistics[name] == prepared.statistics[name]


def test_prepared_folder_is_used_as_it_is(chats, model_folder, tmp_path):
    prepared = prepare(str(chats), model_folder, tmp_path / "prepared")
    same = import_processed(str(prepared.folder), tmp_path / "out", max_seq_len=5, vocabulary_size=258)
    assert (same.folder, same.statistics, same.reused) == (prepared.folder, prepared.statistics, True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="has a held-out side|held-out side of its own"):
        import_processed(str(prepared.folder), tmp_path / "out", **SIZES, validation_fraction=0.1)
    with pytest.raises(DataError, match="its train side has token 25., but the model's vocabulary has 200"):
        import_processed(str(prepared.folder), tmp_path / "out", max_seq_len=64, vocabulary_size=200)


def test_long_samples_are_dropped_and_counted(tmp_path, caplog):
    made = rows(50)
    long = [len(row["labels"]) for row in made if len(row["labels"]) > 20]
    prepared = import_processed(
        stored(made, "jsonl", tmp_path / "data"),
        tmp_path / "out",
        max_seq_len=20,
        vocabulary_size=258,
    )
    share = sum(long) / sum(len(row["labels"]) for row in made)
    dropped = {"samples": len(long), "tokens": sum(long), "share_of_tokens": share}
    assert prepared.statistics["dropped_as_too_long"] == dropped
    assert f"dropped {len(long)} samples longer than 20 tokens ({share:.1%} of all tokens)" in caplog.messages[0]


def test_everything_too_long_is_refused(tmp_path):
    path = stored(rows(5), "jsonl", tmp_path / "data")
    made = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    held_out = stored([made], "jsonl", tmp_path / "held-out")
    with pytest.raises(DataError, match="data.jsonl: every training sample is longer than max_seq_len=2"):
        import_processed(stored([made] * 3, "jsonl", tmp_path / "data"), tmp_path / "out", **SIZES | {"max_seq_len": 2})
    stored([{"input_ids": [1, 2], "labels": [1, 2]}], "jsonl", tmp_path / "data")
    with pytest.raises(DataError, match="held-out.jsonl: every validation sample is longer than max_seq_len=2"):
        import_processed(path, tmp_path / "out", **SIZES | {"max_seq_len": 2}, validation_data=held_out)
    assert not list((tmp_path / "out").iterdir())


def test_every_sample_is_on_one_side_whatever_the_order(tmp_path):
    made = rows(100)
    options = SIZES | {"validation_fraction": 0.3}
    first = import_processed(stored(made, "jsonl", tmp_path / "a"), tmp_path / "out", **options)
    second = import_processed(stored(made[::-1], "jsonl", tmp_path / "b"), tmp_path / "out", **options)
    everything = [Sample(row["input_ids"], row["labels"]) for row in made]
    for side in ("train", "validation"):
        assert read(first.folder, side) == read(second.folder, side)[::-1]
        assert read(first.folder, side) == [sample for sample in everything if sample in read(first.folder, side)]
    assert len(read(first.folder)) + len(read(first.folder, "validation")) == 100
    assert 10 < first.statistics["num_validation_samples"] < 50


def test_validation_data_never_trains(tmp_path):
    train, validation = rows(20, seed=1), rows(10, seed=2)
    path = stored(validation, "parquet", tmp_path / "validation")
    prepared = import_processed(
        stored(train, "jsonl", tmp_path / "train"), tmp_path / "out", **SIZES, validation_data=path
    )
    assert read(prepared.folder) == [Sample(row["input_ids"], row["labels"]) for row in train]
    assert read(prepared.folder, "validation") == [Sample(row["input_ids"], row["labels"]) for row in validation]
    assert load_from_disk(prepared.folder / "validation")["source"][:2] == [f"{path}: row 1", f"{path}: row 2"]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "datasets"])
def test_second_run_reuses_and_changed_data_does_not(tmp_path, form):
    path = stored(rows(20), form, tmp_path / "a")
    first = import_processed(path, tmp_path / "out", **SIZES)
    assert import_processed(path, tmp_path / "out", **SIZES).reused
    assert import_processed(stored(rows(21), form, tmp_path / "b"), tmp_path / "out", **SIZES).folder != first.folder
    for change in ({"max_seq_len": 63}, {"vocabulary_size": 300}, {"validation_fraction": 0.2}):
        assert import_processed(path, tmp_path / "out", **SIZES | change).folder != first.folder


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"tokens": [1], "labels": [1]}, "needs input_ids; its columns are 'tokens', 'labels'"),
        ({"messages": []}, "needs input_ids and labels; its columns are 'messages'"),
        ({"input_ids": [], "labels": []}, r"input_ids must be a non-empty list of integers; got \[\]"),
        ({"input_ids": 5, "labels": [1]}, "input_ids must be a non-empty list of integers; got 5"),
        ({"input_ids": [1, 2.5], "labels": [1, 2]}, r"input_ids\[1\] must be an integer; got 2.5"),
        ({"input_ids": [1, True], "labels": [1, 2]}, r"input_ids\[1\] must be an integer; got True"),
        ({"input_ids": [1, 2], "labels": [1, None]}, r"labels\[1\] must be an integer; got None"),
        ({"input_ids": [1, 1 << 70], "labels": [1, 2]}, "input_ids has a number that no token can have"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "there are 3 input_ids, but 2 labels"),
        ({"input_ids": [1, 258], "labels": [1, 2]}, r"input_ids\[1\] must be a token .* 0 to 257; got 258"),
        ({"input_ids": [-100, 2], "labels": [1, 2]}, r"input_ids\[0\] must be a token .* 0 to 257; got -100"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, r"labels\[1\] must be a token .* 0 to 257, or -100; got -1"),
        ({"input_ids": [1, 2], "labels": [1, 258]}, r"labels\[1\] must be a token"),
        ({"input_ids": [1, 2], "labels": [1, IGNORE]}, "no label after the first one counts"),
        ({"input_ids": [1, 2], "labels": [1, 2], "len": 3}, "len is 3, but the record has 2"),
        (
            {"input_ids": [1, 2, 3], "labels": [IGNORE, 2, 3], "num_loss_counted_tokens": 3},
            "num_loss_counted_tokens is 3, but the record has 2",
        ),
        ({"input_ids": [1, 2], "labels": [1, 2], "len": [2]}, r"len is \[2\], but the record has 2"),
    ],
)
def test_bad_record_is_refused_with_its_place(tmp_path, row, problem):
    file = write_jsonl(tmp_path / "a.jsonl", [*rows(2), row])
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{problem}"):
        import_processed(str(file), tmp_path / "out", **SIZES)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("form", ["parquet", "datasets"])
def test_bad_row_is_refused_with_its_number(tmp_path, form):
    path = stored([*rows(1500), {"input_ids": [1, 999], "labels": [1, 2]}], form, tmp_path / "data")
    with pytest.raises(DataError, match=rf"{path}.*: row 1501: input_ids\[1\] must be a token .* got 999"):
        import_processed(path, tmp_path / "out", **SIZES)


def test_bad_line_of_validation_data_is_refused(tmp_path):
    path = stored(rows(3), "jsonl", tmp_path / "data")
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"input_ids": [1], "labels": [1]}])
    with pytest.raises(DataError, match=r"bad\.jsonl:1: no label"):
        import_processed(path, tmp_path / "out", **SIZES, validation_data=str(bad))


@pytest.mark.parametrize("counted", [2, 3])
def test_a_first_token_with_a_label_may_be_counted_or_not(tmp_path, counted):
    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "len": 3, "num_loss_counted_tokens": counted}
    path = stored([row], "jsonl", tmp_path / "data")
    assert import_processed(path, tmp_path / "out", **SIZES).statistics["num_loss_tokens"] == 2


@pytest.mark.parametrize("setting", [{"max_seq_len": 1}, {"vocabulary_size": 0}, {"validation_fraction": 1.0}])
def test_settings_out_of_range_are_refused_by_name(tmp_path, setting):
    path = stored(rows(3), "jsonl", tmp_path / "data")
    with pytest.raises(ValueError, match=next(iter(setting))):
        import_processed(path, tmp_path / "out", **SIZES | setting)


PLAIN = {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORE, IGNORE, 7, 8, 9]}


def padded(left: int = 0, right: int = 0, **columns: object) -> dict:
    """PLAIN with padding, and an attention mask that says so."""
    return {
        "input_ids": [0] * left + PLAIN["input_ids"] + [0] * right,
        "labels": [IGNORE] * left + PLAIN["labels"] + [IGNORE] * right,
        "attention_mask": [0] * left + [1] * 5 + [0] * right,
    } | columns


def imported(tmp_path, row: dict, form: str = "jsonl", **settings: object):
    return import_processed(stored([row], form, tmp_path / "data"), tmp_path / "out", **SIZES | settings)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "datasets"])
def test_padding_is_left_out_as_the_mask_says(tmp_path, form):
    made = [padded(), padded(3), padded(0, 4), padded(2, 2), padded(1, 0)]
    prepared = import_processed(stored(made, form, tmp_path / "data"), tmp_path / "out", **SIZES)
    assert read(prepared.folder) == [Sample(PLAIN["input_ids"], PLAIN["labels"])] * 5
    assert prepared.statistics["longest_sample"] == 5


@pytest.mark.parametrize(
    "columns",
    [
        {"attention_mask": [False, False, True, True, True, True, True, False]},
        {"attention_mask": [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]},
        {"input_ids": [0.0, 0.0, 5.0, 6.0, 7.0, 8.0, 9.0, 0.0]},
        {"position_ids": [0, 0, 0, 1, 2, 3, 4, 0]},
        {"position_ids": [0, 1, 2, 3, 4, 5, 6, 7]},
        {"position_ids": [1, 1, 0, 1, 2, 3, 4, 1]},
        {"token_type_ids": [0] * 8},
        {"seq_lengths": [5], "seq_idx": [0] * 8},
        {"completion_mask": [0, 0, 0, 0, 1, 1, 1, 0]},
        {"assistant_masks": None, "position_ids": None, "token_type_ids": None},
        {"len": 8, "num_loss_counted_tokens": 3},
        {"len": 5, "num_loss_counted_tokens": 3},
        {"text": "as it was", "image": "a path"},
    ],
)
def test_columns_that_agree_change_nothing(columns):
    input_ids, labels = check_row(padded(2, 1, **columns), "f:1", 258)
    assert (input_ids.tolist(), labels.tolist()) == (PLAIN["input_ids"], PLAIN["labels"])


def test_padding_does_not_count_as_length(tmp_path):
    prepared = imported(tmp_path, padded(30, 90), max_seq_len=5)
    assert prepared.statistics["dropped_as_too_long"]["samples"] == 0


def test_labels_of_padding_are_left_out_and_counted(tmp_path, caplog):
    row = padded(0, 3) | {"labels": [*PLAIN["labels"], 0, 0, 0], "num_loss_counted_tokens": 6}
    prepared = imported(tmp_path, row)
    assert read(prepared.folder) == [Sample(PLAIN["input_ids"], PLAIN["labels"])]
    assert "data: 3 padding tokens, which attention_mask names, were left out" in caplog.messages
    assert "data: 3 labels of padding were left out with it" in caplog.messages


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (padded(2, attention_mask=[0, 0, 1, 1, 0, 1, 1]), r"attention_mask\[4\] is 0 between tokens that are attended"),
        (padded(attention_mask=[1, 0, 0, 0, 1]), r"attention_mask\[1\] is 0 between"),
        (padded(attention_mask=[0] * 5), "attention_mask is 0 everywhere"),
        (padded(attention_mask=[1, 1, 1]), "there are 5 input_ids, but 3 attention_mask"),
        (
            padded(attention_mask=[1, 1, 1, 2, 2]),
            r"attention_mask\[3\] must be 0 or 1; got 2. A number for each packed",
        ),
        (padded(attention_mask=[1, 1, 1, 1, -1]), r"attention_mask\[4\] must be 0 or 1; got -1"),
        (padded(attention_mask=[[1] * 5] * 5), "attention_mask must be one list of integers"),
        (padded(attention_mask=[1, 1, 1, 1, 0.5]), r"attention_mask\[4\] must be an integer; got 0.5"),
        (
            padded(attention_mask=[1, 1, 0, 0, 0], labels=[IGNORE] * 2 + [7, 8, 9]),
            "no label after the first one counts",
        ),
        (padded(attention_mask=[0, 0, 0, 0, 1]), "no label after the first one counts"),
        (padded(position_ids=[0, 1, 2, 0, 1]), r"position_ids\[3\] is 0 after 2: several samples are packed"),
        (padded(position_ids=[0, 1, 3, 4, 5]), r"position_ids\[2\] is 3 after 1: the tokens of a sample follow"),
        (padded(position_ids=[7, 8, 9, 10, 11]), "position_ids begin at 7; a sample begins at 0"),
        (padded(position_ids=[0, 1, 2]), "there are 5 input_ids, but 3 position_ids"),
        (padded(token_type_ids=[0, 0, 1, 1, 0]), r"token_type_ids\[2\] is 1: tokens of another type"),
        (padded(seq_idx=[0, 0, 1, 1, 1]), "seq_idx has several values: several samples are packed"),
        (padded(seq_lengths=[2, 3]), "seq_lengths has several values"),
        (padded(completion_mask=[0, 0, 0, 1, 1]), r"labels\[2\] counts, but completion_mask\[2\] is 0"),
        (padded(2, loss_mask=[1] * 6 + [0]), r"labels\[6\] counts, but loss_mask\[6\] is 0"),
        (padded(pixel_values=[0.5]), "'pixel_values' changes what a record means"),
        (padded(loss_weights=[1.0] * 5), "'loss_weights' changes what a record means"),
        (padded(labels=[6, 7, 8, 9, IGNORE]), "the labels are the next tokens. Give labels that are not shifted"),
        (padded(labels=[IGNORE, 7, 8, 9, IGNORE]), "the labels are the next tokens"),
        (padded(input_ids=[[5, 6, 7, 8, 9]]), "input_ids must be one list of integers"),
        (padded(input_ids=[5, 6, 7, 8, float("nan")]), r"input_ids\[4\] must be an integer; got nan"),
        (padded(len=4), "len is 4, but the record has 5"),
    ],
)
def test_columns_that_would_be_trained_on_wrongly_are_refused(row, problem):
    with pytest.raises(DataError, match=f"^f:1: .*{problem}"):
        check_row(row, "f:1", 258)


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "float32", "float64"])
@pytest.mark.parametrize("of", [pa.list_, pa.large_list, lambda value: pa.list_(value, 5)])
def test_any_type_that_holds_token_ids_is_read(tmp_path, kind, of):
    columns = {name: pa.array([values], of(getattr(pa, kind)())) for name, values in PLAIN.items()}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    ((source, row),) = read_rows(str(tmp_path / "a.parquet"))
    assert [part.tolist() for part in check_row(row, source, 258)] == list(PLAIN.values())


def test_a_type_that_rounds_token_ids_is_refused(tmp_path):
    columns = {name: pa.array([np.array(values, np.float16)], pa.list_(pa.float16())) for name, values in PLAIN.items()}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet: input_ids is of the type float16, which rounds"):
        list(read_rows(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("form", ["jsonl", "parquet", "datasets"])
def test_columns_that_are_not_used_are_named_once(tmp_path, form, caplog):
    made = [row | {"text": "as it was", "image": {"path": None, "bytes": "x"}} for row in rows(3)]
    prepared = import_processed(stored(made, form, tmp_path / "d"), tmp_path / "out", **SIZES)
    assert caplog.messages[1:] == ["data: these columns are not used: image, text"]
    assert prepared.statistics["unused_columns"] == ["image", "text"]


def test_columns_that_are_not_used_are_not_even_read(tmp_path):
    made = pa.table({"input_ids": [PLAIN["input_ids"]], "labels": [PLAIN["labels"]], "other": ["ab" * 5000]})
    pq.write_table(made, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    content = (tmp_path / "a.parquet").read_bytes()
    damaged = content.replace(b"ab" * 5000, b"\xff\xfe" * 5000)  # no text any more
    assert damaged != content
    (tmp_path / "a.parquet").write_bytes(damaged)
    ((_, row),) = read_rows(str(tmp_path / "a.parquet"))
    assert row == PLAIN
