"""The step that fits: what is measured at each scale, and which is taken."""

import pytest
import torch
from torch.nn import functional as F

from osft.data.samples import SubsetOfSamples
from osft.models.likelihood import token_nll
from osft.subspace.model import inject, osft_layers
from osft.training.fitting import TriedScale, choose, fit_step
from osft.training.loop import run
from tests.conftest import feeding, tiny_llama
from tests.training.test_distillation import TEXT, mean_divergence, random_texts, settings

DATA = random_texts(24, seed=2)
TRAIN, SELECTION = SubsetOfSamples(DATA, range(8)), SubsetOfSamples(DATA, range(8, 24))


def over_driven(**changes) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model that learned its eight texts by heart, and its whole update."""
    config = settings(distill_weight=0.0, learning_rate=3e-2, max_steps=12, **changes)
    model = inject(tiny_llama(), config.subspace)
    run(model, TRAIN, config, feeding=feeding(200), on_step=lambda _: None)
    return model, {name: layer.update().clone() for name, layer in osft_layers(model)}


def loss(model: torch.nn.Module) -> float:
    with torch.no_grad():
        total = sum(token_nll(model, batch).sum().item() for _, batch in feeding(60).batches(SELECTION))
    return total / sum(SELECTION.num_loss_tokens)


def fitted(model: torch.nn.Module, max_tokens: int = 200, **changes):
    return fit_step(model, settings(**changes), SELECTION, TEXT, feeding(max_tokens))


def test_each_scale_is_measured_on_the_scaled_update():
    model, update = over_driven()
    found = fitted(model, step_scales=[0.5, 1.0])
    assert found.start_loss == pytest.approx(loss(tiny_llama()), rel=1e-5)
    for tried in found.tried:
        scaled = tiny_llama()
        with torch.no_grad():
            for name, change in update.items():
                scaled.get_submodule(name).weight += tried.scale * change
        assert tried.loss == pytest.approx(loss(scaled), rel=1e-5)
        assert tried.gain == pytest.approx(loss(tiny_llama()) - loss(scaled), abs=1e-4)
        assert tried.drift == pytest.approx(mean_divergence(scaled, TEXT), rel=1e-3)


def test_model_is_left_with_the_part_of_its_update_that_was_taken():
    model, update = over_driven()
    found = fitted(model, step_scales=[0.25, 0.5], max_step_drift=100.0)
    assert found.scale in (0.25, 0.5)
    assert loss(model) == pytest.approx(found.chosen.loss, rel=1e-6)
    for name, layer in osft_layers(model):
        torch.testing.assert_close(layer.update(), found.scale * update[name], rtol=1e-4, atol=1e-6)


def test_whole_update_is_kept_to_the_last_bit():
    model, _ = over_driven()
    before = {name: (layer.coefficients.clone(), layer.dense_weight().clone()) for name, layer in osft_layers(model)}
    fitted(model, step_scales=[1.0], max_step_drift=100.0)
    for name, layer in osft_layers(model):
        assert torch.equal(layer.coefficients, before[name][0])
        assert torch.equal(layer.dense_weight(), before[name][1])


def test_smaller_step_of_an_over_driven_update_loses_less():
    model, _ = over_driven()
    found = fitted(model, max_step_drift=100.0)
    losses = {tried.scale: tried.loss for tried in found.tried}
    assert found.scale == min(losses, key=losses.get) < 1
    assert [tried.drift for tried in found.tried] == sorted(tried.drift for tried in found.tried)


def test_numbers_do_not_depend_on_the_size_of_micro_batches():
    one, other = (fitted(over_driven()[0], max_tokens=max_tokens) for max_tokens in (45, 1000))
    for mine, theirs in zip(one.tried, other.tried, strict=True):
        for name in ("loss", "gain", "standard_error", "drift"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-3)


def test_standard_error_is_that_of_the_differences_of_samples():
    model, _ = over_driven()
    found = fitted(model, step_scales=[1.0])
    start, differences = tiny_llama(), []
    with torch.no_grad():
        for i in range(len(SELECTION.lengths)):
            tokens = torch.tensor([SELECTION[i].input_ids])
            nll = [F.cross_entropy(m(tokens).logits[0, :-1], tokens[0, 1:], reduction="sum") for m in (start, model)]
            differences.append((nll[0] - nll[1]).item())
    # The bootstrap: samples drawn again and again from those that there are.
    gains, generator = [], torch.Generator().manual_seed(0)
    for _ in range(4000):
        drawn = torch.randint(len(differences), (len(differences),), generator=generator).tolist()
        gains.append(sum(differences[i] for i in drawn) / sum(SELECTION.num_loss_tokens[i] for i in drawn))
    assert found.tried[0].standard_error == pytest.approx(torch.tensor(gains).std().item(), rel=0.1)


def tried(scale: float, gain: float, drift: float) -> TriedScale:
    return TriedScale(scale=scale, loss=1 - gain, gain=gain, standard_error=0.1, drift=drift)


@pytest.mark.parametrize(
    ("curve", "taken"),
    [
        ([(0.25, 0.1, 0.01), (0.5, 0.3, 0.02), (1.0, 0.2, 0.04)], 0.5),
        ([(0.25, 0.1, 0.01), (0.5, 0.3, 0.06), (1.0, 0.4, 0.2)], 0.25),
        ([(0.25, 0.1, 0.06), (0.5, 0.3, 0.2), (1.0, 0.4, 0.9)], 0.25),
        ([(0.25, -0.2, 0.01), (0.5, -0.1, 0.02), (1.0, -0.3, 0.03)], 0.5),
        ([(1.0, 0.2, 0.03), (0.5, 0.2, 0.02)], 0.5),
    ],
    ids=["largest-gain", "within-the-drift", "none-within", "none-gains", "equal-gains"],
)
def test_choice(curve, taken):
    assert choose([tried(*point) for point in curve], max_drift=0.05).scale == taken


@pytest.mark.parametrize(
    ("max_drift", "reason"), [(100.0, "the largest gain|the smallest loss"), (1e-9, "the least drift, as none")]
)
def test_line_says_why(max_drift, reason):
    import re

    found = fitted(over_driven()[0], max_step_drift=max_drift)
    assert re.search(reason, found.line())
    assert "on 16 held-out samples" in found.line()


def test_run_scales_its_update_once_at_the_end():
    config = settings(distill_weight=0.0, learning_rate=3e-2, max_steps=12, fit_step=True, max_step_drift=100.0)
    model, steps = inject(tiny_llama(), config.subspace), []
    found = run(model, TRAIN, config, feeding=feeding(200), on_step=steps.append, text=TEXT, selection=SELECTION)
    whole, _ = over_driven()
    assert found == fitted(whole, max_step_drift=100.0)
    assert [step.step_scale for step in steps] == [None] * 11 + [found.scale]
    assert (steps[-1].step_gain, steps[-1].step_drift) == (found.chosen.gain, found.chosen.drift)
    for (_, mine), (_, wanted) in zip(osft_layers(model), osft_layers(whole), strict=True):
        assert torch.equal(mine.coefficients, wanted.coefficients)
