"""`torch.compile` of the transformer blocks: their element-wise operations are fused into a few kernels.

One graph serves all blocks that are alike, and micro-batches of any length. Compiled again is what differs in kind: the
first block, whose input needs no gradient; a micro-batch of one sample, which has no mask; a forward pass without
gradients. Order as in torchtitan: gradient checkpointing within what is compiled, and FSDP2 around it.
"""

import shutil

from torch import nn

from osft.settings.training import TrainConfig
from osft.subspace.targets import transformer_blocks

_COMPILERS = ("g++", "clang++", "gcc", "clang")


def check_compiler(config: TrainConfig) -> None:
    """Raise ValueError if blocks are to be compiled and there is nothing that compiles them."""
    if config.torch_compile and not any(map(shutil.which, _COMPILERS)):
        raise ValueError(
            f"torch_compile=True needs a C++ compiler ({', '.join(_COMPILERS)}), and there is none here. Install one, "
            "or leave it out"
        )


def compile_blocks(model: nn.Module) -> None:
    """Let the transformer blocks compute compiled, from their first call. Names of tensors and modules stay."""
    for block in transformer_blocks(model)[1]:
        block.compile(dynamic=True)
