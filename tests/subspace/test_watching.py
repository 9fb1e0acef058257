"""What is seen of weights in use, by their statistics: stacked experts of every layout, and what cannot be followed."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from osft.settings.subspace import SubspaceConfig
from osft.subspace import inject, select_targets
from osft.subspace.calibration import measure
from osft.subspace.moment_sums import FLOOR_TOKENS
from osft.subspace.targets import Target
from osft.subspace.watching import watched
from tests.architectures import small_config
from tests.conftest import feeding
from tests.subspace.test_calibration import texts

NUM_EXPERTS = 3
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3")
TRANSPOSED = ("gpt_oss", "llama4_text")


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(small_config(kind)).eval()


def of_experts(model, targets=None):
    """Target -> its statistics, of the stacks."""
    targets = targets or select_targets(model)
    measured = measure(model, targets, texts(), feeding=feeding(30))
    return {name: each for each in measured.inputs() for name in each.targets if ".experts." in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_has_the_moments_of_the_tokens_that_are_sent_to_it(family):
    """Against the products that the model computes, recorded one by one."""
    model = build(family)
    found = of_experts(model)
    assert len(found) == (2 if family == "deepseek_v3" else 4), "two stacks of a block; the first may be dense"
    for name, each in found.items():
        assert each.transposed == (family in TRANSPOSED)
        owner, _, leaf = name.rpartition(".")
        experts = model.get_submodule(owner)
        sums, tokens = direct_sums(model, experts, leaf, each.transposed)
        n = sums.shape[-1]
        total = sum(len(sample.input_ids) for sample in texts())
        mean_energy = sums.diagonal(dim1=-2, dim2=-1).sum() / (n * tokens.sum())
        expected = (sums + FLOOR_TOKENS * mean_energy * torch.eye(n)) / total
        torch.testing.assert_close(each.moment.dense(), expected, rtol=1e-3, atol=1e-6)
        energies = each.gradient_energies[name]
        assert energies.shape == (NUM_EXPERTS,)
        assert (energies > 0).all()


def direct_sums(model, experts, leaf, transposed):
    """Sum of x x^T of each expert, and its tokens, from products that are recorded as they are computed."""
    sums = torch.zeros(NUM_EXPERTS, *(2 * [experts.get_parameter(leaf).shape[1 if transposed else 2]]))
    tokens = torch.zeros(NUM_EXPERTS)
    names = ("bmm", "linear", "matmul")
    weights = list(experts.get_parameter(leaf))

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if any(name in getattr(func, "__name__", "") for name in names) and len(args) > 1:
                x, w = args[:2]
                if func.__name__ == "__rmatmul__":
                    x, w = w, x
                for index, weight in enumerate(weights):
                    if w.data_ptr() == weight.data_ptr() and w.ndim == 2:
                        rows = x.detach()
                    elif w.ndim == 3 and w.data_ptr() == weights[0].data_ptr():
                        rows = x.detach()[index]
                    else:
                        continue
                    sums[index] += rows.T @ rows
                    tokens[index] += rows.any(-1).sum()
            return result

    if getattr(model.config, "_experts_implementation", None):
        model.config._experts_implementation = "eager"
    with torch.no_grad():
        for sample in texts():
            with Record():
                model(torch.tensor([sample.input_ids]))
    return sums, tokens


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text"])
def test_experts_in_training_have_the_statistics_of_plain_ones(family):
    model = build(family)
    targets = select_targets(model)
    plain = of_experts(model)
    implementation = model.config._experts_implementation
    inject(model, SubspaceConfig(unfreeze_rank_ratio=0.5))
    in_training = of_experts(model, targets)
    assert model.config._experts_implementation == implementation
    for name, each in plain.items():
        torch.testing.assert_close(in_training[name].moment.dense(), each.moment.dense(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(
            in_training[name].gradient_energies[name], each.gradient_energies[name], rtol=1e-4, atol=0
        )


def test_experts_that_no_token_reaches_have_the_floor_and_the_mean_gradient():
    model = build("mixtral")
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "MixtralTopKRouter":
                module.weight.zero_()
                module.forward = lambda hidden: (
                    None,
                    torch.full((len(hidden.reshape(-1, hidden.shape[-1])), 2), 0.5),
                    torch.tensor([[0, 1]]).expand(len(hidden.reshape(-1, hidden.shape[-1])), 2),
                )
    for name, each in of_experts(model).items():
        unused = each.moment.dense()[2]
        torch.testing.assert_close(unused, unused[0, 0] * torch.eye(len(unused)), rtol=1e-4, atol=1e-8)
        assert unused[0, 0] > 0
        energies = each.gradient_energies[name]
        assert energies[:2].min() <= energies[2] <= energies[:2].max()


class Reader(nn.Module):
    """A model of one block that reads the weight of its layer to compute with it itself."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.block = nn.ModuleList([nn.ModuleDict({"layer": nn.Linear(6, 4, bias=False)})])
        self.block[0].forward = lambda x: compute(x, self.block[0]["layer"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block[0](x)


FOLLOWED = {
    "linear": lambda x, w: nn.functional.linear(x, w.to(torch.float32)),
    "product": lambda x, w: x @ w.T,
    "transposed product": lambda x, w: torch.matmul(x, w.transpose(0, 1)),
    "weight first": lambda x, w: (w @ x.T).T,
}


def seen(compute):
    model, uses = Reader(compute), []
    target = Target("block.0.layer", "block.0.layer.weight", (4, 6))

    def observe(use):
        uses.append(use)
        return use.outputs

    x = torch.randn(5, 6)
    with watched(model, [target], observe):
        outputs = model(x)
    torch.testing.assert_close(outputs, x @ model.block[0]["layer"].weight.T)
    assert isinstance(model.block[0]["layer"].weight, nn.Parameter)
    return x, outputs, uses


@pytest.mark.parametrize("compute", FOLLOWED.values(), ids=FOLLOWED)
def test_weight_that_a_block_reads_is_followed(compute):
    x, outputs, (use,) = seen(compute)
    assert (use.target, use.transposed, use.expert) == ("block.0.layer", False, None)
    assert torch.equal(use.inputs, x)
    assert torch.equal(use.outputs, outputs)


@pytest.mark.parametrize("compute", [lambda x, w: x @ (w * 1).T, lambda x, w: torch.einsum("ti,oi->to", x, w)])
def test_weight_that_cannot_be_followed_is_refused_by_name_with_the_remedy(compute):
    with pytest.raises(ValueError, match=r"block.0.layer: .* cannot be followed .*protect='weights'"):
        seen(compute)


def test_layer_that_computes_without_gradients_has_no_energy():
    """As the layers that choose which tokens are attended to: what they compute is no differentiable cause."""
    model = build("qwen3_moe")
    attention = model.model.layers[0].self_attn
    attention.forward = torch.no_grad()(attention.forward)
    measured = measure(model, select_targets(model, ["q_proj", "down_proj"]), texts(), feeding=feeding())
    energies = {name: value for each in measured.inputs() for name, value in each.gradient_energies.items()}
    assert energies["model.layers.0.self_attn.q_proj"] == 0
    assert (energies["model.layers.0.mlp.experts.down_proj"] > 0).all()
