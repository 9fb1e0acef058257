"""Stacked experts: each has a split of its own, whatever way the module reads its parameter."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3MoeForCausalLM

from osft.settings.subspace import SubspaceConfig
from osft.subspace import OSFTExperts, decompose, inject, merge, osft_layers, select_targets
from tests.architectures import small_config
from tests.subspace.test_linear import SHAPES, SUBSPACES, frozen_directions

NUM_EXPERTS, RANK = 3, 6


class Experts(nn.Module):
    """Each expert multiplies its share of the tokens, by the shape of its weight as it is stored."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.randn(NUM_EXPERTS, *shape) / shape[0] ** 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part @ self.projection[i] for i, part in enumerate(x.chunk(NUM_EXPERTS))])


def make_experts(shape: tuple[int, int], free_subspace: str) -> tuple[Experts, OSFTExperts]:
    torch.manual_seed(0)
    experts = Experts(shape)
    layer = OSFTExperts(experts, "projection", rank=RANK, split_kind=free_subspace)
    layer.fill_(decompose(experts.projection.detach(), RANK, free_subspace))
    return experts, layer


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("free_subspace", SUBSPACES)
def test_update_of_every_expert_stays_orthogonal_to_its_own_frozen_directions(shape, free_subspace):
    experts, layer = make_experts(shape, free_subspace)
    base = experts.projection.clone()
    optimizer = torch.optim.AdamW([layer.coefficients], lr=1e-2, weight_decay=0.1)
    for _ in range(20):
        experts(torch.randn(9, shape[0])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.refresh_(0.0)
    for before, after, update in zip(base, experts.projection, layer.update().double(), strict=True):
        left, right = frozen_directions(before, RANK)
        assert update.norm() > 0.05 * before.norm(), "the expert did not learn, so the test shows nothing"
        assert (left.T @ update).norm() / update.norm() <= 1e-5
        assert (update @ right).norm() / update.norm() <= 1e-5
        torch.testing.assert_close(after.double(), before.double() + update, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("free_subspace", SUBSPACES)
def test_gradients_equal_those_of_a_dense_reference(shape, free_subspace):
    experts, layer = make_experts(shape, free_subspace)
    with torch.no_grad():
        layer.coefficients.normal_(std=0.1)
    layer.refresh_(0.0)
    x = torch.randn(9, shape[0], requires_grad=True)
    output = experts(x)
    output.square().sum().backward()

    reference_x = x.detach().clone().requires_grad_()
    coefficients = layer.coefficients.detach().clone().requires_grad_()
    left = torch.eye(shape[0]) if layer.left_basis is None else layer.left_basis
    right = torch.eye(shape[1]) if layer.right_basis is None else layer.right_basis
    weight = layer.base_weight + left @ coefficients @ right.mT
    expected = torch.einsum("etm,emn->etn", reference_x.view(NUM_EXPERTS, 3, -1), weight).flatten(0, 1)
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, reference_x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.coefficients.grad, coefficients.grad, rtol=1e-4, atol=1e-4)
    assert experts.projection.grad is None


def test_recomputed_activations_give_the_same_gradient():
    experts, layer = make_experts((24, 40), "complement")
    x = torch.randn(9, 24, requires_grad=True)
    gradients = []
    for output in (experts(x), checkpoint(experts, x, use_reentrant=False)):
        output.square().sum().backward()
        gradients.append(layer.coefficients.grad.clone())
        layer.coefficients.grad = None
    assert torch.equal(*gradients)


def test_parameter_is_itself_again_after_a_forward_pass_that_failed():
    experts, _ = make_experts((24, 40), "complement")
    with pytest.raises(RuntimeError):
        experts(torch.randn(9, 25))
    assert isinstance(experts.projection, nn.Parameter)
    assert {name for name, _ in experts.named_parameters(recurse=False)} == {"projection"}


def test_targets_of_a_mixture_are_its_experts_and_not_its_routers():
    model = Qwen3MoeForCausalLM(small_config("qwen3_moe", num_hidden_layers=1))
    targets = {target.name: target.shape for target in select_targets(model, ["mlp"])}
    assert targets == {
        "model.layers.0.mlp.experts.gate_up_proj": (NUM_EXPERTS, 48, 32),
        "model.layers.0.mlp.experts.down_proj": (NUM_EXPERTS, 32, 24),
    }
    before = set(model.state_dict())
    inject(model, SubspaceConfig(unfreeze_rank_ratio=0.25, target_patterns=["experts"]))
    assert [name for name, _ in osft_layers(model)] == list(targets)
    assert set(merge(model).state_dict()) == before
    assert list(osft_layers(model)) == []
