"""Statistics: in which unit, stored, found again. `test_measure_onto.py` adds them up."""

import shutil
from pathlib import Path

import pytest
import torch

from osft.storage.sealed import DamagedFile
from osft.subspace.second_moment import SecondMoment
from osft.subspace.statistics import InputStatistics, Part, Statistics
from osft.subspace.statistics_store import find_statistics, load_statistics, save_statistics, statistics_key
from tests.damage import cut, flipped
from tests.subspace.test_second_moment import matrix


def part(name: str, mean_curvature=2.0, weight_rms=0.5) -> Part:
    return Part(
        name=name,
        source="a test",
        num_tokens=40,
        text_sha256=name,
        model_sha256="",
        weight_rms=weight_rms,
        mean_curvature=mean_curvature,
    )


def statistics(name="base", seed=0, n=12, energy=1.0, targets=("q", "k")) -> Statistics:
    each = InputStatistics(
        targets=targets,
        transposed=False,
        kept=SecondMoment.of(matrix(n, seed)),
        gradient_energies={target: torch.tensor(energy) for target in targets},
        output_moments={target: SecondMoment.of(matrix(5, seed + 7), 3) for target in targets},
    )
    return Statistics([part(name)], [each])


def test_unit_adds_up_the_curvatures_of_the_parts():
    """As the moments do: however many texts are carried, all together are protected as much as one."""
    (each,) = statistics().inputs()
    both = Statistics([part("a", 2.0, 0.5), part("b", 4.0, 0.7)], [each])
    assert both.unit == pytest.approx(6.0 * 0.6)


def test_hash_is_of_the_content():
    assert statistics().sha256 == statistics().sha256
    assert statistics().sha256 != statistics(energy=2.0).sha256
    assert statistics().sha256 != statistics("other").sha256


def test_stored_statistics_are_those_that_were_measured(tmp_path):
    before = Statistics([part("base"), part("task")], list(statistics().inputs()))
    after = load_statistics(save_statistics(before, tmp_path))
    assert after.parts == before.parts
    assert after.sha256 == before.sha256
    for stored, measured in zip(after.inputs(), before.inputs(), strict=True):
        assert (stored.targets, stored.transposed) == (measured.targets, measured.transposed)
        torch.testing.assert_close(stored.moment.dense(), measured.moment.dense(), atol=2e-3, rtol=0)
        assert torch.equal(stored.moment.energies, measured.moment.energies)
        assert stored.gradient_energies == measured.gradient_energies
        assert stored.output_moments.keys() == measured.output_moments.keys()
        assert torch.equal(stored.output_moments["k"].energies, measured.output_moments["k"].energies)


def test_stored_directions_turn_by_what_float16_takes_and_stay_orthonormal(tmp_path):
    (measured,) = statistics(n=200).inputs()
    (stored,) = load_statistics(save_statistics(statistics(n=200), tmp_path)).inputs()
    directions = stored.moment.basis
    torch.testing.assert_close(directions.T @ directions, torch.eye(200), atol=2e-6, rtol=0)
    assert (directions - measured.moment.basis).norm(dim=0).max() <= 5e-4


def test_equal_statistics_are_stored_once(tmp_path):
    assert save_statistics(statistics(), tmp_path) == save_statistics(statistics(), tmp_path)
    save_statistics(statistics(), tmp_path, "a-name")
    assert len(list((tmp_path / "moments").iterdir())) == 1


def test_statistics_are_found_by_what_they_are_made_of(tmp_path):
    key = statistics_key(model="a", text="b", gradients=True)
    assert key != statistics_key(model="a", text="b", gradients=False)
    assert find_statistics(tmp_path, key) is None
    path = save_statistics(statistics(), tmp_path, key)
    assert find_statistics(tmp_path, key) == path


@pytest.mark.parametrize("damage", [cut, flipped])
def test_damaged_moments_are_named_when_they_are_read(tmp_path, damage):
    path = save_statistics(statistics(), tmp_path)
    (file,) = (tmp_path / "moments").iterdir()
    damage(file)
    with pytest.raises(DamagedFile, match=f"{file.name} of q is damaged"):
        list(load_statistics(path).inputs())


def test_missing_moments_are_named(tmp_path):
    path = save_statistics(statistics(), tmp_path, "key")
    (file,) = (tmp_path / "moments").iterdir()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file.name} of q is missing"):
        load_statistics(path)
    assert find_statistics(tmp_path, "key") is None


@pytest.mark.parametrize("damage", [cut, flipped])
def test_damaged_manifest_is_named(tmp_path, damage):
    path = save_statistics(statistics(), tmp_path, "key")
    damage(Path(path))
    with pytest.raises(DamagedFile, match="key.json is damaged"):
        load_statistics(path)


def test_statistics_in_an_object_store_are_read_from_an_empty_scratch_folder(bucket, tmp_path):
    path = save_statistics(statistics(), f"{bucket}/store")
    shutil.rmtree(tmp_path / "scratch")
    (found,), (expected,) = load_statistics(path).inputs(), statistics().inputs()
    assert torch.equal(found.moment.energies, expected.moment.energies)
