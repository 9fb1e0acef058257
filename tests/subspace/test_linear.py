"""The layer: orthogonal by construction, equal to a dense reference, and nothing left behind by merging."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from osft.settings.subspace import SubspaceConfig
from osft.subspace import OSFTLinear, decompose, inject, merge, osft_layers, refresh, unfrozen_rank
from tests.conftest import tiny_llama

SHAPES = {"square": (24, 24), "tall": (40, 24), "wide": (24, 40)}
SUBSPACES = ("complement", "core")
KINDS = ("no-bias", "bias", "transposed")
"""Of a layer: `nn.Linear` without and with a bias, and `Conv1D`, which stores (in, out)."""


def make_layer(shape: tuple[int, int], free_subspace: str, *, kind: str, ratio: float = 0.25) -> OSFTLinear:
    """`shape` is that of the stored weight."""
    torch.manual_seed(0)
    if kind == "transposed":
        linear: nn.Module = Conv1D(shape[1], shape[0])
        nn.init.normal_(linear.weight, std=shape[0] ** -0.5)
        nn.init.normal_(linear.bias)
    else:
        linear = nn.Linear(shape[1], shape[0], bias=kind == "bias")
    rank = unfrozen_rank(shape, ratio)
    factors = decompose(linear.weight.detach(), rank, free_subspace)
    layer = OSFTLinear(linear, rank=rank, split_kind=free_subspace)
    layer.fill_(factors)
    return layer


def frozen_directions(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U_high and V_high by an SVD in double precision, independent of the library's decomposition."""
    left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
    frozen_rank = min(weight.shape) - rank
    return left[:, :frozen_rank], right[:frozen_rank].T


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("free_subspace", SUBSPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_update_stays_orthogonal_to_frozen_directions(shape, free_subspace, kind):
    layer = make_layer(shape, free_subspace, kind=kind)
    base = layer.weight.clone()
    optimizer = torch.optim.AdamW([layer.coefficients], lr=1e-2, weight_decay=0.1)
    for _ in range(50):
        layer(torch.randn(8, shape[0] if kind == "transposed" else shape[1])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.refresh_(0.0)
    update = layer.update().double()
    left, right = frozen_directions(base, layer.rank)
    assert update.norm() > 0.05 * base.norm(), "the layer did not learn, so the test shows nothing"
    assert (left.T @ update).norm() / update.norm() <= 1e-5
    assert (update @ right).norm() / update.norm() <= 1e-5
    # What the forward pass uses is the base weight plus this update, and nothing else.
    torch.testing.assert_close(layer.weight.double(), base.double() + update, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("free_subspace", SUBSPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradient_equal_dense_reference(shape, free_subspace, kind):
    layer = make_layer(shape, free_subspace, kind=kind)
    with torch.no_grad():
        layer.coefficients.normal_(std=0.1)
    layer.refresh_(0.0)
    outputs, inputs = shape[::-1] if kind == "transposed" else shape
    x = torch.randn(2, 5, inputs, requires_grad=True)
    target = torch.randn(2, 5, outputs)
    output = layer(x)
    (output - target).square().sum().backward()

    reference_x = x.detach().clone().requires_grad_()
    coefficients = layer.coefficients.detach().clone().requires_grad_()
    left = torch.eye(shape[0]) if layer.left_basis is None else layer.left_basis
    right = torch.eye(shape[1]) if layer.right_basis is None else layer.right_basis
    weight = layer.base_weight + left @ coefficients @ right.T
    weight = weight if kind == "transposed" else weight.T
    expected = reference_x @ weight + (0 if kind == "no-bias" else layer.bias)
    (expected - target).square().sum().backward()

    def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return ((found - wanted).norm() / wanted.norm()).item()

    assert relative(output, expected) <= 1e-5
    assert relative(x.grad, reference_x.grad) <= 1e-5
    assert relative(layer.coefficients.grad, coefficients.grad) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_reduced_input_and_no_weight_gradient(kind):
    layer = make_layer(SHAPES["square"], "complement", kind=kind)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        output = layer(torch.randn(7, 24, requires_grad=True))
    output.sum().backward()
    assert torch.Size([7, 24]) not in saved, "the whole input was kept"
    assert torch.Size([7, layer.rank]) in saved
    assert layer.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_layer_that_learns_nothing_now_keeps_no_input_and_gives_its_input_the_same_gradient(kind):
    layer = make_layer(SHAPES["square"], "complement", kind=kind)
    x = torch.randn(7, 24, requires_grad=True)
    layer(x).sum().backward()
    expected, x.grad = x.grad, None
    layer.coefficients.grad = None
    layer.coefficients.requires_grad_(False)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        output = layer(x)
    output.sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert layer.coefficients.grad is None
    assert not {torch.Size([7, 24]), torch.Size([7, layer.rank])} & set(saved)


@pytest.mark.usefixtures("without_onednn")
@pytest.mark.parametrize("linear", [nn.Linear(24, 40), Conv1D(40, 24)], ids=["linear", "conv1d"])
def test_untrained_layer_computes_what_the_linear_computes_and_merges_to_it(linear):
    x = torch.randn(3, 24)
    expected = linear(x)
    layer = OSFTLinear(linear, rank=6)
    layer.fill_(decompose(linear.weight.detach(), 6))
    layer.refresh_(0.0)
    assert torch.equal(layer(x), expected)
    merged = layer.merged()
    assert type(merged) is type(linear)
    assert torch.equal(merged(x), expected)


def test_bfloat16_weight_is_the_rounded_sum():
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, dtype=torch.bfloat16)
    base = linear.weight.detach().clone()
    layer = OSFTLinear(linear, rank=6)
    layer.fill_(decompose(base, 6))
    with torch.no_grad():
        layer.coefficients.normal_(std=0.1)
    layer.refresh_(0.0)
    assert layer.coefficients.dtype == torch.float32
    assert torch.equal(layer.weight, (base.float() + layer.update()).bfloat16())
    layer(torch.randn(3, 24, dtype=torch.bfloat16)).sum().backward()
    assert layer.coefficients.grad.dtype == torch.float32


def trained_model(ratio: float = 0.25) -> nn.Module:
    model = inject(tiny_llama(), SubspaceConfig(unfreeze_rank_ratio=ratio))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        tokens = torch.randint(0, 258, (2, 16))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        refresh(model, learning_rate=0.0)
    return model


def test_merged_and_reloaded_model_gives_the_same_logits(tmp_path):
    model = trained_model()
    tokens = torch.randint(0, 258, (2, 16))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        assert not torch.allclose(expected, tiny_llama()(input_ids=tokens).logits, atol=1e-2), "nothing was learned"
        merged = merge(model)
        assert list(osft_layers(merged)) == []
        assert torch.equal(merged(input_ids=tokens).logits, expected)
        merged.save_pretrained(tmp_path)
        reloaded = type(merged).from_pretrained(tmp_path)
        assert torch.equal(reloaded(input_ids=tokens).logits, expected)


def test_only_coefficients_are_trained():
    model = inject(tiny_llama(), SubspaceConfig(unfreeze_rank_ratio=0.25))
    trainable = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"coefficients"}
