"""The sampled drift of each weight is the measured one, where the Kronecker form is not."""

from functools import cache

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from osft.data.chat import Sample
from osft.data.packing import Feeding
from osft.data.samples import SampleList
from osft.settings.subspace import SubspaceConfig
from osft.subspace.calibration import measure
from osft.subspace.model import inject, osft_layers, refresh
from osft.subspace.targets import select_targets
from osft.training.predicted_drift import DriftPrediction
from osft.training.sampled_drift import DRAWS, FEWEST_DRAWS, TRAINED_FOR_ONE, affordable_draws, sampled_drift
from tests.conftest import feeding, tiny_llama

FEEDING = Feeding(max_tokens=64, device=torch.device("cpu"))
LENGTH = 16


def counting(count: int, step: int, seed: int) -> torch.Tensor:
    """(count, LENGTH) tokens: numbers that grow by `step` or, at random, by one more."""
    generator = torch.Generator().manual_seed(seed)
    steps = step + torch.randint(2, (count, LENGTH), generator=generator)
    return (torch.randint(256, (count, 1), generator=generator) + steps.cumsum(1)) % 256


@cache
def start_weights() -> dict[str, torch.Tensor]:
    """Of a model that has learned to count by ones or twos."""
    model = tiny_llama(num_hidden_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(100):
        tokens = counting(32, 1, seed=step)
        F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def start() -> LlamaForCausalLM:
    model = tiny_llama(num_hidden_layers=1)
    model.load_state_dict(start_weights())
    return model.eval()


def own_text(count: int) -> SampleList:
    """What the start writes."""
    model, generator = start(), torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (count, 1), generator=generator)
    for _ in range(LENGTH - 1):
        with torch.no_grad():
            probabilities = model(tokens, use_cache=False).logits[:, -1].softmax(1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return SampleList([Sample(row, row) for row in tokens.tolist()])


def trained(text: SampleList) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """The start after five steps of counting by threes or fours, and the drift of each weight by the Kronecker form."""
    model = start()
    statistics = measure(model, select_targets(model), [text[i] for i in range(24)], feeding=feeding())
    config = SubspaceConfig(unfreeze_rank_ratio=0.5, protect="activations")
    inject(model, config, statistics=statistics, stiffness=100.0)
    optimizer = torch.optim.AdamW([layer.coefficients for _, layer in osft_layers(model)], lr=1e-3)
    for step in range(5):
        tokens = counting(16, 3, seed=step)
        F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        refresh(model, learning_rate=1e-3)
    moments = [pair for inputs in statistics.inputs() for pair in inputs.output_moments.items()]
    return model, DriftPrediction(model, unit=statistics.unit, output_moments=moments).by_target()


def divergence(model: LlamaForCausalLM, text: SampleList) -> float:
    """KL(start || model) in nats per token."""
    tokens = torch.tensor([text[i].input_ids for i in range(len(text.lengths))])
    with torch.no_grad():
        log_p, log_q = (m(tokens).logits[:, :-1].double().log_softmax(-1) for m in (start(), model))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def measured_alone(model: LlamaForCausalLM, text: SampleList) -> dict[str, float]:
    """The drift by each weight's update, all others being as they were."""
    layers = dict(osft_layers(model))
    updates = {name: layer.coefficients.detach().clone() for name, layer in layers.items()}
    found = {}
    for chosen in layers:
        for name, layer in layers.items():
            layer.coefficients.data.copy_(updates[name] * (name == chosen))
            layer.recompute_()
        found[chosen] = divergence(model, text)
    return found


@pytest.mark.slow
def test_sampled_drift_of_each_weight_is_the_measured_one():
    text = own_text(24)
    model, formula = trained(text)
    found = sampled_drift(model, text, FEEDING, draws=6000)
    for name, expected in measured_alone(model, text).items():
        assert found.by_target[name] == pytest.approx(expected, rel=0.1), name
        assert formula[name] != pytest.approx(expected, rel=0.1), "the Kronecker form is not as good"


def test_sampled_drift_is_about_the_measured_one_and_changes_nothing():
    text = own_text(24)
    model, formula = trained(text)
    updates = {name: layer.coefficients.detach().clone() for name, layer in osft_layers(model)}
    found = sampled_drift(model, text, FEEDING, draws=600)
    assert found.draws == 600
    for name, layer in osft_layers(model):
        assert torch.equal(layer.coefficients, updates[name])
        assert layer.coefficients.grad is None
    expected = measured_alone(model, text)
    assert found.by_target == pytest.approx(expected, rel=0.4)
    assert sum(found.by_target.values()) == pytest.approx(sum(expected.values()), rel=0.15)
    assert sum(formula.values()) < 0.85 * sum(expected.values())


def test_error_is_what_seeds_differ_by():
    text = own_text(24)
    model, _ = trained(text)
    by_seed = [sampled_drift(model, text, FEEDING, seed=seed, draws=48) for seed in range(12)]
    values = torch.tensor([list(found.by_target.values()) for found in by_seed])
    spread = (values.std(0) / values.mean(0)).square().mean().sqrt().item()
    errors = torch.tensor([found.relative_error for found in by_seed])
    assert errors.mean().item() == pytest.approx(spread, rel=0.35)


def test_draws_take_a_share_of_the_training_or_are_left_out():
    text = own_text(4)
    assert affordable_draws(text, 10**9) == DRAWS
    assert affordable_draws(text, TRAINED_FOR_ONE * LENGTH * FEWEST_DRAWS) == FEWEST_DRAWS
    assert affordable_draws(text, TRAINED_FOR_ONE * LENGTH * FEWEST_DRAWS - 1) == 0
