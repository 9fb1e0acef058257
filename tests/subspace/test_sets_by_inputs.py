"""Factor sets of protect="activations": what they are made of besides the bases."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from osft.data.chat import Sample
from osft.models.loading import load_model
from osft.settings.subspace import SubspaceConfig
from osft.storage.sealed import read_sealed, write_sealed
from osft.subspace.calibration import measure
from osft.subspace.factor_set import FactorsMismatchError, load_factor_set
from osft.subspace.factor_store import precompute_by_inputs
from osft.subspace.statistics import Statistics
from osft.subspace.targets import select_targets
from tests.conftest import feeding

QUARTER = SubspaceConfig(unfreeze_rank_ratio=0.25, protect="activations")


@pytest.fixture(scope="module")
def statistics(model_folder: Path) -> Statistics:
    model = load_model(model_folder, dtype=torch.float32)
    return measure(model, select_targets(model), [Sample(list(range(40)), list(range(40)))], feeding=feeding())


def test_set_of_more_parts_has_its_own_key_and_curvature_and_the_same_bases(statistics, model_folder, tmp_path):
    (part,), inputs = statistics.parts, list(statistics.inputs())
    both = Statistics([part, replace(part, name="task")], inputs)
    one, two = (
        precompute_by_inputs(model_folder, tmp_path, QUARTER, each, statistics_file="statistics/k.json")
        for each in (statistics, both)
    )
    assert (two.computed, two.bases_sha256) == (0, one.bases_sha256)
    assert two.key != one.key
    for name in one.weights:
        torch.testing.assert_close(2 * two.curvature(name), one.curvature(name))


def test_set_whose_unit_an_earlier_release_computed_is_refused_with_the_remedy(statistics, model_folder, tmp_path):
    made = precompute_by_inputs(model_folder, tmp_path, QUARTER, statistics, statistics_file="statistics/k.json")
    manifest = read_sealed(made.path, "")
    earlier = made.path.with_name("earlier.json")
    write_sealed(earlier, manifest | {"format": 2})
    with pytest.raises(FactorsMismatchError, match="earlier.json has format 2.*Run `precompute_svd` again"):
        load_factor_set(earlier)
