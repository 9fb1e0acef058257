"""Gated MLPs on a CPU: `down(act(gate(x)) * up(x))` that keeps two of its four wide tensors.

For the backward pass PyTorch keeps act(gate), gate and up, each as wide as the MLP, and the product if what follows
needs it. Here gate and up are kept. The others are computed again, a few rows at a time, so that act(gate) never leaves
the processor's cache; and the gradients are written over gate and up. It is the same operations on the same numbers, so
that nothing changes by a bit. On GPUs Liger's kernel does the like (`osft.training.liger`).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from osft.models.row_slices import row_slices

Activation = Callable[[torch.Tensor], torch.Tensor]

_ELEMENTWISE = {type(ACT2FN[name]) for name in ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")}
"""Activations that compute each number by itself and learn nothing."""


def use_gated_product(model: nn.Module, *, checkpointed: bool = False) -> None:
    """Let the gated MLPs of `model` that are on a CPU keep less, in place. Names of tensors and modules stay.

    checkpointed: whether the model has gradient checkpointing, which keeps none of all that. gate and up, of which the
    product can be made again, would be kept in its place.
    """
    for module in model.modules():
        if _is_gated_mlp(module):
            module.forward = partial(_forward, module, checkpointed)


def _is_gated_mlp(module: nn.Module) -> bool:
    """Whether the code of its forward pass is that of Llama's MLP, which transformers copies to other architectures."""
    activation = getattr(module, "act_fn", None)
    return type(activation) in _ELEMENTWISE and _code(type(module)) == _code(LlamaMLP)


def _code(kind: type[nn.Module]) -> tuple[Any, ...]:
    code = getattr(kind.forward, "__code__", None)
    return (code.co_code, code.co_names, code.co_consts) if code is not None else ()


def _forward(mlp: Any, checkpointed: bool, x: torch.Tensor) -> Any:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if torch.compiler.is_compiling() or gate.device.type != "cpu":
        return mlp.down_proj(mlp.act_fn(gate) * up)
    product = _GatedProduct.apply(gate, up, mlp.act_fn)
    if torch.is_grad_enabled() and not checkpointed and getattr(mlp.down_proj, "keeps_inputs", False):
        with _recomputed(product, gate, up, mlp.act_fn):
            return mlp.down_proj(product)
    return mlp.down_proj(product)


class _GatedProduct(torch.autograd.Function):
    """`_product` with gradients.

    Both inputs are gone after the backward pass; autograd refuses a second one.
    """

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _product(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        for few_gate, few_up, few in _few_rows(gate, up, grad_outputs[0]):
            with torch.enable_grad():
                leaf = few_gate.detach().requires_grad_()
                activated = ctx.activation(leaf)
            of_activated = few * few_up
            torch.mul(few, activated.detach(), out=few_up)
            few_gate.copy_(torch.autograd.grad(activated, leaf, of_activated)[0])
        return gate, up, None


def _product(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(gate) * up, (..., n) each."""
    product = torch.empty_like(gate)
    for few_gate, few_up, few in _few_rows(gate, up, product):
        torch.mul(activation(few_gate), few_up, out=few)
    return product


def _recomputed(
    product: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: Activation
) -> torch.autograd.graph.saved_tensors_hooks:
    """While this lasts, who keeps the product for its backward pass, which comes before the one that makes it, does
    not: it is computed again.
    """
    address, gate, up = product.data_ptr(), gate.detach(), up.detach()

    def pack(kept: torch.Tensor) -> torch.Tensor | None:
        return None if kept.data_ptr() == address and kept.shape == gate.shape else kept

    def unpack(kept: torch.Tensor | None) -> torch.Tensor:
        return _product(gate, up, activation) if kept is None else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _few_rows(*tensors: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """The same rows of each tensor, (..., n), one lot after the other."""
    flat = [tensor.flatten(0, -2) for tensor in tensors]
    return ([tensor[rows] for tensor in flat] for rows in row_slices(flat[0]))
