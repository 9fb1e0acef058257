"""The peers' methods: those of PEFT, on the weights that ours trains, and mini-trainer's OSFT on its own choice.

mini-trainer is no dependency of this project: `make bench` installs it, as pinned in benchmarks/peers.txt and without
what it requires, into a folder of its own, so that it runs with the same torch and transformers as the others.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from osft.subspace import select_targets

Peer = Literal["lora", "peft_osf"]
LORA_RANK, LORA_ALPHA = 16, 32
MINI_TRAINER = Path(sys.prefix) / "peers"


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


def mini_trainer_model(model: Any, ratio: float) -> Any:
    """mini-trainer's OSFT of a Llama's weights; it trains embeddings, norms and the head too, as it is published."""
    osft = mini_trainer()
    with contextlib.redirect_stdout(sys.stderr):
        config = osft.auto_generate_target_osft_config(model, model_name_or_class="llama", rank_ratio=1 - ratio)
        made = osft.create_osft_model_class(type(model))(
            model.config, osft_config=config, initialize_osft=False, output_dtype=model.dtype
        )
        made.load_state_dict(model.state_dict())
        made.to(device=model.device, dtype=model.dtype)
        made.reinitialize_osft(decompose_existing_weights=True)
    return made


def mini_trainer_merged(model: Any) -> Callable[[str], torch.Tensor]:
    """The weights of mini-trainer's model as they would be saved, by the names of their modules."""
    with contextlib.redirect_stdout(sys.stderr):
        state = model.prepare_state_dict_for_save({name: value.clone() for name, value in model.state_dict().items()})
    return lambda name: state[f"{name}.weight"]


def project_steps_(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Have mini-trainer project gradients before and parameters after each step, as its own training does."""
    mini_trainer().optim_wrapper(optimizer, model)


def mini_trainer() -> Any:
    """Its module of OSFT."""
    if str(MINI_TRAINER) not in sys.path:
        sys.path.append(str(MINI_TRAINER))  # last: what it shares with this environment comes from here
    try:
        return importlib.import_module("mini_trainer.osft_utils")
    except ImportError as error:
        raise ValueError(
            f"mini-trainer, which is compared with, is not in {MINI_TRAINER}: run `make bench` ({error})"
        ) from None
