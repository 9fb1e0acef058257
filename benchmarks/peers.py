"""The peers' methods as PEFT has them, on the weights that ours trains."""

from typing import Any, Literal

from osft.subspace import select_targets

Peer = Literal["lora", "peft_osf"]
LORA_RANK, LORA_ALPHA = 16, 32


def adapted(model: Any, peer: Peer, ratio: float | None = None) -> Any:
    """PEFT's model around `model`, whose layers it replaces in place; `ratio`: the share of directions that OSF trains.

    LoRA begins with a random matrix, of torch's global generator.
    """
    from peft import LoraConfig, OSFConfig, get_peft_model

    common: Any = {"target_modules": [target.name for target in select_targets(model)], "task_type": "CAUSAL_LM"}
    if peer == "lora":
        config: Any = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, **common)
    else:
        assert ratio is not None, "OSF trains a share of the directions"
        config = OSFConfig(effective_rank=1 - ratio, **common)  # its rank is the frozen one
    return get_peft_model(model, config)
