"""Linear layers by oneDNN: the same, and only where no gradient is wanted."""

import copy

import pytest
import torch
from torch import nn

from osft.models import cpu_linear
from osft.models.cpu_linear import fast_linear, fast_linear_layers
from osft.process.private_names import onednn_linear
from tests.conftest import tiny_llama


@pytest.fixture
def _amd(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("vendor_id : AuthenticAMD\nflags : sse avx512f\n")
    monkeypatch.setattr(cpu_linear, "_CPU", tmp_path / "cpuinfo")
    fast_linear.cache_clear()
    yield
    fast_linear.cache_clear()


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
def test_gradients_are_pytorchs_own():
    layer = nn.Sequential(nn.Linear(8, 5))
    with fast_linear_layers(layer):
        layer(torch.randn(4, 8)).sum().backward()
    assert layer[0].weight.grad is not None


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
        fast_linear.cache_clear()
        with fast_linear_layers(layer):
            assert type(layer[0]) is nn.Linear
    fast_linear.cache_clear()
