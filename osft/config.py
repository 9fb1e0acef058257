"""What a user sets, validated where it is set.

Every check that needs no file or model happens in `__post_init__`, so that a bad value stops a run before
anything is read. A value that a user can get wrong raises ValueError (TypeError's cases included: the
documented contract knows ValueError only).
"""

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

FreeSubspace = Literal["complement", "core"]


def _number(name: str, value: Any, *, low: float, high: float = float("inf"), whole: bool = False) -> None:
    """Refuse `value` unless it is a number (an integer if `whole`) in [low, high]."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        wanted = "an integer" if whole else "a number"
        raise ValueError(f"{name} must be {wanted}, got {value!r} ({type(value).__name__})")
    if not low <= value <= high:
        limits = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limits}, got {value!r}")


@dataclass(kw_only=True, slots=True)
class SubspaceConfig:
    """Which weights learn, and in which directions."""

    unfreeze_rank_ratio: float
    """Share of each target weight's singular directions that may be trained, in (0, 1]; the smallest singular
    values come first. 0.25 is a good start, 1.0 constrains nothing."""

    free_subspace: FreeSubspace = "complement"
    """"complement": every update orthogonal to the frozen directions on both sides, the reachable set of the
    published method. "core": only updates between the unfrozen singular vectors themselves (least memory)."""

    target_patterns: list[str] | None = None
    """Regular expressions searched in the full module name. None: every linear layer of the transformer blocks."""

    def __post_init__(self) -> None:
        _number("unfreeze_rank_ratio", self.unfreeze_rank_ratio, low=0.0, high=1.0)
        if self.unfreeze_rank_ratio == 0:
            raise ValueError(
                "unfreeze_rank_ratio is 0: every direction would be frozen and there is nothing to train. "
                "Choose a value in (0, 1], for example 0.25"
            )
        if self.free_subspace not in get_args(FreeSubspace):
            raise ValueError(f"free_subspace must be one of {get_args(FreeSubspace)}, got {self.free_subspace!r}")
        if isinstance(self.target_patterns, str):
            raise ValueError(f"target_patterns must be a list of strings, got the string {self.target_patterns!r}")
        for pattern in self.target_patterns or []:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(f"target_patterns: {pattern!r} is not a regular expression: {error}") from None


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """One training run: processed data in, a plain Hugging Face checkpoint out."""

    model_path: str
    """Folder of the model to tune (config.json and safetensors)."""

    data_path: str
    """Folder that `osft.data.prepare` wrote."""

    factors_path: str
    """Manifest of the factor set that `osft.subspace.factor_store.precompute` wrote for this model."""

    output_dir: str
    """Where `checkpoint/` (the final model), `metrics.jsonl` and `training.json` are written."""

    subspace: SubspaceConfig
    """Which weights learn, and in which directions."""

    effective_batch_size: int = 32
    """Samples per optimizer step, over all processes and accumulation steps."""

    max_tokens_per_gpu: int = 2048
    """Hard bound on the tokens of one micro-batch of one process."""

    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""

    num_epochs: int = 1
    """Passes over the training set."""

    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever `num_epochs` says."""

    lr_scheduler: str = "cosine"
    """A scheduler name that `transformers.get_scheduler` knows."""

    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0 to its peak."""

    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW. It acts on the update, not on the model: it pulls back to the base model."""

    beta1: float = 0.9
    """AdamW's decay of the gradient's first moment."""

    beta2: float = 0.95
    """AdamW's decay of the gradient's second moment."""

    eps: float = 1e-8
    """AdamW's term for numerical stability."""

    max_grad_norm: float = 1.0
    """Clip the gradient's global 2-norm to this; 0 turns clipping off."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    attn_implementation: str = "sdpa"
    """Attention kernel, as `transformers` names it."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Computation dtype. "auto": bfloat16 on CUDA, float32 on CPUs. The trained coefficients are always float32."""

    seed: int = 42
    """Seed of the sample order."""

    nproc_per_node: int | None = None
    """Processes to start. None: one per visible GPU, or one on a machine without."""

    trust_remote_code: bool = False
    """Run Python code that the model's repository brings along. Leave off unless you have read it."""

    def __post_init__(self) -> None:
        if isinstance(self.subspace, dict):
            self.subspace = SubspaceConfig(**self.subspace)
        for name in ("model_path", "data_path", "factors_path", "output_dir"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} must be a non-empty string, got {value!r}")
        for name in ("effective_batch_size", "max_tokens_per_gpu", "num_epochs"):
            _number(name, getattr(self, name), low=1, whole=True)
        for name in ("max_steps", "nproc_per_node"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), low=1, whole=True)
        _number("warmup_steps", self.warmup_steps, low=0, whole=True)
        _number("seed", self.seed, low=0, whole=True)
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "eps"):
            _number(name, getattr(self, name), low=0.0)
        for name in ("beta1", "beta2"):
            _number(name, getattr(self, name), low=0.0, high=1.0)
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype must be auto, float32 or bfloat16, got {self.dtype!r}")
        from transformers import SchedulerType

        known = [scheduler.value for scheduler in SchedulerType]
        if self.lr_scheduler not in known:
            raise ValueError(f"lr_scheduler {self.lr_scheduler!r} is unknown; known are {', '.join(known)}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values; `TrainConfig(**d)` restores them."""
        return asdict(self)
