"""The predicted drift is 1/2 tr(S D C D^T) of each layer, from its coefficients alone."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from osft.settings.subspace import SubspaceConfig
from osft.subspace.calibration import measure
from osft.subspace.model import inject, osft_layers
from osft.subspace.statistics import Statistics
from osft.subspace.targets import select_targets
from osft.training import predicted_drift
from osft.training.predicted_drift import DriftPrediction
from tests.conftest import feeding, tiny_llama
from tests.training.test_distillation import mean_divergence, random_texts

TEXT = random_texts(150, seed=5)
SAMPLES = [TEXT[i] for i in range(len(TEXT.lengths))]


def tiny_gpt2() -> GPT2LMHeadModel:
    """Its weights are stored (in_features, out_features)."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def measured(model: torch.nn.Module, samples=SAMPLES, onto: Statistics | None = None) -> Statistics:
    return measure(model, select_targets(model, None), samples, feeding=feeding(), onto=onto)


def moved(model: torch.nn.Module, statistics: Statistics, size: float, ratio: float = 0.5) -> torch.nn.Module:
    """The model with a random update of each weight in its free directions."""
    config = SubspaceConfig(unfreeze_rank_ratio=ratio, protect="activations")
    inject(model, config, statistics=statistics)
    torch.manual_seed(1)
    for _, layer in osft_layers(model):
        layer.coefficients.data.normal_(std=size)
        layer.recompute_()
    return model


def prediction(model: torch.nn.Module, statistics: Statistics) -> DriftPrediction:
    moments = [pair for inputs in statistics.inputs() for pair in inputs.output_moments.items()]
    return DriftPrediction(model, unit=statistics.unit, output_moments=moments)


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_is_the_formula(make, num_parts, monkeypatch):
    monkeypatch.setattr(predicted_drift, "OUTPUT_DIRECTIONS", 1000)
    statistics = measured(make())
    if num_parts == 2:
        statistics = measured(make(), SAMPLES[:40], onto=statistics)
    model = moved(make(), statistics, size=0.1)
    found = prediction(model, statistics).by_target()
    layers = dict(osft_layers(model))
    for inputs in statistics.inputs():
        for name in inputs.targets:
            update = layers[name].update().double()
            update = update.T if inputs.transposed else update
            c, s = inputs.moment.dense().double(), inputs.output_moments[name].dense().double()
            assert found[name] == pytest.approx(0.5 * (s @ update @ c @ update.T).trace().item(), rel=1e-3), name
    assert set(found) == set(layers)


def test_directions_of_the_output_that_are_not_known_count_by_their_mean(monkeypatch):
    statistics = measured(tiny_llama())
    model = moved(tiny_llama(), statistics, size=0.1)
    by_rank = {}
    for rank in (0, 4, 1000):
        monkeypatch.setattr(predicted_drift, "OUTPUT_DIRECTIONS", rank)
        by_rank[rank] = sum(prediction(model, statistics).by_target().values())
    # A random update lies in no direction of the output more than in others.
    assert by_rank[0] == pytest.approx(by_rank[1000], rel=0.3)
    assert by_rank[4] == pytest.approx(by_rank[1000], rel=0.2)


def test_model_that_has_not_moved_has_no_drift():
    statistics = measured(tiny_llama())
    model = moved(tiny_llama(), statistics, size=0.0)
    assert set(prediction(model, statistics).by_target().values()) == {0.0}


def test_without_gradients_all_directions_of_the_output_count_alike():
    model = tiny_llama()
    statistics = measure(model, select_targets(model, None), SAMPLES, feeding=feeding(), gradients=False)
    model = moved(tiny_llama(), statistics, size=0.1)
    found = prediction(model, statistics).by_target()
    layers = dict(osft_layers(model))
    for inputs in statistics.inputs():
        for name in inputs.targets:
            update = layers[name].update().double()
            expected = 0.5 * (update @ inputs.moment.dense().double() @ update.T).trace().item()
            assert found[name] == pytest.approx(expected, rel=1e-3)


def test_small_update_moves_the_model_by_what_is_predicted():
    """Of one layer at a time: what the layers do together is not in the formula."""
    statistics = measured(tiny_llama())
    model = moved(tiny_llama(), statistics, size=0.01)
    layers = dict(osft_layers(model))
    updates = {name: layer.coefficients.detach().clone() for name, layer in layers.items()}
    for chosen in ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        for name, layer in layers.items():
            layer.coefficients.data.copy_(updates[name] * (name == chosen))
            layer.recompute_()
        found = prediction(model, statistics).by_target()
        assert sum(found.values()) == found[chosen]
        assert mean_divergence(model, TEXT) == pytest.approx(found[chosen], rel=0.15)
