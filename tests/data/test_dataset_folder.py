"""A dataset folder gives back what was written, one sample at a time, without being read whole."""

import json
import random
import time

import numpy as np
import pytest

from osft.data.chat import IGNORE, Sample
from osft.data.dataset_folder import BUFFERED_SAMPLES, DatasetWriter, check_dataset, find_dataset, load_split
from osft.storage.sealed import DamagedFile
from tests.damage import cut, emptied, flipped, missing


def samples(count: int, seed: int = 0) -> list[Sample]:
    numbers = random.Random(seed)
    made = []
    for _ in range(count):
        tokens = [numbers.randrange(258) for _ in range(numbers.randrange(2, 40))]
        labels = [IGNORE if numbers.random() < 0.5 else token for token in tokens]
        made.append(Sample(tokens, labels))
    return made


def write(folder, train: list[Sample], validation: list[Sample] = ()) -> dict:
    with DatasetWriter(folder) as writer:
        for split, part in ((writer.train, train), (writer.validation, validation)):
            for number, sample in enumerate(part, start=1):
                split.append(np.array(sample.input_ids, np.int32), np.array(sample.labels, np.int32), f"f:{number}")
        return writer.finish({})


@pytest.mark.parametrize("count", [1, 17, BUFFERED_SAMPLES, 2 * BUFFERED_SAMPLES + 5])
def test_samples_and_counts_come_back(tmp_path, count):
    made = samples(count)
    statistics = write(tmp_path / "d", made)
    split = load_split(tmp_path / "d", "train")
    assert [split[i] for i in range(len(split))] == made
    assert split.lengths == [len(sample.input_ids) for sample in made]
    assert split.num_loss_tokens == [sample.num_loss_tokens for sample in made]
    assert split.largest_token == max(max(sample.input_ids) for sample in made)
    assert statistics["num_tokens"] == sum(split.lengths)
    assert statistics["num_loss_tokens"] == sum(split.num_loss_tokens)
    assert statistics["longest_sample"] == max(split.lengths)
    assert statistics["longest_sample_source"] == f"f:{split.lengths.index(max(split.lengths)) + 1}"


def test_index_out_of_range_is_refused(tmp_path):
    write(tmp_path / "d", samples(5))
    split = load_split(tmp_path / "d", "train")
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"sample {index} of 5"):
            split[index]


def test_incomplete_folder_is_refused(tmp_path):
    write(tmp_path / "d", samples(5))
    (tmp_path / "d" / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match="not a prepared dataset"):
        load_split(tmp_path / "d", "train")


def test_reading_one_sample_is_cheap(tmp_path):
    write(tmp_path / "d", samples(20_000))
    split = load_split(tmp_path / "d", "train")
    order = random.Random(0).sample(range(len(split)), len(split))
    started = time.process_time()
    for index in order:
        split[index]
    per_second = len(order) / (time.process_time() - started)
    assert per_second > 20_000


FILES = ["dataset.json", "train/data-00000-of-00001.arrow", "train/state.json", "train/dataset_info.json"]


@pytest.mark.parametrize("damage", [cut, emptied, flipped, missing])
@pytest.mark.parametrize("name", FILES)
def test_damaged_dataset_is_named_and_removed_to_be_prepared_again(name, damage, tmp_path, caplog):
    folder = tmp_path / "dataset"
    write(folder, samples(20))
    assert check_dataset(folder).statistics["num_train_samples"] == 20
    assert find_dataset(str(folder)).folder == folder
    damage(folder / name)
    unmarked = (name, damage) == ("dataset.json", missing)
    with pytest.raises(FileNotFoundError if unmarked else DamagedFile, match=name):
        check_dataset(folder)
    assert find_dataset(str(folder)) is None
    assert unmarked or (name in caplog.messages[-1] and not folder.exists())


def test_dataset_of_a_release_without_hashes_is_used(tmp_path):
    write(tmp_path / "dataset", samples(5))
    file = tmp_path / "dataset" / "dataset.json"
    values = json.loads(file.read_text())
    del values["sha256"], values["written"]
    file.write_text(json.dumps(values))
    assert len(load_split(check_dataset(tmp_path / "dataset").folder, "train")) == 5
