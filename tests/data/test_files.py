"""Which files a data path names."""

import gzip
import json

import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from osft.data.files import DataError, check_names, data_files, data_name, is_hub_dataset
from osft.data.records import read_records

LINE = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def make(folder, *names: str):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(LINE.encode()) if name.endswith(".gz") else LINE.encode())
    return folder


def names(folder, uri="") -> list[str]:
    return [str(file.relative_to(folder)) for file in data_files(uri or str(folder))]


def test_a_folder_is_its_data_files_of_every_format_and_depth(tmp_path):
    data = ["a.jsonl", "b.json", "c.ndjson", "d.jsonl.gz", "week-1/e.csv", "week-1/f.tsv.xz", "week-2/x/g.parquet"]
    about = [".gitattributes", "README.md", "LICENSE", "_SUCCESS", ".cache/z.jsonl", "dataset_infos.json", "h.md"]
    make(tmp_path, *data, *about, "i.jsonl.incomplete-01234567")
    assert names(tmp_path) == sorted(data)


@pytest.mark.parametrize("name", ["notes.txt", "a.xlsx", "a.jsonl.part", "week-1/b.yaml", "data.zip", "noname"])
def test_a_file_that_is_no_data_is_named_and_not_passed_over(tmp_path, name):
    make(tmp_path, "a.jsonl", name)
    with pytest.raises(DataError, match=f"holds {name}, which is no data that can be read"):
        data_files(str(tmp_path))
    assert names(tmp_path, f"{tmp_path}/*.jsonl") == ["a.jsonl"]


@pytest.mark.parametrize(
    "splits",
    [
        ("train.jsonl", "test.jsonl"),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("train/a.jsonl", "dev/a.jsonl"),
        ("data/train_1.csv", "data/eval.csv"),
        ("train.jsonl.gz", "val.jsonl.gz"),
    ],
)
def test_what_measures_is_not_read_with_what_trains(tmp_path, splits):
    make(tmp_path, *splits)
    with pytest.raises(DataError, match=f"several splits: {splits[0]} and {splits[1]}. Give the one to train"):
        data_files(str(tmp_path))
    assert names(tmp_path, f"{tmp_path}/{splits[0]}") == [splits[0]]


def test_names_that_only_begin_like_splits_are_none(tmp_path):
    assert len(names(make(tmp_path, "train.jsonl", "testimony.jsonl", "evaluations.jsonl"))) == 3
    assert len(names(make(tmp_path / "b", "test.jsonl", "more.jsonl"))) == 2


def test_a_dataset_dict_of_several_splits_is_refused_with_their_names(tmp_path):
    part = Dataset.from_list([json.loads(LINE)])
    DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="holds several datasets: train, test. Give one of them, .*/both/train"):
        data_files(str(tmp_path / "both"))
    assert len(list(read_records(str(tmp_path / "both" / "train")))) == 1
    DatasetDict({"train": part}).save_to_disk(tmp_path / "one")
    assert len(list(read_records(str(tmp_path / "one")))) == 1


def test_a_dataset_folder_without_one_of_its_files_is_refused(tmp_path):
    Dataset.from_list([json.loads(LINE)] * 4).save_to_disk(tmp_path, num_shards=2)
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="data-00001-of-00002.arrow, which its state.json names, is not there"):
        data_files(str(tmp_path))


def test_a_folder_without_data_and_a_missing_path_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no data file"):
        data_files(str(make(tmp_path / "a", "README.md")))
    for uri in ("missing.jsonl", "missing/b.parquet", "*.csv"):
        with pytest.raises(FileNotFoundError, match="does not exist. Give a file"):
            data_files(str(tmp_path / uri))


def test_an_id_of_the_hub_is_told_from_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(make(tmp_path, "here/data.csv", "here/folder/a.jsonl"))
    assert is_hub_dataset("org/name")
    assert is_hub_dataset("org/name.v2@refs/pr/1")
    for path in ("here/data.csv", "here/folder", "no/such.jsonl", "no/such.jsonl.zst", "a/b/c", "s3://a/b", "name"):
        assert not is_hub_dataset(path), path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that has `org/name` at one commit; counts how often its rows were asked for."""
    asked: list[dict] = []
    rows = [json.loads(LINE) | {"id": number} for number in range(3)]

    def load(dataset: str, **options: object) -> IterableDataset:
        asked.append({"dataset": dataset, **options})
        return IterableDataset.from_generator(lambda: iter(rows))

    def info(self: object, dataset: str, revision: str | None = None) -> object:
        return type("Info", (), {"sha": "c" * 40})()

    monkeypatch.setenv("OSFT_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    return asked


def test_a_data_set_of_the_hub_is_fetched_once_a_commit(hub):
    records = list(read_records("org/name@v1"))
    assert [record.source for record in records] == [
        f"hf://datasets/org/name@{'c' * 40}/train.parquet: row {number}" for number in (1, 2, 3)
    ]
    assert list(read_records("org/name")) == records, "the same commit"
    assert hub == [{"dataset": "org/name", "revision": "c" * 40, "split": "train", "streaming": True}]


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("in/news.jsonl", "news"),
        ("in/news.jsonl.gz", "news"),
        ("in/news.parquet", "news"),
        ("in/week-47/*.jsonl", "week-47"),
        ("in/week-47", "week-47"),
        ("example:web-text", "web-text"),
    ],
)
def test_data_is_named_after_its_file_or_folder(uri, name):
    assert data_name(uri) == name


def test_two_sets_of_one_name_are_refused():
    check_names(["a/x.jsonl", "b/y.jsonl"])
    with pytest.raises(DataError, match=r"called 'x' \(a/x.jsonl, b/x.csv.gz\)"):
        check_names(["a/x.jsonl", "b/x.csv.gz"])
