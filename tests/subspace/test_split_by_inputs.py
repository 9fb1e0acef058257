"""The split by what a layer is fed: nothing changes on protected inputs, and stiffness holds back by degree."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from osft.subspace.decomposition import Factors, SplitKind, split_by_inputs, unfrozen_rank
from osft.subspace.experts import OSFTExperts
from osft.subspace.linear import OSFTLinear
from osft.subspace.second_moment import SecondMoment

INPUTS, OUTPUTS, KNOWN = 24, 40, 15
"""Of the layer's inputs, as many directions carry what it knows."""


def known_inputs(tokens: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(INPUTS, KNOWN, generator=generator))[0]
    return torch.randn(tokens, KNOWN, generator=generator) @ directions.T


def split(x: torch.Tensor, ratio: float, kind: SplitKind, *, unit: float = 1.0) -> Factors:
    shape = (OUTPUTS, INPUTS) if kind == "right" else (INPUTS, OUTPUTS)
    moment = SecondMoment.of(x.T @ x / len(x))
    rank = unfrozen_rank(shape, ratio, kind)
    return split_by_inputs(moment, rank, kind, gradient_energy=torch.tensor(1.0), unit=unit)


def make_layer(kind: SplitKind, factors: Factors, *, stiffness: float = 0.0) -> OSFTLinear:
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS) if kind == "right" else Conv1D(OUTPUTS, INPUTS)
    basis = factors.right if kind == "right" else factors.left
    assert basis is not None
    layer = OSFTLinear(linear, rank=basis.shape[-1], split_kind=kind, stiffness=stiffness)
    layer.fill_(factors)
    return layer


def train(layer: OSFTLinear, x: torch.Tensor, *, steps: int = 50, lr: float = 1e-2) -> None:
    target = torch.randn(len(x), OUTPUTS, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([layer.coefficients], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.refresh_(lr)


@pytest.mark.parametrize("kind", ["right", "left"])
def test_output_on_protected_inputs_does_not_change_while_new_ones_are_learned(kind):
    x, new = known_inputs(), torch.randn(64, INPUTS, generator=torch.Generator().manual_seed(3))
    layer = make_layer(kind, split(x, 0.375, kind))
    before, before_new = layer(x).detach(), layer(new).detach()
    train(layer, new)
    assert (layer(new) - before_new).norm() > 0.1 * before_new.norm(), "nothing was learned, so the test shows nothing"
    assert (layer(x) - before).norm() <= 1e-6 * before.norm()


@pytest.mark.parametrize("kind", ["right", "left"])
def test_gradient_is_that_of_the_dense_weight_in_the_free_directions(kind):
    factors = split(known_inputs(), 0.5, kind)
    layer = make_layer(kind, factors)
    x = torch.randn(5, 7, INPUTS)
    layer(x).sin().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_()
    product = x @ weight.T if kind == "right" else x @ weight
    (product + layer.bias).sin().sum().backward()
    expected = weight.grad @ factors.right if kind == "right" else factors.left.T @ weight.grad
    torch.testing.assert_close(layer.coefficients.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["right", "left"])
def test_one_shrink_is_the_implicit_step_on_the_penalty(kind):
    factors, lr, stiffness = split(torch.randn(200, INPUTS), 1.0, kind, unit=0.3), 0.1, 7.0
    layer = make_layer(kind, factors, stiffness=stiffness)
    with torch.no_grad():
        layer.coefficients.normal_()
    before = layer.coefficients.detach().clone()
    layer.refresh_(lr)
    after = layer.coefficients.detach()
    # after = before - lr * gradient of stiffness/2 * sum curvature * X^2 at `after`
    along = (factors.energies / 0.3)[None] if kind == "right" else (factors.energies / 0.3)[:, None]
    torch.testing.assert_close(after, before - lr * stiffness * along * after, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight, layer.base_weight + layer.update())


def test_stiffness_lowers_the_drift_of_what_is_known_and_not_of_what_is_not():
    known = torch.randn(400, INPUTS) * torch.logspace(0, -3, INPUTS)  # no direction is unused
    new = torch.randn(64, INPUTS, generator=torch.Generator().manual_seed(3))
    drift, learned = {}, {}
    for stiffness in (0.0, 100.0):
        layer = make_layer("right", split(known, 1.0, "right", unit=0.1), stiffness=stiffness)
        before, before_new = layer(known).detach(), layer(new).detach()
        train(layer, new)
        drift[stiffness] = (layer(known) - before).square().mean().item()
        learned[stiffness] = (layer(new) - before_new).square().mean().item()
    assert drift[100.0] < 0.02 * drift[0.0]
    assert learned[100.0] > 0.5 * learned[0.0]


def test_directions_that_were_not_measured_one_by_one_are_free_first():
    x = known_inputs()
    whole = x.T @ x / len(x) + 1e-3 * torch.eye(INPUTS)
    factors = split_by_inputs(
        SecondMoment.of(whole, max_rank=KNOWN), INPUTS - KNOWN, "right", gradient_energy=torch.tensor(2.0), unit=0.5
    )
    identity = torch.eye(INPUTS - KNOWN)
    torch.testing.assert_close(factors.right.T @ factors.right, identity, rtol=0, atol=1e-5)
    assert (x @ factors.right).norm() <= 1e-5 * x.norm()
    expected = torch.full((1, INPUTS - KNOWN), 2.0 * 1e-3 / 0.5)
    torch.testing.assert_close(factors.curvature, expected, rtol=0.05, atol=0)


def test_experts_are_held_back_each_by_its_own_inputs():
    energies = torch.tensor([[4.0, 1.0], [9.0, 0.5]])
    moment = SecondMoment(basis=torch.eye(2).expand(2, 2, 2).clone(), energies=energies, rest=torch.zeros(2))
    factors = split_by_inputs(moment, 1, "right", gradient_energy=torch.tensor([2.0, 3.0]), unit=1.0)
    assert factors.curvature.tolist() == [[[2.0]], [[1.5]]]
    module = nn.Module()
    module.projection = nn.Parameter(torch.randn(2, 3, 2))
    layer = OSFTExperts(module, "projection", rank=1, split_kind="right", stiffness=1.0)
    layer.fill_(factors)
    with torch.no_grad():
        layer.coefficients.fill_(1.0)
    layer.refresh_(1.0)
    torch.testing.assert_close(layer.coefficients.detach()[:, 0, 0], torch.tensor([1 / 3, 1 / 2.5]))
    assert (module.projection - layer.base_weight)[..., 0].abs().max() == 0, "the direction of most energy is frozen"
