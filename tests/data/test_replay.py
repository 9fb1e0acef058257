"""Samples of earlier data: as many as asked for, from all of it, never one that is held out."""

from pathlib import Path

import numpy as np
import pytest

from osft.data.chat import Sample
from osft.data.dataset_folder import PreparedData, TokenizedSplit, load_split
from osft.data.replay import draw_replay
from osft.data.samples import JoinedSamples
from tests.data.test_dataset_folder import write


def numbered(numbers: range, length: int = 4) -> list[Sample]:
    """Samples that are told apart by their tokens: all of them its number."""
    return [Sample([number] * length, [number] * length) for number in numbers]


def dataset(folder: Path, train: list[Sample], validation: list[Sample] = ()) -> PreparedData:
    folder.parent.mkdir(exist_ok=True)
    statistics = write(folder, train, validation) | {"data_uri": f"{folder.name}.jsonl"}
    return PreparedData(folder, statistics, reused=False)


@pytest.fixture
def draw(tmp_path, capsys):
    """Draws from earlier datasets for 95 new samples; returns the numbers of what was drawn."""
    new = dataset(tmp_path / "new", numbered(range(1000, 1095)), numbered(range(10)))

    def call(*earlier: PreparedData, ratio: float = 0.05, seed: int = 0, data: PreparedData = new) -> list[int]:
        drawn = draw_replay(data, earlier, tmp_path / "out", ratio=ratio, seed=seed, max_seq_len=8)
        return [sample.input_ids[0] for sample in contents(drawn)] if drawn else []

    return call


def contents(drawn: PreparedData) -> list[Sample]:
    split = load_split(drawn.folder, "train")
    return [split[index] for index in range(len(split))]


@pytest.mark.parametrize(("ratio", "expected"), [(0.01, 1), (0.05, 5), (0.5, 95), (0.001, 0)])
def test_drawn_samples_are_the_asked_for_share_of_all(draw, tmp_path, ratio, expected):
    assert len(draw(dataset(tmp_path / "a", numbered(range(100, 300))), ratio=ratio)) == expected


def test_small_datasets_have_their_turn(draw, tmp_path):
    large, small = (dataset(tmp_path / name, numbered(numbers)) for name, numbers in NAMED.items())
    drawn = draw(large, small, ratio=0.2)
    assert len(drawn) == 24
    assert sum(number >= 600 for number in drawn) == 10, "all of the small one"
    assert len(set(drawn)) == 24


NAMED = {"large": range(100, 600), "small": range(600, 610)}


def test_what_is_held_out_anywhere_is_not_replayed(draw, tmp_path):
    first = dataset(tmp_path / "first", numbered(range(20)), numbered(range(30, 40)))
    second = dataset(tmp_path / "second", numbered(range(20, 50)))
    drawn = draw(first, second, ratio=0.9)
    held_out = {*range(10), *range(30, 40)}
    assert sorted(drawn) == [number for number in range(50) if number not in held_out]


def test_too_long_samples_are_not_replayed(draw, tmp_path):
    data = dataset(tmp_path / "a", numbered(range(50, 60), length=9) + numbered(range(60, 70), length=8))
    assert sorted(draw(data, ratio=0.9)) == list(range(60, 70))


def test_the_draw_depends_on_seed_and_contents_and_on_nothing_else(draw, tmp_path):
    data = dataset(tmp_path / "a", numbered(range(100, 300)))
    moved = dataset(tmp_path / "elsewhere" / "a", numbered(range(100, 300)))
    other = dataset(tmp_path / "other", numbered(range(2000, 2095)))
    drawn = draw(data)
    assert draw(moved) == drawn
    assert draw(data, seed=1) != drawn
    assert draw(data, data=other) != drawn, "another round replays other samples"


def test_the_line_says_what_is_replayed_also_when_it_is_found_again(draw, tmp_path, capsys):
    sources = [dataset(tmp_path / "a", numbered(range(100, 102))), dataset(tmp_path / "b", numbered(range(200, 201)))]
    for _ in range(2):
        draw(*sources)
        assert capsys.readouterr().out == (
            "replay: 3 samples (12 tokens) of earlier data, 3.1% of all that train: 2 of a.jsonl, 1 of b.jsonl; 5 were "
            "asked for, and there are no more\n"
        )


def test_nothing_to_replay_is_nothing_every_time(draw, tmp_path):
    held_out = dataset(tmp_path / "a", numbered(range(5)))
    assert draw(held_out) == draw(held_out) == []


def test_joined_samples_are_one_after_the_other(tmp_path):
    for name, numbers in {"a": range(3), "b": range(3, 5)}.items():
        write(tmp_path / name, numbered(numbers, length=2 + len(numbers)))
    joined = JoinedSamples(
        [load_split(tmp_path / "a", "train"), TokenizedSplit(None), load_split(tmp_path / "b", "train")]
    )
    assert [joined[index].input_ids[0] for index in range(len(joined.lengths))] == list(range(5))
    assert joined.lengths == [5, 5, 5, 4, 4]
    assert joined.num_loss_tokens == [4, 4, 4, 3, 3]
    with pytest.raises(IndexError):
        joined[5]


def test_source_of_a_sample_is_kept(draw, tmp_path):
    from datasets import load_from_disk

    data = dataset(tmp_path / "a", numbered(range(100, 104)))
    new = dataset(tmp_path / "n", numbered(range(9)))
    drawn = draw_replay(new, [data], tmp_path / "out", ratio=0.5, seed=0, max_seq_len=8)
    rows = load_from_disk(drawn.folder / "train")
    assert {row["source"]: row["input_ids"][0] for row in rows} == {f"f:{n + 1}": 100 + n for n in range(4)}
    assert np.sum([part["num_tokens"] for part in drawn.statistics["sources"]]) == drawn.statistics["num_tokens"]
