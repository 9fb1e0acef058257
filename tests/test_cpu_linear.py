"""Linear layers by oneDNN: the same, and only where the weight learns nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from osft.models import cpu_linear
from osft.models.cpu_linear import fast_linear, fast_linear_layers, onednn_operation
from osft.process.private_names import onednn_linear
from osft.settings.subspace import SubspaceConfig
from osft.subspace.model import inject
from tests.conftest import tiny_llama


@pytest.fixture
def _amd(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("vendor_id : AuthenticAMD\nflags : sse avx512f\n")
    monkeypatch.setattr(cpu_linear, "_CPU", tmp_path / "cpuinfo")
    onednn_operation.cache_clear()
    yield
    onednn_operation.cache_clear()


@pytest.mark.usefixtures("_amd")
@pytest.mark.parametrize("rows", [(1,), (3, 40), (700,)])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_computes_what_pytorch_computes(rows, bias):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(96, 130, bias=bias))
    x, before = torch.randn(*rows, 96), copy.deepcopy(layer)
    with fast_linear_layers(layer), torch.no_grad():
        assert type(layer[0]) is not nn.Linear
        torch.testing.assert_close(layer(x), before(x), atol=1e-5, rtol=1e-5)
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert type(layer[0]) is nn.Linear


@pytest.mark.usefixtures("_amd")
@pytest.mark.parametrize("strides", ["rows", "columns"])
def test_gradient_of_the_input_is_pytorchs(strides, monkeypatch):
    calls: list[int] = []
    operation = cpu_linear.onednn_operation()
    monkeypatch.setattr(cpu_linear, "onednn_operation", lambda: lambda *given: calls.append(1) or operation(*given))
    weight, bias = torch.randn(130, 96), torch.randn(130)
    weight = weight if strides == "rows" else weight.T.contiguous().T
    x, towards = torch.randn(3, 40, 96, requires_grad=True), torch.randn(3, 40, 130)
    found, expected = fast_linear(x, weight, bias), F.linear(x, weight, bias)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    gradients = [torch.autograd.grad(product, x, towards)[0] for product in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-5)
    assert len(calls) == 2, "forward and backward"


@pytest.mark.usefixtures("_amd")
def test_what_learns_is_multiplied_by_pytorch(monkeypatch):
    monkeypatch.setattr(cpu_linear, "_multiply", None)
    layer = nn.Sequential(nn.Linear(8, 5))
    with fast_linear_layers(layer):
        layer(torch.randn(4, 8)).sum().backward()
    assert layer[0].weight.grad is not None
    frozen = nn.Linear(8, 5).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast_linear(torch.randn(4, 8), frozen.weight, frozen.bias).dtype == torch.bfloat16
    assert fast_linear(torch.randn(0, 8), frozen.weight).shape == (0, 5)


@pytest.mark.usefixtures("_amd")
@pytest.mark.parametrize("split", ["complement", "core"])
def test_training_has_the_gradients_that_it_had(split, request):
    config = SubspaceConfig(unfreeze_rank_ratio=0.25, protect="weights", free_subspace=split)
    model, tokens = inject(tiny_llama(), config), torch.arange(50)[None]

    def gradients() -> tuple[torch.Tensor, ...]:
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.autograd.grad(model(tokens).logits.square().mean(), learning)

    found = gradients()
    request.getfixturevalue("without_onednn")
    for one, other in zip(found, gradients(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("_amd")
def test_model_has_the_logits_and_names_that_it_had():
    model, tokens = tiny_llama().eval(), torch.arange(50)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        with fast_linear_layers(model):
            torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-4)
            assert model.state_dict().keys() == tiny_llama().state_dict().keys()


def test_other_processors_and_wrong_operations_leave_the_layers_alone(monkeypatch, tmp_path):
    layer = nn.Sequential(nn.Linear(8, 5))
    for vendor, operation in (
        ("GenuineIntel", onednn_linear()),
        ("AuthenticAMD", lambda x, weight, bias: x @ weight.T),
        ("AuthenticAMD", lambda x: x),
        ("AuthenticAMD", None),
    ):
        (tmp_path / "cpuinfo").write_text(f"vendor_id : {vendor}\nflags : avx512f\n")
        monkeypatch.setattr(cpu_linear, "_CPU", tmp_path / "cpuinfo")
        monkeypatch.setattr(cpu_linear, "onednn_linear", lambda operation=operation: operation)
        onednn_operation.cache_clear()
        with fast_linear_layers(layer):
            assert type(layer[0]) is nn.Linear
    onednn_operation.cache_clear()
