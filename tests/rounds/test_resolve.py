"""What a round starts from, and what of its data is new."""

import csv
import json
import lzma
import random
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
from datasets import Dataset, IterableDataset

from osft.data.records import DataError, read_records
from osft.rounds.resolution import ResolvedRound
from osft.rounds.resolution import resolve as resolve_round
from osft.tracking import registry
from osft.tracking.champion import promote as make_champion
from osft.tracking.lineage import LineageError
from tests.conftest import arithmetic, write_jsonl
from tests.tracking.rounds import a_lineage, new_run, register_round


@pytest.fixture
def resolve(mlflow, tmp_path, request):
    """Resolves data for the test's own model."""

    def call(data: Path | str, **changes) -> ResolvedRound:
        given = {"model_name": request.node.name, "base_model": "org/base", "storage_root": str(tmp_path / "root")}
        return resolve_round(mlflow, data_uri=str(data), **(given | changes))

    return call


@pytest.fixture
def champion(mlflow, tmp_path, request):
    """Registers and promotes a round of the test's own model that took `records`, after `parent` (version, lineage)."""

    def make(
        records: list[dict], held_out: list[dict] = (), *, parent=(None, None), promote=True, task="first", dataset=""
    ):
        version, before = parent
        folder = tmp_path / f"{task}-{version}-{promote}"
        checkpoint = str(folder / "checkpoint")
        entry = a_lineage(
            before,
            version,
            task=task,
            model_name=request.node.name,
            checkpoint=checkpoint,
            settings={"dataset": dataset},
        )
        number = register_round(mlflow, folder, entry, records, list(held_out))
        if promote:
            make_champion(mlflow, request.node.name, number, storage_root=str(tmp_path), expected_champion=version)
        return number, entry

    return make


def content(resolved: ResolvedRound) -> list[dict]:
    return [record.to_dict() for record in read_records(resolved.records)]


def by_text(records: list[dict]) -> list[str]:
    return sorted(json.dumps(record, sort_keys=True) for record in records)


RECORDS = list({json.dumps(record): record for record in arithmetic(40)}.values())


def test_the_first_round_starts_from_the_base_model_and_learns_everything(resolve, tmp_path):
    found = resolve(write_jsonl(tmp_path / "tickets.jsonl", RECORDS))
    assert (found.model, found.parent_version, found.task) == ("org/base", None, "tickets")
    assert by_text(content(found)) == by_text(RECORDS)
    assert found.nothing_to_learn == ""
    (file,) = found.data.files
    assert (found.data.num_records, found.data.num_new, file.num_records) == (len(RECORDS),) * 3
    assert ResolvedRound.from_json(found.to_json(), "") == found


def test_order_duplicates_and_files_do_not_matter(resolve, tmp_path):
    first = resolve(write_jsonl(tmp_path / "a.jsonl", RECORDS))
    shuffled = RECORDS + RECORDS[:10]
    random.Random(0).shuffle(shuffled)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "1.jsonl", shuffled[:20])
    write_jsonl(folder / "2.jsonl", shuffled[20:])
    second = resolve(folder, storage_root=str(tmp_path / "other"))
    assert Path(second.records).name == Path(first.records).name
    assert Path(second.records).read_bytes() == Path(first.records).read_bytes()
    assert (second.data.num_records, second.data.num_new) == (len(RECORDS) + 10, len(RECORDS))
    assert [file.num_records for file in second.data.files] == [20, len(RECORDS) - 10]


def test_what_any_ancestor_took_is_not_new_on_either_side_of_its_split(resolve, champion, tmp_path):
    first = champion(RECORDS[:10], RECORDS[10:15])
    second, lineage = champion(RECORDS[15:20], RECORDS[20:22], parent=first, task="second")
    found = resolve(write_jsonl(tmp_path / "all.jsonl", RECORDS))
    assert by_text(content(found)) == by_text(RECORDS[22:])
    assert found.parent_version == second
    assert found.model == lineage.checkpoint != "org/base"


def test_the_datasets_of_all_ancestors_are_named_by_their_tasks(resolve, champion, tmp_path):
    first = champion(RECORDS[:10], dataset="one")
    champion(RECORDS[10:20], parent=first, task="second", dataset="two")
    found = resolve(write_jsonl(tmp_path / "all.jsonl", RECORDS))
    data = tmp_path / "root" / "data"
    assert dict(found.earlier_data) == {"first": str(data / "one"), "second": str(data / "two")}
    assert ResolvedRound.from_json(found.to_json(), "") == found


def test_what_only_a_refused_version_took_is_new(resolve, champion, tmp_path):
    first = champion(RECORDS[:10])
    champion(RECORDS[10:30], parent=first, promote=False, task="refused")
    found = resolve(write_jsonl(tmp_path / "all.jsonl", RECORDS))
    assert found.parent_version == first[0]
    assert by_text(content(found)) == by_text(RECORDS[10:])


def test_nothing_new_ends_the_round_and_writes_nothing(resolve, champion, tmp_path):
    version, _ = champion(RECORDS)
    data = write_jsonl(tmp_path / "moved.jsonl", list(reversed(RECORDS)))
    found = resolve(data)
    assert (found.records, found.data.num_new) == ("", 0)
    assert found.nothing_to_learn.startswith(f"nothing to learn: {data} has 0 records that version {version} does not")
    assert not (tmp_path / "root").exists()


def test_fewer_than_min_new_samples_is_nothing_to_learn(resolve, champion, tmp_path):
    champion(RECORDS[3:])
    data = write_jsonl(tmp_path / "d.jsonl", RECORDS + RECORDS[:3])
    found = resolve(data, min_new_samples=4)
    assert (found.records, found.data.num_new) == ("", 3)
    assert "min_new_samples is 4" in found.nothing_to_learn
    assert resolve(data, min_new_samples=3).nothing_to_learn == ""
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="min_new_samples must be an integer of at least 1"):
            resolve(data, min_new_samples=wrong)


def test_the_answer_follows_the_champion(resolve, champion, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", RECORDS)
    assert resolve(data).data.num_new == len(RECORDS)
    champion(RECORDS)
    assert resolve(data).data.num_new == 0


def test_the_same_data_set_in_later_rounds_gets_a_task_of_its_own(resolve, champion, tmp_path):
    data = write_jsonl(tmp_path / "tickets.jsonl", RECORDS)
    first = champion(RECORDS[:5], task="tickets")
    assert resolve(data).task == "tickets-2"
    champion(RECORDS[5:9], parent=first, task="tickets-2")
    assert resolve(data).task == "tickets-3"


def test_another_base_model_than_the_champions_is_refused(resolve, champion, tmp_path):
    champion(RECORDS[:5])
    with pytest.raises(ValueError, match="descends from org/base, not from org/newer"):
        resolve(write_jsonl(tmp_path / "d.jsonl", RECORDS), base_model="org/newer")


def test_a_champion_without_its_checkpoint_is_refused(resolve, champion, tmp_path):
    _, entry = champion(RECORDS[:5])
    (Path(entry.checkpoint) / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="the checkpoint of version 1 of .* is gone"):
        resolve(write_jsonl(tmp_path / "d.jsonl", RECORDS))


def test_a_champion_without_lineage_is_refused(resolve, mlflow, tmp_path, request):
    run_id = new_run(mlflow, tmp_path / "checkpoint")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    tags = {"osft.checkpoint": "c"}
    name = request.node.name
    version = registry.register(mlflow, name, checkpoint, run_id=run_id, description="d", tags=tags)
    make_champion(mlflow, name, version, storage_root=str(tmp_path / "root"))
    with pytest.raises(LineageError, match="version 1 of .* has no lineage.json"):
        resolve(write_jsonl(tmp_path / "d.jsonl", RECORDS))


def test_a_bad_record_is_named_and_leaves_nothing(resolve, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [*RECORDS[:3], {"messages": []}])
    with pytest.raises(DataError, match=r"d\.jsonl:4: a record needs"):
        resolve(data)
    assert not (tmp_path / "root").exists()


def test_missing_data_is_refused(resolve, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="example:no-such-data"):
        resolve("example:no-such-data")
    with pytest.raises(ValueError, match="must not hold credentials"):
        resolve("s3://id:secret@bucket/data")


@pytest.mark.parametrize("offline", [True, False])
def test_a_data_set_of_a_hub_that_is_not_there_is_refused_with_the_remedy(resolve, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(FileNotFoundError, match=r"data org/name@v1 is neither a file .* give the path"):
        resolve("org/name@v1")


def test_a_folder_of_an_object_store(resolve, champion, bucket, object_store, tmp_path):
    for number, part in enumerate((RECORDS[:20], RECORDS[15:])):
        text = "".join(json.dumps(record) + "\n" for record in part)
        object_store.files.pipe_file(f"{bucket.removeprefix('s3://')}/data/{number}.jsonl", text.encode())
    first = resolve(f"{bucket}/data", storage_root=f"{bucket}/root")
    assert first.records.startswith(f"{bucket}/root/records/")
    assert [file.name for file in first.data.files] == [f"{bucket}/data/0.jsonl", f"{bucket}/data/1.jsonl"]
    written = object_store.files.cat_file(first.records.removeprefix("s3://")).decode()
    assert by_text([json.loads(line) for line in written.splitlines()]) == by_text(RECORDS)
    champion(RECORDS[:-2])
    second = resolve(f"{bucket}/data", storage_root=f"{bucket}/root")
    assert (second.task, second.data.num_new) == ("1", 2)  # the file that has them


def test_thirty_thousand_records_take_seconds(resolve, tmp_path):
    data = tmp_path / "many.jsonl"
    with data.open("w") as lines:
        for number in range(30_000):
            turns = [("user", f"What is number {number}?"), ("assistant", "one " * 60)]
            lines.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    began = time.process_time()
    assert resolve(data).data.num_new == 30_000
    assert time.process_time() - began < 6.0, "a million would take more than 200 s"


def test_a_round_has_the_name_of_the_one_file_that_is_new_in_an_inbox(resolve, champion, tmp_path):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    write_jsonl(inbox / "tickets.jsonl", RECORDS[:10])
    assert resolve(inbox / "*.jsonl").task == "tickets"
    parent = champion(RECORDS[:10], task="tickets")
    write_jsonl(inbox / "mails.jsonl", RECORDS[5:20])
    assert resolve(inbox / "*.jsonl").task == "mails"
    champion(RECORDS[10:12], parent=parent, task="mails")
    write_jsonl(inbox / "calls.jsonl", RECORDS[20:25])
    assert resolve(inbox / "*.jsonl").task == "inbox"


def test_new_records_of_one_prompt_are_refused_with_the_remedy(resolve, champion, tmp_path):
    champion(RECORDS[1:])
    asked, told = RECORDS[0]["messages"]
    one = [{"messages": [asked, told]}, {"messages": [asked, told | {"content": "neither"}]}]
    data = write_jsonl(tmp_path / "d.jsonl", RECORDS[1:] + one)
    with pytest.raises(DataError, match=r"d\.jsonl: the 2 new records have one prompt in all, .* set min_new_samples="):
        resolve(data)
    assert not (tmp_path / "root").exists()
    assert resolve(data, min_new_samples=3).nothing_to_learn


@pytest.mark.parametrize("name", ["d.json", "d.jsonl.xz", "d.csv", "d.parquet", "d"])
def test_what_is_new_does_not_depend_on_the_format(resolve, champion, tmp_path, name):
    champion(RECORDS[:20])
    path = tmp_path / name
    if name == "d.json":
        path.write_text(json.dumps(RECORDS, indent=2))
    elif name == "d.jsonl.xz":
        path.write_bytes(lzma.compress("".join(json.dumps(record) + "\n" for record in RECORDS).encode()))
    elif name == "d.csv":
        rows = [(json.dumps(record["messages"]), json.dumps(record["choices"])) for record in RECORDS]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("messages", "choices"), *rows])
    elif name == "d.parquet":
        Dataset.from_list(RECORDS).to_parquet(path)
    else:
        Dataset.from_list(RECORDS).save_to_disk(path)
    found = resolve(path)
    assert (found.task, found.data.num_records, found.data.num_new) == ("d", len(RECORDS), len(RECORDS) - 20)
    assert by_text(content(found)) == by_text(RECORDS[20:])


def test_converted_records_are_known_by_what_they_say(resolve, champion, tmp_path):
    champion([{"messages": record["messages"]} for record in RECORDS[:20]])
    pairs = [[message["content"] for message in record["messages"]] for record in RECORDS]
    forms = [
        [{"prompt": ask, "completion": tell} for ask, tell in pairs],
        [{"instruction": ask, "input": "", "output": tell} for ask, tell in pairs],
        [{"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": tell}]} for ask, tell in pairs],
    ]
    for number, rows in enumerate(forms):
        found = resolve(write_jsonl(tmp_path / f"{number}.jsonl", [row | {"id": n} for n, row in enumerate(rows)]))
        assert found.data.num_new == len(RECORDS) - 20
        assert sorted(found.conversions.values()) == [len(RECORDS)] * 2
        assert ResolvedRound.from_json(found.to_json(), "") == found


def test_records_of_the_hub_are_read_at_their_commit(resolve, champion, monkeypatch, tmp_path):
    champion(RECORDS[:20])
    rows = IterableDataset.from_generator(lambda: iter(RECORDS))
    monkeypatch.setenv("OSFT_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr("datasets.load_dataset", lambda *given, **options: rows)
    info = type("Info", (), {"sha": "d" * 40})()
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *given, **options: info)
    found = resolve("org/name@v1")
    assert (found.task, found.data.revision, found.data.num_new) == ("name", "d" * 40, len(RECORDS) - 20)
    assert by_text(content(found)) == by_text(RECORDS[20:])
