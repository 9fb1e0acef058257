"""Documents become one stream of tokens, cut into exact blocks."""

import json
import random

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer

from osft.data.dataset_folder import load_split
from osft.data.documents import prepare_documents
from osft.data.records import DataError
from tests.conftest import byte_tokenizer, write_jsonl

END = 256
"""The byte tokenizer's end-of-text token; every other token is a byte."""


def documents(*lengths: int, seed: int = 0) -> list[dict]:
    letters = random.Random(seed)
    return [{"document": "".join(letters.choices("abcdefgh", k=length))} for length in lengths]


def stream(records: list[dict], column: str = "document") -> list[int]:
    tokenizer = byte_tokenizer()
    return [token for record in records for token in [*tokenizer(record[column])["input_ids"], END]]


def blocks(folder, side="train") -> list[list[int]]:
    split = load_split(folder, side)
    return [split[i].input_ids for i in range(len(split))]


@pytest.mark.parametrize(
    ("lengths", "block_size"),
    [
        ([1], 2),
        ([63], 64),  # with its end exactly one block
        ([64], 64),
        ([3] * 50, 7),
        ([200, 1, 1, 200], 32),  # documents that span blocks
        ([random.Random(1).randrange(1, 90) for _ in range(300)], 50),  # more than one call of the tokenizer
    ],
)
def test_blocks_are_exact_and_in_the_order_of_the_stream(model_folder, tmp_path, lengths, block_size):
    records = documents(*lengths)
    file = write_jsonl(tmp_path / "a.jsonl", records)
    prepared = prepare_documents(str(file), model_folder, tmp_path / "out", block_size=block_size)
    whole = stream(records)
    assert whole.count(END) == len(lengths)
    num_blocks = len(whole) // block_size
    assert blocks(prepared.folder) == [whole[i * block_size : (i + 1) * block_size] for i in range(num_blocks)]
    assert prepared.statistics["num_train_samples"] == num_blocks
    assert prepared.statistics["num_tokens"] == num_blocks * block_size
    assert prepared.statistics["remainder_tokens"] == len(whole) - num_blocks * block_size
    assert prepared.statistics["longest_sample"] == block_size


def test_every_token_of_a_block_counts(model_folder, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", documents(100))
    prepared = prepare_documents(str(file), model_folder, tmp_path / "out", block_size=10)
    split = load_split(prepared.folder, "train")
    assert all(split[i].labels == split[i].input_ids for i in range(len(split)))
    assert split.num_loss_tokens == [9] * 10, "nothing predicts the first token"
    assert prepared.statistics["num_loss_tokens"] == 90


def test_remainder_is_reported(model_folder, tmp_path, caplog):
    file = write_jsonl(tmp_path / "a.jsonl", documents(20, 20))
    prepare_documents(str(file), model_folder, tmp_path / "out", block_size=10)
    assert caplog.messages == [
        "data: 2 documents in 4 training blocks of 10 tokens (40 tokens), 0 blocks held out; dropped the last "
        "2 tokens, which fill no block"
    ]


def test_block_is_named_after_the_document_it_begins_in(model_folder, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", documents(4, 4, 14))
    folder = prepare_documents(str(file), model_folder, tmp_path / "out", block_size=8).folder
    assert load_from_disk(folder / "train")["source"][:] == [f"{file}:1", f"{file}:2", f"{file}:3"]


def test_any_column_can_hold_the_documents(model_folder, tmp_path):
    records = [{"title": "t", "body": "ä" * 20}]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    options = {"block_size": 8, "document_column_name": "body"}
    assert (
        np.concatenate(blocks(prepare_documents(str(file), model_folder, tmp_path / "out", **options).folder)).tolist()
        == stream(records, "body")[:40]
    )


def test_end_is_not_doubled_where_the_text_has_it(model_folder, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"document": "abc<|im_end|>"}, {"document": "def"}])
    folder = prepare_documents(str(file), model_folder, tmp_path / "out", block_size=4).folder
    assert blocks(folder) == [stream([{"document": "abc"}]), stream([{"document": "def"}])]


def test_split_by_fraction_keeps_documents_whole(model_folder, tmp_path):
    records = documents(*[15] * 200)
    file = write_jsonl(tmp_path / "a.jsonl", records)
    prepared = prepare_documents(str(file), model_folder, tmp_path / "out", block_size=16, validation_fraction=0.25)
    assert 25 < prepared.statistics["num_validation_samples"] < 75
    sides = {side: {tuple(block) for block in blocks(prepared.folder, side)} for side in ("train", "validation")}
    assert not sides["train"] & sides["validation"]
    assert sides["train"] | sides["validation"] == {tuple(stream([record])) for record in records}
    held_out = [json.loads(line) for line in (prepared.folder / "validation.jsonl").read_text().splitlines()]
    assert {tuple(stream([record], "text")) for record in held_out} == sides["validation"]


def test_validation_documents_never_train(model_folder, tmp_path):
    train, validation = documents(40, 41, seed=1), documents(42, 43, seed=2)
    prepared = prepare_documents(
        str(write_jsonl(tmp_path / "a.jsonl", train)),
        model_folder,
        tmp_path / "out",
        block_size=10,
        validation_data=str(write_jsonl(tmp_path / "b.jsonl", validation)),
    )
    assert np.concatenate(blocks(prepared.folder)).tolist() == stream(train)[:80]
    assert np.concatenate(blocks(prepared.folder, "validation")).tolist() == stream(validation)[:80]
    assert prepared.statistics["num_validation_samples"] == 8


def test_second_run_reuses_and_every_change_does_not(model_folder, tmp_path):
    def key(**changes: object) -> str:
        options = {"block_size": 10} | changes
        return prepare_documents(str(file), model_folder, tmp_path / "out", **options).key

    file = write_jsonl(tmp_path / "a.jsonl", [record | {"text": "x" * 30} for record in documents(*[40] * 30)])
    other = write_jsonl(tmp_path / "b.jsonl", documents(40, seed=5))
    first = key()
    assert prepare_documents(str(file), model_folder, tmp_path / "out", block_size=10).reused
    changes = ({"block_size": 11}, {"document_column_name": "text"}, {"validation_fraction": 0.3})
    keys = [key(**change) for change in (*changes, {"validation_data": str(other)})]
    write_jsonl(file, documents(*[40] * 31))
    assert len({first, *keys, key()}) == 6


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            {"text": "a", "title": "b"},
            "there is no column 'document'; document_column_name can be one of 'text', 'title'",
        ),
        ({"document": ""}, "column 'document' must be a non-empty text; got ''"),
        ({"document": " \n"}, "column 'document' must be a non-empty text"),
        ({"document": None}, "column 'document' must be a non-empty text; got None"),
        ({"document": ["a"]}, r"column 'document' must be a non-empty text; got \['a'\]"),
    ],
)
def test_bad_document_is_refused_with_its_place(model_folder, tmp_path, record, problem):
    file = write_jsonl(tmp_path / "a.jsonl", [*documents(5, 5), record])
    with pytest.raises(DataError, match=rf"a\.jsonl:3: {problem}"):
        prepare_documents(str(file), model_folder, tmp_path / "out", block_size=4)
    assert not list((tmp_path / "out").iterdir())


def test_less_than_a_block_is_refused(model_folder, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", documents(5, 6))
    with pytest.raises(DataError, match="the 2 training documents have 13 tokens, less than .* block_size=14"):
        prepare_documents(str(file), model_folder, tmp_path / "out", block_size=14)
    many = write_jsonl(tmp_path / "b.jsonl", documents(50))
    options = {"block_size": 14, "validation_data": str(file)}
    with pytest.raises(DataError, match="a.jsonl: the 2 validation documents have 13 tokens"):
        prepare_documents(str(many), model_folder, tmp_path / "out", **options)


def test_tokenizer_without_end_is_refused(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    file = write_jsonl(tmp_path / "a.jsonl", documents(50))
    with pytest.raises(ValueError, match="has no end-of-text token"):
        prepare_documents(str(file), tmp_path / "model", tmp_path / "out", block_size=4)


@pytest.mark.parametrize(
    "setting", [{"block_size": 1}, {"block_size": True}, {"block_size": 2.5}, {"document_column_name": ""}]
)
def test_settings_out_of_range_are_refused_by_name(model_folder, tmp_path, setting):
    file = write_jsonl(tmp_path / "a.jsonl", documents(50))
    with pytest.raises(ValueError, match=next(iter(setting))):
        prepare_documents(str(file), model_folder, tmp_path, **({"block_size": 4} | setting))


def test_a_row_without_the_column_is_refused_with_its_place(model_folder, tmp_path):
    Dataset.from_list([{"document": "a"}, {"document": None}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 2: there is no column 'document'"):
        prepare_documents(str(tmp_path / "a.parquet"), model_folder, tmp_path / "out", block_size=4)
    Dataset.from_list([{"text": "a", "n": 1}]).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"row 1: .*document_column_name can be one of 'text', 'n'"):
        prepare_documents(str(tmp_path / "b.parquet"), model_folder, tmp_path / "out", block_size=4)
