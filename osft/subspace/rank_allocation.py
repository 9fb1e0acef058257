"""How many directions of each weight are frozen.

"uniform" freezes the same share of every weight. "adaptive" freezes more of the weights of important blocks, after the
section on layer importance and adaptive rank selection of arXiv:2504.07097: a block that changes its input little is
taken to carry knowledge on that new tasks must not overwrite, so its importance is the similarity of input and output,

    I(l) = mean over tokens of cos(input hidden state, output hidden state),

normalized to mean 1 over the L blocks, and the share of directions that block l retains is

    retention(l) = min_retention + I(l) (target_retention - min_retention).

Its mean over the blocks is target_retention. Here target_retention is 1 - unfreeze_rank_ratio, so that both
allocations freeze the same share on average (where nothing is clipped); all weights of a block get its ratio.

The paper's Y is the linear output W X of a layer. Input and output of a weight that is not square cannot be compared,
so a layer is a whole transformer block here; and the calibration sample is of the data at hand, where the paper takes
the previous task's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from osft.data.chat import Sample
from osft.data.packing import Feeding
from osft.data.samples import SampleList
from osft.models.likelihood import target_logits
from osft.models.loading import load_model
from osft.models.packed_attention import AttentionShape
from osft.settings.subspace import SubspaceConfig
from osft.subspace.decomposition import unfrozen_rank
from osft.subspace.targets import Target, transformer_blocks


def layer_importance(inputs: torch.Tensor, outputs: torch.Tensor) -> float:
    """Mean cosine similarity of a block's input and output hidden states, (num_tokens, hidden) each; in [-1, 1]."""
    return F.cosine_similarity(inputs.double(), outputs.double(), dim=-1).mean().item()


def retention_ratios(
    importance: Sequence[float], *, target_retention: float, min_retention: float = 0.1
) -> list[float]:
    """The share of singular directions that each block keeps frozen, from the blocks' importance (see above).

    `min_retention` is lowered to `target_retention` where it is above, which gives every block the same. Results are
    clipped to [min_retention, 1]. Raises ValueError if the mean importance is not positive: then it says nothing.
    """
    mean = sum(importance) / len(importance)
    if not mean > 0:
        raise ValueError(
            f"the blocks' mean importance is {mean:.4g}, not positive, so it cannot be normalized. Use "
            "rank_allocation='uniform' for this model"
        )
    lowest = min(min_retention, target_retention)
    ratios = (lowest + value / mean * (target_retention - lowest) for value in importance)
    return [min(max(ratio, lowest), 1.0) for ratio in ratios]


def allocation_settings(config: SubspaceConfig) -> tuple[str, float | None]:
    """`rank_allocation`, and `min_retention_ratio` where it matters: the uniform allocation has none."""
    rank_allocation = config.rank_allocation
    return rank_allocation, None if rank_allocation == "uniform" else config.min_retention_ratio


def allocate_ranks(
    targets: Sequence[Target], config: SubspaceConfig, importance: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Target name -> its number of unfrozen directions.

    `importance` (block name -> importance, as `measure_importance` gives it) is for the adaptive allocation. Raises
    ValueError, naming the weight, where nothing would be left to train, or where `importance` is missing.
    """
    rank_allocation, min_retention = allocation_settings(config)
    ratios: dict[str, float] = {}
    if min_retention is not None:
        if not importance:
            raise ValueError(
                f"rank_allocation={rank_allocation!r} needs the blocks' importance. Measure it on a calibration sample "
                "with `osft.subspace.rank_allocation.measure_importance`"
            )
        retained = retention_ratios(
            list(importance.values()),
            target_retention=1 - config.unfreeze_rank_ratio,
            min_retention=min_retention,
        )
        ratios = {block: 1 - ratio for block, ratio in zip(importance, retained, strict=True)}
    ranks = {}
    for target in targets:
        block = next((name for name in ratios if target.name.startswith(f"{name}.")), None)
        if ratios and block is None:
            raise ValueError(f"the importance measured is that of another model: it has no block of {target.name}")
        ratio = config.unfreeze_rank_ratio if block is None else ratios[block]
        try:
            ranks[target.name] = unfrozen_rank(target.shape, ratio)
        except ValueError as error:
            remedy = "Raise unfreeze_rank_ratio, or leave the weight out with target_patterns"
            if block is not None:
                remedy = (
                    f"The adaptive allocation freezes {1 - ratio:.2%} of block {block}, of importance "
                    f"{(importance or {})[block]:.3f}. Raise unfreeze_rank_ratio or use rank_allocation='uniform'"
                )
            raise ValueError(f"{target.name}: {error}. {remedy}") from None
    return ranks


@torch.no_grad()
def measure_importance(
    model_path: str | Path,
    samples: Sequence[Sample],
    *,
    feeding: Feeding,
    dtype: torch.dtype = torch.float32,
    attention: Sequence[AttentionShape] = (),
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """Importance of each transformer block on a calibration sample: block name -> mean cosine over all its tokens.

    The whole model is loaded, with `attention` as of `load_model`. Raises ValueError without samples, or for one that
    no micro-batch can hold.
    """
    if not samples:
        raise ValueError("there is no calibration sample to measure the blocks' importance on")
    model = load_model(
        model_path, dtype=dtype, device=feeding.device, attention=attention, trust_remote_code=trust_remote_code
    )
    stack, blocks = transformer_blocks(model)
    sums = dict.fromkeys((f"{stack}.{index}" for index in range(len(blocks))), 0.0)
    tokens, is_token = 0, torch.empty(0)

    def add(name: str) -> Any:
        def hook(_block: Any, positional: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            hidden = positional[0] if positional else named["hidden_states"]
            changed = output if isinstance(output, torch.Tensor) else output[0]
            chosen = is_token.to(changed.device)  # a block's own GPU
            before, after = hidden.to(changed.device)[chosen], changed[chosen]
            sums[name] += layer_importance(before, after) * int(is_token.sum())

        return hook

    for name, block in zip(sums, blocks, strict=True):
        block.register_forward_hook(add(name), with_kwargs=True)
    for _, batch in feeding.batches(SampleList(samples)):
        is_token = batch.is_token
        target_logits(model, batch)
        tokens += int(is_token.sum())
    return {name: total / tokens for name, total in sums.items()}
