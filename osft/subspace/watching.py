"""Seeing what the weights of a model in use are multiplied with, whatever the architecture.

Of a linear layer these are its module's input and output. A stack of experts (num_experts, m, n), and a weight that a
block reads to compute with it itself, is replaced while the block computes by a tensor that knows which of its slices
it is, which way round, and tells when it is multiplied.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from osft.process.private_names import as_plain_tensors, experts_of, set_experts
from osft.subspace.linear import OSFTLinear
from osft.subspace.targets import Target, transformer_blocks

REMEDY = "Leave it out with target_patterns, or split by the weights with protect='weights'"


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One multiplication of inputs with a target weight, or with some experts of one."""

    target: str
    inputs: torch.Tensor
    """(..., n); of all experts at once (num_experts, ..., n)."""
    outputs: torch.Tensor
    """(..., m), as the inputs."""
    transposed: bool
    """Whether the weight is stored (in_features, out_features)."""
    expert: int | None = None
    """Of a stack, the one that is used; None: all at once."""


Observe = Callable[[Use], torch.Tensor]
"""Is told of a use, and returns the outputs that the model continues with."""


@contextmanager
def watched(model: nn.Module, targets: Sequence[Target], observe: Observe) -> Iterator[None]:
    """While this lasts, `observe` is told of each use of the targets in a forward pass.

    The forward pass raises ValueError, with the name of the target, for a use that cannot be followed.
    """
    stack, blocks = transformer_blocks(model)
    with ExitStack() as exits:
        for target in targets:
            owner, _, leaf = target.tensor.rpartition(".")
            module = model.get_submodule(owner)
            watch = _Watch(target.name, leaf, module, observe)
            if target.name == target.tensor:
                exits.enter_context(_eager(module))
                reader = module
            else:
                exits.callback(module.register_forward_pre_hook(watch.hide).remove)
                exits.callback(module.register_forward_hook(watch.observe_module, always_call=True).remove)
                number = owner.removeprefix(f"{stack}.").partition(".")[0]
                reader = blocks.get_submodule(number)
            # Before the reader computes, not now: a sharded parameter is another one when it is whole.
            exits.callback(reader.register_forward_pre_hook(watch.show).remove)
            exits.callback(reader.register_forward_hook(watch.hide, always_call=True).remove)
        yield


@contextmanager
def _eager(experts: nn.Module) -> Iterator[None]:
    """With each expert multiplied by itself, in the implementation that every model of transformers has."""
    config: Any = getattr(experts, "config", None)
    chosen = experts_of(config)
    if chosen is not None:
        set_experts(config, "eager")
    try:
        yield
    finally:
        if chosen is not None:
            set_experts(config, chosen)


class _Watch:
    """Puts a watched tensor into the place of a module's parameter, and takes it out."""

    def __init__(self, target: str, leaf: str, module: nn.Module, observe: Observe) -> None:
        self._target, self._leaf, self._module, self._observe = target, leaf, module, observe

    # An instance attribute is found before a parameter of the same name, which nn.Module keeps apart.
    def show(self, *_: Any) -> None:
        weight = dict(self._module.named_parameters(recurse=False, remove_duplicate=False))[self._leaf]
        watched = weight.detach().as_subclass(_WatchedWeight)
        watched.seen_as = _View(self._target, self._observe)
        self._module.__dict__[self._leaf] = watched

    def hide(self, *_: Any) -> None:
        self._module.__dict__.pop(self._leaf, None)

    def observe_module(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor | None) -> Any:
        """After the module's own forward pass, or an exception in it."""
        self.show()
        if outputs is None:
            return None
        transposed = module.transposed if isinstance(module, OSFTLinear) else not isinstance(module, nn.Linear)
        return self._observe(Use(self._target, inputs[0], outputs, bool(transposed)))


@dataclass(frozen=True, slots=True)
class _View:
    """What a tensor is of a target's weight."""

    target: str
    observe: Observe
    flipped: bool = False
    """Whether rows and columns are exchanged."""
    expert: int | None = None


_SAME = {torch.Tensor.to, torch.Tensor.float, torch.Tensor.contiguous, torch.Tensor.detach, torch.Tensor.type_as}
_FLIPS = {torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.Tensor.t, torch.t}  # type: ignore[attr-defined]
_TRANSPOSES = {torch.Tensor.transpose, torch.transpose}
_PRODUCTS = {
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.__rmatmul__,
    torch.mm,
    torch.Tensor.mm,
    torch.bmm,
    torch.Tensor.bmm,
}


class _WatchedWeight(torch.Tensor):
    """A weight that tells what it is multiplied with."""

    seen_as: _View

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with as_plain_tensors():
            if func is F.linear:
                return _linear(*args, **kwargs)
            if func in _PRODUCTS:
                left, right = args
                return _product(right, left) if func is torch.Tensor.__rmatmul__ else _product(left, right)
            if func is torch.addmm:
                bias, inputs, weight = args
                return _linear(inputs, _flipped(weight), bias)
            weight = next(value for value in [*args, *kwargs.values()] if isinstance(value, _WatchedWeight))
            result = func(*args, **kwargs)
            if not isinstance(result, torch.Tensor):
                if isinstance(result, list | tuple) and any(isinstance(value, torch.Tensor) for value in result):
                    raise _lost(weight, func)
                return result
            view = _view_of(weight.seen_as, weight, result, func, args)
            if view is None:
                raise _lost(weight, func)
            return _as_view(result, view)


def _view_of(view: _View, weight: torch.Tensor, result: torch.Tensor, func: Any, args: Any) -> _View | None:
    """What the result of an operation is of the weight; None if that is not known."""
    if func in _SAME and result.shape == weight.shape:
        return view
    if func in _FLIPS and (weight.ndim == 2 or func is torch.Tensor.mT.__get__):  # type: ignore[attr-defined]
        return replace(view, flipped=not view.flipped)
    if func in _TRANSPOSES and {dimension % weight.ndim for dimension in args[1:]} == {
        weight.ndim - 1,
        weight.ndim - 2,
    }:
        return replace(view, flipped=not view.flipped)
    if func is torch.Tensor.__getitem__ and weight.ndim == 3 and result.shape == weight.shape[1:]:
        index = args[1]
        if isinstance(index, int) or (isinstance(index, torch.Tensor) and not index.is_floating_point()):
            return replace(view, expert=int(index) % len(weight))
    return None


def _as_view(tensor: torch.Tensor, view: _View) -> torch.Tensor:
    found = tensor.as_subclass(_WatchedWeight)
    found.seen_as = view
    return found


def _flipped(weight: Any) -> Any:
    if not isinstance(weight, _WatchedWeight):
        raise ValueError("a weight that is watched was added to a product, which cannot be followed")
    return _as_view(weight.mT, replace(weight.seen_as, flipped=not weight.seen_as.flipped))


def _lost(weight: _WatchedWeight, func: Any) -> ValueError:
    name = getattr(func, "__name__", str(func))
    return ValueError(
        f"{weight.seen_as.target}: the model uses this weight in a way that cannot be followed ({name}), so that "
        f"its inputs are not known. {REMEDY}"
    )


def _linear(inputs: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
    """x W^T + b of a watched W, (out, in) as it is viewed."""
    if not isinstance(weight, _WatchedWeight):
        other = inputs if isinstance(inputs, _WatchedWeight) else bias
        raise _lost(other, F.linear)
    view = weight.seen_as
    product = F.linear(inputs, weight.as_subclass(torch.Tensor), bias)
    return view.observe(Use(view.target, inputs, product, view.flipped, view.expert))


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """x W, or W x, of a watched W."""
    if isinstance(right, _WatchedWeight) and not isinstance(left, _WatchedWeight):
        view = right.seen_as
        product = torch.matmul(left, right.as_subclass(torch.Tensor))
        return view.observe(Use(view.target, left, product, not view.flipped, view.expert))
    assert isinstance(left, _WatchedWeight), "one of both is watched"
    if isinstance(right, _WatchedWeight) or right.ndim < 2:
        raise _lost(left, torch.matmul)
    view = left.seen_as
    product = torch.matmul(left.as_subclass(torch.Tensor), right)
    return view.observe(Use(view.target, right.mT, product.mT, view.flipped, view.expert)).mT
