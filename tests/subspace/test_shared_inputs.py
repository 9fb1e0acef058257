"""Layers that are split by the input they have in common: one basis and one `x R`, and what each would learn alone."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from osft.settings.subspace import SubspaceConfig
from osft.subspace import OSFTLinear, inject, select_targets
from osft.subspace.calibration import measure
from osft.subspace.model import osft_layers
from tests.conftest import feeding, tiny_llama
from tests.gpu.models import texts

INPUTS, RANK, TOKENS = 24, 6, 7
WIDTHS = (16, 20, 28)
KINDS = ("linear", "conv1d")


class Branches(nn.Module):
    """What three layers make of one input."""

    def __init__(self, kind: str, *, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        basis = torch.linalg.qr(torch.randn(INPUTS, RANK))[0]
        split = "left" if kind == "conv1d" else "right"
        for number, width in enumerate(WIDTHS):
            linear = Conv1D(width, INPUTS) if kind == "conv1d" else nn.Linear(INPUTS, width)
            nn.init.normal_(linear.weight, std=0.2)
            layer = OSFTLinear(linear, rank=RANK, split_kind=split)
            layer.base_weight.copy_(layer.dense_weight().detach())
            with torch.no_grad():
                layer.bases()[0].copy_(basis)
            self.add_module(str(number), layer)
            if shared and number:
                layer.share_input_basis(self.get_submodule("0"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0  # as a normalization gives it: here alone
        return torch.cat([layer(x).sin() for layer in self.children()], dim=-1)


class Products(TorchDispatchMode):
    """Counts the products that have RANK columns and TOKENS rows: x R."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.shape == (TOKENS, RANK):
            self.count += 1
        return result


def gradients(branches: nn.Module, x: torch.Tensor, *, recomputed: bool = False) -> list[torch.Tensor]:
    """Output, and the gradients of the input and of all coefficients."""
    x = x.clone().requires_grad_()
    output = checkpoint(branches, x, use_reentrant=False) if recomputed else branches(x)
    output.float().square().sum().backward()
    found = [output.detach(), x.grad, *(p.grad for p in branches.parameters() if p.requires_grad)]
    branches.zero_grad()
    return found


@pytest.mark.usefixtures("without_onednn")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_gradients_are_those_of_layers_of_their_own_and_x_r_is_computed_once_a_pass(kind, recomputed):
    x = torch.randn(TOKENS, INPUTS)
    apart, together = Branches(kind, shared=False), Branches(kind, shared=True)
    assert len({id(basis) for layer in together.children() for basis in layer.bases()}) == 1
    expected = gradients(apart, x, recomputed=recomputed)
    with Products() as products:
        found = gradients(together, x, recomputed=recomputed)
    assert products.count == (2 if recomputed else 1)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_x_r_is_kept_once_and_gone_with_the_backward_pass(recomputed):
    together = Branches("linear", shared=True)
    seen: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = together(torch.randn(TOKENS, INPUTS, requires_grad=True))
    reduced = [t for t in seen if t.shape == (TOKENS, RANK)]
    assert len(reduced) == 3
    assert len({t.untyped_storage().data_ptr() for t in reduced}) == 1
    assert not [t for t in seen if t.shape == (TOKENS, INPUTS)], "the whole input was kept"
    seen.clear()
    del reduced, output
    gradients(together, torch.randn(TOKENS, INPUTS), recomputed=recomputed)
    gc.collect()
    assert len(together.get_submodule("0")._reduced_inputs) == 0


def test_numbers_that_were_written_over_are_another_input():
    x = torch.randn(TOKENS, INPUTS)
    first, second, _ = Branches("linear", shared=True).children()
    first(x)
    x.mul_(2)
    second(x).sum().backward()
    expected = torch.ones(WIDTHS[1], 1) * (x @ second.right_basis).sum(0)
    torch.testing.assert_close(second.coefficients.grad, expected)


def test_each_precision_has_its_own():
    x = torch.randn(TOKENS, INPUTS)
    first, second, third = Branches("linear", shared=True).children()
    first(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second(x).float().sum().backward()
    third(x).sum().backward()
    exact = (x @ first.right_basis).sum(0)
    torch.testing.assert_close(third.coefficients.grad[0], exact)
    rounded = second.coefficients.grad[0] - exact
    assert 1e-4 < rounded.norm() / exact.norm() < 3e-2


@pytest.mark.parametrize("shared", [False, True])
def test_nothing_is_computed_for_a_backward_pass_that_does_not_come(shared):
    branches, x = Branches("linear", shared=shared), torch.randn(TOKENS, INPUTS)
    expected = branches(x).detach()
    with torch.no_grad(), Products() as products:
        found = branches(x)
    assert products.count == 0
    assert torch.equal(found, expected)


def test_compiled_layers_learn_the_same():
    x = torch.randn(TOKENS, INPUTS)
    together = Branches("linear", shared=True)
    expected = gradients(together, x)
    found = gradients(torch.compile(together, backend="aot_eager", fullgraph=True), x)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_copied_layers_share_among_themselves():
    together = Branches("linear", shared=True)
    copied = copy.deepcopy(together)
    first, second, _ = copied.children()
    assert first.right_basis is second.right_basis
    assert first._reduced_inputs is second._reduced_inputs
    assert first._reduced_inputs is not together.get_submodule("0")._reduced_inputs


def test_a_model_shares_within_a_block_what_reads_one_input():
    model, config = tiny_llama(), SubspaceConfig(unfreeze_rank_ratio=0.25, protect="activations")
    statistics = measure(model, select_targets(model), texts(), feeding=feeding())
    inject(model, config, statistics=statistics)
    groups: dict[int, set[str]] = {}
    for name, layer in osft_layers(model):
        groups.setdefault(id(layer.right_basis), set()).add(name.removeprefix("model.layers."))
    expected = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    assert sorted(map(sorted, groups.values())) == sorted(
        sorted(f"{block}.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}" for name in names)
        for block in (0, 1)
        for names in expected
    )
