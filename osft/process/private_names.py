"""The private names of other packages that osft cannot do without: no other module uses one.

A function for each says what the name is for and why no public one does; it imports its package when it is called. A
release may drop a private name, or change it, without a word: `tests/test_private_names.py` notices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What `from_pretrained` keeps in another dtype than `dtype`: patterns of names of tensors, and the dtype of each.

    transformers shows it nowhere else: a model that is built from its configuration alone has `dtype` throughout.
    """
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return plan


def attention_of(config: PreTrainedConfig) -> str:
    """Which attention a model of this configuration computes with, "sdpa" for example.

    transformers documents the argument that chooses it, and nothing that tells what was chosen.
    """
    return str(config._attn_implementation)


def set_attention(config: PreTrainedConfig, attention: str) -> None:
    """Let models of this configuration, and of those in it, compute with `attention`.

    The public `set_attn_implementation` wants the kernel installed, and leaves out architectures that come without an
    exchangeable attention but make their masks by this name.
    """
    config._attn_implementation = attention


def onednn_linear() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] | None:
    """`x W^T + b` by oneDNN, of float32 tensors on a CPU, with no gradient; None where PyTorch does not have it.

    Nothing public chooses the library by which PyTorch multiplies such matrices. This is what its compiler takes.
    """
    import torch

    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    return None if operation is None else lambda x, weight, bias: operation(x, weight, bias, "none", [], "")


def experts_of(config: object) -> str | None:
    """How a model of this configuration multiplies with its experts; None where the configuration does not say."""
    implementation: str | None = getattr(config, "_experts_implementation", None)
    return implementation


def set_experts(config: PreTrainedConfig, implementation: str) -> None:
    """Let models of this configuration multiply with their experts by `implementation`.

    The public `set_experts_implementation` does nothing to a model that FSDP2 has sharded: it reads the source of the
    model's class, which is then FSDP2's.
    """
    config._experts_implementation = implementation


def has_flash_attention(model: PreTrainedModel) -> bool:
    """Whether the architecture can compute with kernels that get no mask: flash attention or flex attention.

    Asking transformers to set such a kernel needs the kernel's package, which a machine that plans a run may lack.
    """
    return bool(model._supports_flash_attn or model._supports_flex_attn)


def initialize(model: PreTrainedModel, module: nn.Module) -> None:
    """Give the parameters of one of the model's modules the values that its architecture begins with.

    The public `init_weights` does it to the whole model, of which most weights are too large for that here.
    """
    model._init_weights(module)


def map_tensors(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put `function(tensor)` into the place of every parameter and buffer, in all modules below, sharded or not.

    As `module.to` and `module.to_empty` do, which cannot tell tensors on the meta device from others.
    """
    module._apply(function)


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor's numbers were written over: two views of the same memory may have been other numbers.

    PyTorch keeps the count for its own checks and documents no way to it.
    """
    return int(tensor._version)


def hand_out_unread(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let FSDP2 gather nothing of these sharded parameters, whose values no forward or backward pass reads.

    What a pass gets in the place of one has its shape, the dtype in which FSDP2 would gather it, and a single element,
    NaN. The gradients are reduced as ever. Call it when all tensors are on their device.

    FSDP2's extension point (`fsdp_pre_all_gather` and `fsdp_post_all_gather` of the local tensor) is documented for
    subclasses of Tensor, which the optimizer's state would then be of, and makes a whole tensor of what is handed out.
    """
    import torch
    from torch import nn
    from torch.distributed.fsdp import FSDPModule

    unread = {id(parameter) for parameter in parameters}
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    for group in (group for state in states for group in state._fsdp_param_groups):
        for sharded in group.fsdp_params:
            if id(sharded.sharded_param) in unread:
                local: Any = sharded._sharded_local_tensor
                local.fsdp_pre_all_gather = lambda mesh, size, stride, module, policy: ((), None)
                local.fsdp_post_all_gather = lambda outputs, metadata, dtype, *, out: None
                sharded._init_extensions()
                dtype = sharded.mp_policy.param_dtype or sharded.sharded_param.dtype
                element = torch.full((), torch.nan, dtype=dtype, device=local.device)
                sharded._unsharded_param = nn.Parameter(element.expand(sharded.sharded_param.shape))
        # The dtype of what a group gathers is read off its first.
        group.fsdp_params.sort(key=lambda sharded: id(sharded.sharded_param) in unread)


def as_plain_tensors() -> AbstractContextManager[None]:
    """While this lasts, operations on a subclass of Tensor are those of Tensor, and their results plain tensors.

    Documented in PyTorch's notes on extending it, under this private name alone.
    """
    import torch

    disabled: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return disabled


def task_yaml(path: Path) -> dict[str, Any]:
    """A task of the lm-evaluation-harness from its YAML file: with what it includes, and its functions imported.

    The harness's public classes load a task only together with its data, whose paths then count from the working
    directory.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(path, resolve_func=True)
    return config
