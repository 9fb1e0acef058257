"""The split of a weight, what a layer learns in it, and the statistics: on CUDA as on the CPU."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from osft.data.packing import Feeding
from osft.subspace import OSFTLinear, decompose, select_targets
from osft.subspace.calibration import measure
from osft.subspace.decomposition import Factors, split_by_inputs
from osft.subspace.second_moment import SecondMoment
from tests.conftest import feeding
from tests.gpu.models import FAMILIES, build, texts
from tests.subspace.test_linear import frozen_directions

pytestmark = pytest.mark.gpu

SHAPES = [(256, 256), (512, 256), (256, 512)]
RANK = 64
STEPS, LEARNING_RATE = 20, 1e-2


def projector(basis: torch.Tensor) -> torch.Tensor:
    exact = basis.cpu().double()
    return exact @ exact.mT


def assert_same_subspaces(found: Factors, expected: Factors) -> None:
    for name in ("left", "right", "frozen"):
        mine, other = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (other is None)
        if other is not None:
            difference = (projector(mine) - projector(other)).norm() / projector(other).norm()
            assert difference < 1e-4, name


@pytest.mark.parametrize("shape", [*SHAPES, (3, 96, 64)], ids=str)
@pytest.mark.parametrize("free_subspace", ["complement", "core"])
def test_bases_span_the_subspaces_of_the_cpu(device, shape, free_subspace):
    torch.manual_seed(0)
    weight, rank = torch.randn(shape), min(shape[-2:]) // 4
    found, expected = decompose(weight.to(device), rank, free_subspace), decompose(weight, rank, free_subspace)
    assert_same_subspaces(found, expected)
    torch.testing.assert_close(found.singular_values.cpu(), expected.singular_values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["right", "left"])
@pytest.mark.parametrize("kept", [256, 96], ids=["whole", "leading-directions"])
def test_split_by_inputs_is_that_of_the_cpu(device, kind, kept):
    torch.manual_seed(0)
    x = torch.randn(1000, 256) * torch.logspace(0, -2, 256)
    moment = x.T @ x / len(x)
    found, expected = (
        split_by_inputs(
            SecondMoment.of(moment.to(place), kept),
            256 - kept if kept < 256 else RANK,  # of what is not known one by one, any basis will do
            kind,
            gradient_energy=torch.tensor(1.0, device=place),
            unit=0.1,
        )
        for place in (device, torch.device("cpu"))
    )
    assert_same_subspaces(found, expected)
    torch.testing.assert_close(found.energies.cpu(), expected.energies, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(found.curvature.cpu(), expected.curvature, rtol=1e-3, atol=1e-6)


def train(layer: OSFTLinear, x: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW([layer.coefficients], lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    for _ in range(STEPS):
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.refresh_(LEARNING_RATE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("free_subspace", ["complement", "core"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_update_stays_out_of_the_frozen_directions(device, shape, free_subspace, transposed):
    torch.manual_seed(0)
    linear = (Conv1D(shape[1], shape[0]) if transposed else nn.Linear(shape[1], shape[0])).to(device)
    layer = OSFTLinear(linear, rank=RANK, split_kind=free_subspace)
    layer.fill_(decompose(layer.dense_weight().detach(), RANK, free_subspace))
    base = layer.dense_weight().detach().clone()
    train(layer, torch.randn(64, shape[0] if transposed else shape[1], device=device))
    update = layer.update().double().cpu()
    left, right = frozen_directions(base.cpu(), RANK)
    assert update.norm() > 0.05 * base.norm(), "the layer did not learn, so the test shows nothing"
    assert (left.T @ update).norm() / update.norm() < 1e-5
    assert (update @ right).norm() / update.norm() < 1e-5
    torch.testing.assert_close(layer.dense_weight(), base + layer.update(), rtol=0, atol=1e-6)


def test_bfloat16_weight_is_the_sum_but_for_its_rounding(device):
    torch.manual_seed(0)
    layer = OSFTLinear(nn.Linear(512, 384).to(device, torch.bfloat16), rank=RANK)
    layer.fill_(decompose(layer.dense_weight().detach(), RANK))
    torch.nn.init.normal_(layer.coefficients, std=0.02)
    layer.refresh_(LEARNING_RATE)
    exact = layer.base_weight.double() + layer.update().double()
    errors = (layer.dense_weight().double() - exact).abs()
    rounding = (exact.float().bfloat16().double() - exact).abs()
    assert layer.update().norm() > 0.1 * layer.base_weight.norm(), "the update is too small to see how it is computed"
    assert errors.norm() < 1.01 * rounding.norm()


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_output_on_frozen_inputs_is_unchanged(device, transposed):
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(256, 256 - RANK))[0]
    known, new = (torch.randn(400, 256 - RANK) @ directions.T).to(device), torch.randn(400, 256, device=device)
    layer = OSFTLinear(
        (Conv1D(512, 256) if transposed else nn.Linear(256, 512)).to(device),
        rank=RANK,
        split_kind="left" if transposed else "right",
    )
    moment = SecondMoment.of(known.T @ known / len(known))
    energy = torch.tensor(1.0, device=device)
    layer.fill_(split_by_inputs(moment, RANK, layer.split_kind, gradient_energy=energy, unit=1.0))
    before, before_new = layer(known).detach(), layer(new).detach()
    train(layer, new)
    assert (layer(new) - before_new).norm() > 0.1 * before_new.norm(), "nothing was learned, so the test shows nothing"
    assert (layer(known) - before).norm() < 1e-5 * before.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_cpu(device, family):
    model, samples = build(family), texts()
    targets = select_targets(model)
    expected = measure(model, targets, samples, feeding=feeding())
    found = measure(model.to(device), targets, samples, feeding=Feeding(max_tokens=2048, device=device))
    assert found.unit == pytest.approx(expected.unit, rel=1e-2)
    for mine, other in zip(found.inputs(), expected.inputs(), strict=True):
        assert (mine.targets, mine.transposed) == (other.targets, other.transposed)
        largest = other.moment.energies.max().item()
        torch.testing.assert_close(mine.moment.energies, other.moment.energies, rtol=1e-3, atol=1e-5 * largest)
        torch.testing.assert_close(mine.moment.trace(), other.moment.trace(), rtol=1e-3, atol=0)
        for target in mine.targets:
            torch.testing.assert_close(
                mine.gradient_energies[target], other.gradient_energies[target], rtol=1e-2, atol=0, msg=target
            )
