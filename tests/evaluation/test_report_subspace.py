"""What the report says of updates in a split by inputs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from osft.data.chat import Sample
from osft.evaluation.report.subspace import subspace_section
from osft.models.loading import load_model
from osft.settings.subspace import SubspaceConfig
from osft.subspace import select_targets
from osft.subspace.calibration import measure
from osft.subspace.factor_set import FactorSet
from osft.subspace.factor_store import precompute_by_inputs
from osft.subspace.factor_summary import summarized
from tests.conftest import feeding
from tests.evaluation.round_report import a_summary, new_training


@pytest.fixture(scope="module")
def factors(model_folder: Path, tmp_path_factory) -> FactorSet:
    model: Any = load_model(model_folder, dtype=torch.float32)
    sample = Sample(list(range(40)), list(range(40)))
    statistics = measure(model, select_targets(model), [sample], feeding=feeding())
    subspace = SubspaceConfig(unfreeze_rank_ratio=0.25, protect="activations")
    store = tmp_path_factory.mktemp("store")
    return precompute_by_inputs(model_folder, store, subspace, statistics, statistics_file="statistics/k.json")


def test_size_of_an_update_is_relative_to_its_weight_whatever_it_is_split_by(factors):
    training = new_training(factors)
    for layout in training["rank_layout"].values():
        layout |= {"update_norm": 1.0, "weight_norm": 4.0}
    section = subspace_section(summarized(factors), a_summary(training))
    assert section["largest_update"][1] == pytest.approx(0.25)
    for layout in training["rank_layout"].values():
        del layout["weight_norm"]
    assert subspace_section(summarized(factors), a_summary(training))["largest_update"] is None
