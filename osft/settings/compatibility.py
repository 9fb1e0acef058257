"""Parameters of training_hub 0.11.2 and its backends by their own names: what each one is here.

`osft()` there hands every keyword on to mini-trainer 0.9.0, whose names differ, and scripts that are moved from its
other algorithms bring theirs. `translated` maps what has a counterpart, and says in a line what replaces the rest. What
is in no table is refused, with the nearest name.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

RENAMED: dict[str, str] = {
    # mini-trainer's names for the parameters of `osft()`
    "model_name_or_path": "model_path",
    "batch_size": "effective_batch_size",
    "output_dir": "ckpt_output_dir",
    "osft_unfreeze_rank_ratio": "unfreeze_rank_ratio",
    "osft_target_patterns": "target_patterns",
    "num_warmup_steps": "warmup_steps",
    "max_epochs": "num_epochs",
    "use_liger_kernels": "use_liger",
    "train_dtype": "dtype",
    "resume_from_full_state_checkpoint": "resume",
    # instructlab-training's and the LoRA algorithm's
    "random_seed": "seed",
    "max_batch_len": "max_tokens_per_gpu",
    "target_modules": "target_patterns",
    "eval_steps": "validation_frequency",
}
"""Name there -> field of `TrainConfig` that takes the value."""

_ALWAYS = "is what always happens here"
WITHOUT_EFFECT: dict[str, str] = {
    "osft_upcast_dtype": "the bases and the coefficients are always computed in float32",
    "osft_memory_efficient_init": f"{_ALWAYS}: weights are read one by one, straight into the shards",
    "on_demand_checkpointing": f"{_ALWAYS}: a run that is asked to end (SIGTERM) saves its state, and resumes from it",
    "enable_jit_checkpoint": f"{_ALWAYS}: a run that is asked to end (SIGTERM) saves its state, and resumes from it",
    "checkpoint_storage": "give the URI as ckpt_output_dir: models, metrics and training state are published to it",
    "min_samples_per_checkpoint": "checkpoint_at_epoch writes models, save_state_steps the state to resume from",
    "max_tokens": "max_steps ends training early",
    "val_loss_improvement_threshold": "save_best_val_loss keeps every model that is better than those before",
    "validate_at_final": f"{_ALWAYS}: the last step is validated",
    # instructlab-training's
    "fsdp_options": "weights and optimizer are sharded over all processes (FSDP2); there is nothing to set",
    "deepspeed_options": "weights and optimizer are sharded over all processes (FSDP2); there is nothing to set",
    "distributed_backend": "weights and optimizer are sharded over all processes (FSDP2); there is nothing to set",
    "cpu_offload_params": "the base weights are not trained and need no optimizer; lower max_tokens_per_gpu for memory",
    "cpu_offload_optimizer": "the optimizer holds only the coefficients; lower max_tokens_per_gpu for memory",
    "accelerate_full_state_at_epoch": "save_state_minutes and save_state_steps save the state to resume from",
    "save_samples": "checkpoint_at_epoch writes models, save_state_steps the state to resume from",
    "keep_last_checkpoint_only": "without checkpoint_at_epoch there is one model, that of the end",
    "is_padding_free": f"{_ALWAYS}: samples are packed without padding",
    "sample_packing": f"{_ALWAYS}: samples are packed without padding, up to max_tokens_per_gpu",
    "chat_tmpl_path": "the tokenizer's own chat template is used; put the template into the model's folder",
    "use_legacy_tmpl": "the tokenizer's own chat template is used; put the template into the model's folder",
    "process_data": "use_processed_dataset says that the data is tokenized",
    "num_cpu_procs": "the data is tokenized in this process",
    "mock_data": "give data_path the data",
    "mock_data_len": "give data_path the data",
    "log_level": "the level is that of OSFT_LOG_LEVEL in the environment",
    "logging_steps": "every step is in metrics.jsonl, and in MLflow, W&B and TensorBoard where they are asked for",
    # The LoRA algorithm's
    **dict.fromkeys(
        ("lora", "lora_r", "lora_alpha", "lora_dropout", "lora_quant_bits", "use_rslora", "use_dora"),
        "there is no adapter: unfreeze_rank_ratio says how many directions of each weight learn",
    ),
    **dict.fromkeys(
        (
            *("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype"),
            *("bnb_4bit_use_double_quant", "quantize_dtype"),
        ),
        "weights are not quantized: their singular directions would be those of the quantized ones",
    ),
    **dict.fromkeys(
        ("micro_batch_size", "gradient_accumulation_steps"),
        "both follow from effective_batch_size and max_tokens_per_gpu",
    ),
    "tf32": "torch's own setting holds: torch.set_float32_matmul_precision",
    "save_steps": "checkpoint_at_epoch writes models, save_state_steps the state to resume from",
    "save_total_limit": "all models that are asked for stay, of training states the newest",
    "dataset_type": "what a record holds is seen from its keys",
    "field_messages": "what a record holds is seen from its keys",
    "field_instruction": "what a record holds is seen from its keys",
    "field_input": "what a record holds is seen from its keys",
    "field_output": "what a record holds is seen from its keys",
}
"""Name there -> what replaces it, the line that is logged where it asks for something."""

_NEUTRAL: dict[str, Any] = {
    "osft_upcast_dtype": "float32",
    "checkpoint_storage": "pvc",
    "max_tokens": 0,
    "val_loss_improvement_threshold": 0,
    "validate_at_final": False,
    "lora_r": 0,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "cpu_offload_params": False,
    "cpu_offload_optimizer": False,
    "mock_data": False,
    "use_legacy_tmpl": False,
    "keep_last_checkpoint_only": False,
    "dataset_type": "chat_template",
    "field_messages": "messages",
}
"""The value that asks for nothing; nothing is said of it."""

_DTYPES = {
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    **dict.fromkeys(("float32", "fp32", "float"), "float32"),
    "auto": "auto",
}


@dataclass(frozen=True, slots=True)
class Special:
    """A name whose value has to be read to know what it is here."""

    apply: Callable[[dict[str, Any], Any], str]
    """Puts the fields in place of the value; returns the line to log, or an empty one."""
    meaning: str


def _osft(values: dict[str, Any], given: Any) -> str:
    if given in (True, "true"):
        return ""
    values["unfreeze_rank_ratio"] = 1.0
    return "osft=False: nothing is frozen in the target weights (unfreeze_rank_ratio=1.0); the rest is not trained"


def _training_mode(values: dict[str, Any], given: Any) -> str:
    mode = str(getattr(given, "value", given)).lower()
    if mode == "epoch":
        values.pop("max_steps", None)  # which mini-trainer looks at in the mode "step" only
        return ""
    if mode != "step":
        raise ValueError(
            f"training_mode={mode!r} is none of 'epoch' and 'step'. Give num_epochs or max_steps; a callback that "
            "raises StopTraining ends training at any step"
        )
    if not values.get("max_steps"):
        raise ValueError("training_mode='step' needs max_steps")
    values["num_epochs"] = values["max_steps"]  # an epoch has a step at least, so max_steps is what ends it
    return ""


def _pretraining_config(values: dict[str, Any], given: Any) -> str:
    size = given.get("block_size") if isinstance(given, Mapping) else getattr(given, "block_size", None)
    _agree(values, "is_pretraining", True, "pretraining_config")
    _agree(values, "block_size", size, "pretraining_config")
    return ""


def _min_samples_per_validation(values: dict[str, Any], given: Any) -> str:
    steps = max(1, math.ceil(float(given) / float(values.get("effective_batch_size") or 1)))
    values.setdefault("validation_frequency", steps)
    return f"min_samples_per_validation: here it is validation_frequency={values['validation_frequency']} steps"


def _validate_at_epoch(values: dict[str, Any], given: Any) -> str:
    if given in (True, "true") and values.get("validation_frequency"):
        return "validate_at_epoch has no effect: validation_frequency says when, and the last step is always validated"
    return ""


def _bf16(values: dict[str, Any], given: Any) -> str:
    if given:
        _agree(values, "dtype", "bfloat16", "bf16")
    return ""


def _fp16(values: dict[str, Any], given: Any) -> str:
    if given:
        raise ValueError("fp16=True: nothing is computed in float16 here, which needs scaling. Give dtype='bfloat16'")
    return ""


def _flash_attention(values: dict[str, Any], given: Any) -> str:
    if given:
        _agree(values, "attn_implementation", "flash_attention_2", "flash_attention")
    return ""


def _disable_flash_attn(values: dict[str, Any], given: Any) -> str:
    if given:
        _agree(values, "attn_implementation", "sdpa", "disable_flash_attn")
    return ""


SPECIAL: dict[str, Special] = {
    "osft": Special(_osft, "False: unfreeze_rank_ratio=1.0"),
    "training_mode": Special(_training_mode, '"epoch": num_epochs; "step": max_steps; others are refused'),
    "pretraining_config": Special(_pretraining_config, "is_pretraining=True and its block_size"),
    "min_samples_per_validation": Special(_min_samples_per_validation, "validation_frequency, in steps"),
    "validate_at_epoch": Special(_validate_at_epoch, "what happens unless validation_frequency is given"),
    "bf16": Special(_bf16, "dtype='bfloat16'"),
    "fp16": Special(_fp16, "refused where it is True: give dtype='bfloat16'"),
    "flash_attention": Special(_flash_attention, "attn_implementation='flash_attention_2'"),
    "disable_flash_attn": Special(_disable_flash_attn, "attn_implementation='sdpa'"),
}
"""Name there -> what is done with its value."""

NAMES = (*RENAMED, *SPECIAL, *WITHOUT_EFFECT)
"""All names of this module. None is that of a field of `TrainConfig`."""


def translated(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with the names of `TrainConfig` only; what neither knows stays. None stands for the default and goes.

    What has no counterpart is told in a warning.

    Raises ValueError for two names of one setting with different values, and for values that cannot be here.
    """
    values = {name: value for name, value in given.items() if value is not None and name not in NAMES}
    if values.get("max_steps") in (0, "0"):  # mini-trainer's word for no limit
        del values["max_steps"]
    for name in ("dtype", "save_dtype"):
        if name in values:
            values[name] = _dtype(name, values[name])
    for name, value in given.items():
        if value is None:
            continue
        if name in RENAMED:
            _agree(values, RENAMED[name], _read(name, value), name)
        elif name in WITHOUT_EFFECT and not (name in _NEUTRAL and value == _NEUTRAL[name]):
            if name == "checkpoint_storage":
                _check_storage(value)
            always = WITHOUT_EFFECT[name].startswith(_ALWAYS)
            logger.warning(f"osft: {name} {'' if always else 'has no effect: '}{WITHOUT_EFFECT[name]}")
    for name, special in SPECIAL.items():
        if given.get(name) is not None and (line := special.apply(values, given[name])):
            logger.warning(f"osft: {line}")
    return values


def _agree(values: dict[str, Any], field: str, value: Any, name: str) -> None:
    """Set a field, which is there already with the same value or not at all."""
    if value is None:
        return
    if field in values and str(values[field]) != str(value):
        raise ValueError(
            f"{name}={value!r} and {field}={values[field]!r} are one setting with two values. Give one of them"
        )
    values.setdefault(field, value)


def _read(name: str, value: Any) -> Any:
    """A value as the field of the other name takes it."""
    if RENAMED[name] == "target_patterns":
        names = [part.strip(" '\"") for part in value.split(",")] if isinstance(value, str) else value
        return None if names in (["all-linear"], []) else list(names)
    return _dtype(name, value) if RENAMED[name] == "dtype" else value


def _dtype(name: str, value: Any) -> str:
    """A dtype's name, for torch's own and the usual short ones."""
    known = _DTYPES.get(str(value).lower().removeprefix("torch."))
    if known is None:
        raise ValueError(f"{name} must be 'bfloat16' or 'float32' (or 'auto'), got {value!r}")
    return known


def _check_storage(value: Any) -> None:
    if not (isinstance(value, str) and "://" in value):
        raise ValueError(f"checkpoint_storage must be 'pvc' or a URI such as s3://bucket/prefix, got {value!r}")
