"""Gated MLPs that keep less for the backward pass, and change nothing by a bit."""

import copy
import gc
from collections import Counter

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from osft.models import row_slices
from osft.models.gated_mlp import use_gated_product
from osft.settings.subspace import SubspaceConfig
from osft.subspace.model import inject, osft_layers
from tests.architectures import small_config
from tests.conftest import tiny_llama

TOKENS = torch.arange(3 * 21).view(3, 21)
WIDTH = 64
"""Of the MLPs of `tiny_llama`: the one size of a tensor that nothing else has."""


@pytest.fixture(params=[1, 7 * WIDTH, 2**17], ids=["row-by-row", "few-rows", "at-once"])
def _several_lots(request, monkeypatch):
    monkeypatch.setattr(row_slices, "ELEMENTS_IN_CACHE", request.param)


def split(free_subspace: str = "complement") -> nn.Module:
    return inject(
        tiny_llama(), SubspaceConfig(unfreeze_rank_ratio=0.25, protect="weights", free_subspace=free_subspace)
    )


def computed(model: nn.Module) -> list[torch.Tensor]:
    """Its logits, and the gradient of each coefficient."""
    logits = model(TOKENS).logits
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), learning)]


def kept(model: nn.Module) -> Counter[int]:
    """How many tensors (..., n) of all tokens the backward pass of the first MLP has kept, by n."""
    widths: Counter[int] = Counter()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        widths[tensor.shape[-1]] += tensor.shape[:-1] == TOKENS.shape
        return tensor

    hidden_states = torch.randn(*TOKENS.shape, 32, requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model.layers[0].mlp(hidden_states)
    return widths


@pytest.mark.usefixtures("_several_lots")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("free_subspace", ["complement", "core"])
def test_model_has_the_logits_and_gradients_that_it_had(free_subspace, dtype):
    plain = split(free_subspace).to(dtype)
    lean = copy.deepcopy(plain)
    use_gated_product(lean)
    assert all(map(torch.equal, computed(lean), computed(plain)))
    with torch.no_grad():
        assert torch.equal(lean(TOKENS).logits, plain(TOKENS).logits)
    assert lean.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen3", "smollm3", "deepseek_v3"])
def test_architectures_with_this_mlp_compute_what_they_did(kind):
    plain = AutoModelForCausalLM.from_config(small_config(kind)).eval()
    lean = copy.deepcopy(plain)
    use_gated_product(lean)
    assert any("forward" in vars(module) for module in lean.modules())
    assert torch.equal(lean(TOKENS).logits, plain(TOKENS).logits)


@pytest.mark.parametrize("kind", ["phi3", "gpt2", "gemma3n_text"])
def test_other_code_is_left_alone(kind):
    model = AutoModelForCausalLM.from_config(small_config(kind))
    use_gated_product(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("free_subspace", "before"), [("complement", 4), ("core", 3)])
def test_two_of_the_wide_tensors_are_kept(free_subspace, before):
    model = split(free_subspace)
    down = dict(osft_layers(model))["model.layers.0.mlp.down_proj"]
    assert down.keeps_inputs == (free_subspace == "complement")
    assert kept(model)[WIDTH] == before
    use_gated_product(model)
    assert kept(model)[WIDTH] == 2


def wide_tensors() -> int:
    gc.collect()
    shape = (*TOKENS.shape, WIDTH)
    return sum(isinstance(each, torch.Tensor) and each.shape == shape for each in gc.get_objects())


@pytest.mark.parametrize("free_subspace", ["complement", "core"])
def test_with_gradient_checkpointing_nothing_wide_is_there_after_the_forward_pass(free_subspace):
    plain = split(free_subspace).train()
    lean = copy.deepcopy(plain)
    use_gated_product(lean, checkpointed=True)
    for model in (plain, lean):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(map(torch.equal, computed(lean), computed(plain)))
    before = wide_tensors()
    logits = lean(TOKENS).logits
    assert wide_tensors() <= before
    logits.sum().backward()


def test_activation_that_learns_is_left_alone():
    class Learned(nn.SiLU):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.scale * super().forward(input)

    model = tiny_llama()
    model.model.layers[0].mlp.act_fn = Learned()
    use_gated_product(model)
    assert ["forward" in vars(layer.mlp) for layer in model.model.layers] == [False, True]


def test_a_second_backward_pass_is_refused():
    model = split()
    use_gated_product(model)
    loss = model(TOKENS).logits.square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
