"""The documentation of the training parameters in groups, for `osft train --help` and the reference."""

from osft.settings.parameters import Parameter, parameters
from osft.settings.training import TrainConfig

GROUPS: dict[str, tuple[str, ...]] = {
    "Required": (
        *("model_path", "data_path", "unfreeze_rank_ratio", "effective_batch_size", "max_tokens_per_gpu"),
        *("max_seq_len", "learning_rate", "ckpt_output_dir"),
    ),
    "Data": (
        *("data_output_dir", "use_processed_dataset", "unmask_messages", "is_pretraining", "block_size"),
        *("document_column_name", "replay_ratio", "replay_data"),
    ),
    "Subspace": (
        *("target_patterns", "protect", "stiffness", "calibration_tokens", "calibration_data"),
        *("calibration_temperature", "calibration_seed", "free_subspace", "rank_allocation", "min_retention_ratio"),
        *("calibration_samples", "factors"),
    ),
    "Optimization": (
        *("num_epochs", "max_steps", "lr_scheduler", "warmup_steps", "lr_scheduler_kwargs", "weight_decay", "beta1"),
        *("beta2", "eps", "max_grad_norm", "seed", "deterministic"),
    ),
    "Drift": ("distill_weight", "distill_tokens", "fit_step", "step_scales", "max_step_drift", "selection_samples"),
    "Validation": ("validation_split", "validation_data_path", "validation_frequency", "save_best_val_loss"),
    "Checkpoints": (
        *("checkpoint_at_epoch", "save_final_checkpoint", "save_dtype", "save_rounding"),
        *("save_state_minutes", "save_state_steps", "resume"),
    ),
    "Processes": (
        *("nproc_per_node", "nnodes", "node_rank", "rdzv_id", "rdzv_endpoint", "master_addr", "master_port"),
        *("rdzv_timeout_minutes", "process_group_timeout_minutes", "dry_run"),
    ),
    "Model and kernels": (
        *("use_liger", "gradient_checkpointing", "attn_implementation", "dtype", "trust_remote_code"),
    ),
    "Logging": (
        *("mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name", "wandb_project", "wandb_entity"),
        *("wandb_run_name", "tensorboard_log_dir"),
    ),
}
"""Title -> names, in the order in which they are shown."""


def grouped_parameters() -> dict[str, list[Parameter]]:
    """Title -> parameters. What no group names, a setting of a newer engine, is under "Other"."""
    known = dict(parameters(TrainConfig))
    groups = {title: [known.pop(name) for name in names if name in known] for title, names in GROUPS.items()}
    return groups | ({"Other": list(known.values())} if known else {})


def default_text(parameter: Parameter) -> str:
    """The default as one would write it in Python, or "required"."""
    return "required" if parameter.required else repr(parameter.default)


def one_paragraph(parameter: Parameter) -> str:
    """The documentation without the line breaks of the source, and with the bounds of a number."""
    text = " ".join(parameter.doc.split())
    return f"{text} ({parameter.bounds})" if parameter.bounds else text
