"""What a user sets of a training run, validated where it is set.

Every check that needs no file or model happens in `__post_init__`, so that a bad value stops a run before
anything is read. A value that a user can get wrong raises ValueError that names the parameter (a wrong type
included: the documented contract knows ValueError only).
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from osft.settings import compatibility, schedule
from osft.settings.parameters import Bounds, parameters, refuse_unknown
from osft.settings.subspace import DEFAULT_STIFFNESS, SubspaceConfig
from osft.storage.paths import expanded

if TYPE_CHECKING:
    from torch.optim import Optimizer

Rounding = Literal["nearest", "stochastic", "compensated"]


@dataclass(kw_only=True, slots=True)
class TrainConfig(SubspaceConfig):
    """Everything that a training run depends on: the parameters of `osft()`, of `osft train` and of the component."""

    model_path: str
    """Folder of the model to tune (config.json and safetensors), a path or a URI such as `s3://bucket/model`; or its
    Hugging Face id, `org/name` or `org/name@revision`."""

    data_path: str
    """Training data: a file, a folder of files or a glob, as a path or an `s3://` URI, or the id of a Hugging Face data
    set, `org/name` or `org/name@revision`. JSON lines, a JSON array, CSV and TSV, also compressed, Parquet, Arrow, and
    what `datasets` saved. See `use_processed_dataset` and `is_pretraining` for what a record holds; otherwise it is a
    chat, {"messages": [{"role": …, "content": …}, …]}, or in a form that is converted: ShareGPT, Alpaca,
    prompt/completion, question/answer."""

    effective_batch_size: Annotated[int, Bounds(low=1)]
    """Samples per optimizer step, over all processes and accumulation steps."""

    max_tokens_per_gpu: Annotated[int, Bounds(low=1)]
    """Hard bound on the tokens of one micro-batch of one process. The way to less memory, with no effect on the
    result: more micro-batches make up a step."""

    max_seq_len: Annotated[int, Bounds(low=2)]
    """Longest sample in tokens; longer ones are dropped, and their number and share of tokens reported."""

    learning_rate: Annotated[float, Bounds(low=0.0)]
    """Peak learning rate of AdamW."""

    ckpt_output_dir: str
    """Folder for checkpoints (`hf_format/samples_<n>.0`, plain Hugging Face models), metrics and training state. With
    an `s3://` URI the run writes to a scratch folder (OSFT_SCRATCH), and all of it is published to the URI as it
    comes; a node that is restarted, with an empty scratch folder, resumes from there. See osft/storage."""

    data_output_dir: str | None = None
    """Folder for prepared data and factors, a path or an `s3://` URI. None: `_internal_data_processing` in
    ckpt_output_dir. Shared between runs, it spares them the work: what is in it is found by content."""

    use_processed_dataset: bool = False
    """data_path is already tokenized for this model: records with `input_ids` and `labels` (JSON lines, Parquet, or a
    folder of `datasets`), where a label of -100 takes a token out of the loss."""

    unmask_messages: bool = False
    """Loss on all messages but the system's. False: on the assistant's. A record decides for itself with
    `"unmask": true`."""

    is_pretraining: bool = False
    """Train on raw documents: they are joined, an end-of-text token after each, and cut into blocks of exactly
    block_size tokens, with loss on all. The remainder that fills no block is dropped and reported."""

    block_size: Annotated[int | None, Bounds(low=2)] = None
    """Tokens of a block. Required with is_pretraining, and of no use without."""

    document_column_name: str = "document"
    """With is_pretraining: the key of a record's text."""

    replay_ratio: Annotated[float, Bounds(low=0.0, high=0.99)] = 0.0
    """Share of the training samples that is drawn from replay_data, earlier data, so that training on new data does not
    move the model away from what it learned before. The datasets of replay_data take turns; no sample comes twice in an
    epoch. With too few there, all are taken, which is reported."""

    replay_data: list[str] | None = None
    """With replay_ratio: the earlier data, each as data_path, or the folder of a dataset that this package prepared
    (`data/<hash>` in data_output_dir). What is held out, there or here, is not replayed."""

    num_epochs: Annotated[int, Bounds(low=1)] = 1
    """Passes over the training set."""

    max_steps: Annotated[int | None, Bounds(low=1)] = None
    """Stop after this many optimizer steps, whatever num_epochs says."""

    lr_scheduler: str = "cosine"
    """A learning-rate schedule by its name in `transformers` (`SchedulerType`): cosine, linear, constant,
    cosine_with_min_lr, …"""

    warmup_steps: Annotated[int, Bounds(low=0)] = 0
    """Steps over which the learning rate rises linearly from 0 to its peak."""

    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of the schedule, such as {"min_lr": "1e-6"}. Strings that are numbers, true or false become
    those."""

    weight_decay: Annotated[float, Bounds(low=0.0)] = 0.0
    """Decoupled weight decay of AdamW. It acts on the update, not on the model: it pulls back to the base model."""

    beta1: Annotated[float, Bounds(low=0.0, high=1.0)] = 0.9
    """AdamW's decay of the gradient's first moment."""

    beta2: Annotated[float, Bounds(low=0.0, high=1.0)] = 0.95
    """AdamW's decay of the gradient's second moment."""

    eps: Annotated[float, Bounds(low=0.0)] = 1e-8
    """AdamW's term for numerical stability."""

    stiffness: Annotated[float, Bounds(low=0.0)] = DEFAULT_STIFFNESS
    """With protect="activations": how much the free directions are held back, each by the energy that it carries. After
    each optimizer step a coefficient of direction j is divided by 1 + learning_rate * stiffness * c_j, with c_j its
    curvature as a multiple of the model's mean and in units of the weights' size, so that one value serves all models:
    a direction of mean curvature can move a weight by about 1 / stiffness of its size. The mean is over all that is
    protected, which shares it: a later round learns as easily as the first. 0: not at all. The default was best of
    1,000, 3,000, 10,000 and 30,000 in benchmarks/results/frontier_cuda.md, and the optimum is broad."""

    max_grad_norm: Annotated[float, Bounds(low=0.0)] = 1.0
    """Clip the gradient's global 2-norm to this; 0 turns clipping off."""

    distill_weight: Annotated[float, Bounds(low=0.0)] = 0.0
    """Weight of self-distillation: adds distill_weight * KL(start || current), in nats per token of text that the model
    wrote itself before it was trained, to the loss. It needs no old data. 0: none."""

    distill_tokens: Annotated[int, Bounds(low=2)] = 64
    """With distill_weight: tokens of that text in an optimizer step. Their share of a step's tokens is about what
    distillation costs in time."""

    fit_step: bool = False
    """When training ends, try the update at each of step_scales, with the exact weights, and write the model with the
    largest gain whose drift is at most max_step_drift (osft/training/fitting.py). The gain is measured on
    selection_samples training samples that are held out for it, the drift on text that the model wrote itself."""

    step_scales: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])
    """With fit_step: the factors of the update that are tried, each in (0, 1]."""

    max_step_drift: Annotated[float, Bounds(low=0.0)] = 0.05
    """With fit_step: the most that the model may move, as KL(start || tuned) in nats per token."""

    selection_samples: Annotated[int, Bounds(low=16)] = 64
    """With fit_step: training samples that are held out for it, by the hash of their prompt: at most a tenth of them,
    but 16 at least. Training, validation and evaluation do not use them."""

    seed: Annotated[int, Bounds(low=0)] = 42
    """Seed of the sample order. The same seed on the same machine gives the same losses, bit for bit on a CPU and, with
    deterministic, on CUDA. Dropout is off: with it the losses would depend on how the work is cut."""

    deterministic: bool = False
    """On CUDA, use algorithms that give the same result twice, where there are such; they are slower. Without, two runs
    differ in the last digits. A CPU's always do."""

    validation_split: Annotated[float, Bounds(low=0.0, high=0.99)] = 0.0
    """Share of the data that is held out for the validation loss. Which side a record falls on depends on its
    content only."""

    validation_data_path: str | None = None
    """Data for the validation loss, of the same kind as data_path. Instead of validation_split."""

    validation_frequency: Annotated[int | None, Bounds(low=1)] = None
    """Optimizer steps between two validations. None: at the end of each epoch. The last step is always validated."""

    save_best_val_loss: bool = False
    """Also keep the model with the lowest validation loss, as `hf_format/samples_<n>.0_best_val_loss`."""

    checkpoint_at_epoch: bool = False
    """Write a model at the end of each epoch."""

    save_final_checkpoint: bool = True
    """Write the model when training ends."""

    save_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the weights in the written models. "auto": as they came. Where it cannot hold what was learned, the rest
    is kept beside the weights, in the folder `exact/`, from which a next run starts (osft/models/checkpoint.py)."""

    save_rounding: Rounding = "stochastic"
    """How weights are rounded where the files' dtype cannot hold them exactly (osft/models/rounding.py). "stochastic":
    without bias, so that the served model has what was learned, with a little noise. "nearest": least noise, but most
    of what small learning rates learn is lost. "compensated": errors are passed on so that what the layers compute
    changes least, as in GPTQ, by the moments of their inputs over calibration_samples training samples (experts:
    nearest)."""

    save_state_minutes: Annotated[float, Bounds(low=0.0)] = 15.0
    """Minutes between two savings of the training state (coefficients, optimizer, position), from which a run that
    was killed goes on. 0: only when the run is asked to end (SIGTERM)."""

    save_state_steps: Annotated[int | None, Bounds(low=1)] = None
    """Optimizer steps between two savings of the training state. None: by the clock only."""

    resume: str = "auto"
    """"auto": resume from the newest training state of the same run in ckpt_output_dir, and return a finished run as it
    is. "off": start over; what the folder holds of an earlier run is replaced. Else the path or URI of a training
    state, `…/state/step-<n>`."""

    nproc_per_node: Annotated[int | Literal["auto", "gpu"], Bounds(low=1)] = "auto"
    """Processes on this node. "gpu": one per GPU. "auto": the same, or one on a machine without a GPU."""

    nnodes: Annotated[int, Bounds(low=1)] = 1
    """Nodes that train together; call the function on each of them."""

    node_rank: Annotated[int, Bounds(low=0)] = 0
    """Rank of this node, from 0 to nnodes - 1. Node 0 is the master and writes the checkpoints."""

    rdzv_id: int | str | None = None
    """Id of the job, the same on all nodes. None: a random one on a single node, else "osft"."""

    rdzv_endpoint: str | None = None
    """Where the nodes meet, "host:port" of node 0. Required with more than one node, unless master_addr is given."""

    master_addr: str | None = None
    """Host of node 0; instead of rdzv_endpoint, with master_port."""

    master_port: Annotated[int | None, Bounds(low=1, high=65535)] = None
    """Port of node 0 that goes with master_addr. None: 29500, as torchrun."""

    rdzv_timeout_minutes: Annotated[float, Bounds(low=0.01)] = 15.0
    """How long a node waits for the others to come. A single node waits for none."""

    process_group_timeout_minutes: Annotated[float, Bounds(low=0.01)] = 30.0
    """How long a process waits for another one in a collective operation (NCCL, gloo) before it gives the run up.
    Longer than rank 0 takes to write a model; uploads do not count."""

    use_liger: bool | None = None
    """Liger kernels (the extra `osft[liger]`, CUDA only). None: where both are there. True: refuse to run without."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    attn_implementation: str | None = None
    """Attention kernel, as `transformers` names it: sdpa, eager, flash_attention_2, … None: sdpa, or eager for an
    architecture that does not support it (Gemma 2, gpt-oss)."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Computation dtype. "auto": bfloat16 on CUDA, float32 on CPUs. The trained coefficients are always float32."""

    trust_remote_code: bool = False
    """Run Python code that the model's repository brings along. Leave off unless you have read it."""

    factors: str | None = None
    """Precomputed decompositions: the manifest of a factor set, or a factor store's folder, in which what is missing
    is computed; a path or an `s3://` URI. None: the store `factors` in data_output_dir."""

    mlflow_tracking_uri: str | None = None
    """Log the run to this MLflow server (or `sqlite:///…`). None: MLFLOW_TRACKING_URI, or no logging where that is not
    set."""

    mlflow_experiment_name: str | None = None
    """MLflow experiment. None: MLFLOW_EXPERIMENT_NAME, or "osft"."""

    mlflow_run_name: str | None = None
    """Name of the MLflow run. None: MLflow makes one up."""

    wandb_project: str | None = None
    """Log the run to this project of Weights & Biases (the extra `osft[wandb]`). None: WANDB_PROJECT, or no logging
    where that is not set."""

    wandb_entity: str | None = None
    """Team or user of Weights & Biases that the project belongs to. None: WANDB_ENTITY, or the key's own."""

    wandb_run_name: str | None = None
    """Name of the run in Weights & Biases. None: WANDB_RUN_NAME, or one that it makes up."""

    tensorboard_log_dir: str | None = None
    """Write TensorBoard event files to this folder (the extra `osft[tensorboard]`)."""

    dry_run: bool = False
    """Check everything, and return what would be done (samples, tokens, steps, memory, number of GPUs) without loading
    weights or starting a process."""

    def __post_init__(self) -> None:
        for name in ("target_patterns", "replay_data"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a list of strings, got the string {getattr(self, name)!r}")
        SubspaceConfig.__post_init__(self)
        for name in ("model_path", "data_path", "ckpt_output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for name in _LOCATIONS:
            try:
                setattr(self, name, getattr(self, name) and expanded(getattr(self, name)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        self._check_replay()
        self._check_data_mode()
        self._check_drift()
        self._check_schedule()
        self._check_processes()

    def _check_replay(self) -> None:
        if self.replay_ratio and not self.replay_data:
            raise ValueError(f"replay_ratio={self.replay_ratio} needs replay_data: the earlier data to draw from")
        if self.replay_data and not self.replay_ratio:
            raise ValueError(
                "replay_data needs replay_ratio: the share of the training samples to draw from it, such as 0.05"
            )
        try:
            self.replay_data = [expanded(path) for path in self.replay_data] if self.replay_data else None
        except ValueError as error:
            raise ValueError(f"replay_data: {error}") from None

    def _check_data_mode(self) -> None:
        if self.is_pretraining and self.block_size is None:
            raise ValueError("block_size is required with is_pretraining=True: the tokens of a block, such as 1024")
        if self.is_pretraining and (self.unmask_messages or self.use_processed_dataset):
            other = "unmask_messages" if self.unmask_messages else "use_processed_dataset"
            raise ValueError(f"is_pretraining=True and {other}=True exclude each other. Turn one of them off")
        if self.validation_split and self.validation_data_path:
            raise ValueError("validation_split and validation_data_path exclude each other. Give one of them")
        if not (self.validation_split or self.validation_data_path):
            for name in ("validation_frequency", "save_best_val_loss"):
                if getattr(self, name):
                    raise ValueError(f"{name} needs validation data: give validation_split or validation_data_path")
        if self.block_size is not None:
            if not self.is_pretraining:
                warnings.warn("block_size is of use with is_pretraining=True only; it is ignored", stacklevel=4)
                return
            for name in ("max_seq_len", "max_tokens_per_gpu"):
                if self.block_size > getattr(self, name):
                    raise ValueError(f"block_size={self.block_size} is more than {name}={getattr(self, name)}")

    def _check_drift(self) -> None:
        if self.distill_weight and self.distill_tokens > self.max_tokens_per_gpu:
            raise ValueError(
                f"distill_tokens={self.distill_tokens} is more than max_tokens_per_gpu={self.max_tokens_per_gpu}, the "
                "bound on every micro-batch. Lower it, or raise that"
            )
        if not self.step_scales or not all(0 < scale <= 1 for scale in self.step_scales):
            raise ValueError(f"step_scales must be factors in (0, 1], such as [0.5, 1.0], got {self.step_scales}")

    def _check_schedule(self) -> None:
        self.lr_scheduler, self.lr_scheduler_kwargs = schedule.checked(
            self.lr_scheduler,
            self.lr_scheduler_kwargs,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
        )

    def make_scheduler(self, optimizer: "Optimizer", *, num_training_steps: int) -> Any:
        """The learning-rate schedule of these settings."""
        return schedule.make(
            self.lr_scheduler,
            self.lr_scheduler_kwargs,
            optimizer,
            warmup_steps=self.warmup_steps,
            num_training_steps=num_training_steps,
        )

    def _check_processes(self) -> None:
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank must be less than nnodes={self.nnodes}, got {self.node_rank}")
        if self.rdzv_endpoint and self.master_addr:
            raise ValueError("rdzv_endpoint and master_addr exclude each other. Give one of them")
        if self.master_port and not self.master_addr:
            raise ValueError("master_port goes with master_addr. Give both, or rdzv_endpoint='host:port'")
        if self.nnodes > 1 and not (self.rdzv_endpoint or self.master_addr):
            raise ValueError("rdzv_endpoint is required with nnodes > 1: 'host:port' of node 0, the same on all nodes")
        if self.rdzv_endpoint and not re.fullmatch(r".+:\d{1,5}", self.rdzv_endpoint):
            raise ValueError(f"rdzv_endpoint must be 'host:port', got {self.rdzv_endpoint!r}")

    @classmethod
    def from_parameters(cls, given: Mapping[str, Any]) -> "TrainConfig":
        """The settings from named values, where None stands for the default; training_hub's own names are understood.

        Raises ValueError for an unknown name (with the nearest known one), for required ones that are missing, and
        for values that cannot be.
        """
        known = parameters(cls)
        refuse_unknown(given, [*known, *compatibility.NAMES])
        values = compatibility.translated(given)
        missing = [name for name, parameter in known.items() if parameter.required and name not in values]
        if missing:
            raise ValueError(f"required parameters are missing: {', '.join(missing)}")
        return cls(**values)

    @property
    def subspace(self) -> SubspaceConfig:
        """Only what determines the factors."""
        return SubspaceConfig(**{f.name: getattr(self, f.name) for f in fields(SubspaceConfig)})

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values; `TrainConfig(**d)` restores them."""
        return asdict(self)


_LOCATIONS = (
    *("model_path", "data_path", "validation_data_path", "calibration_data", "factors", "data_output_dir"),
    *("ckpt_output_dir", "resume", "tensorboard_log_dir"),
)
"""Paths, in which `~` is expanded, or URIs, which must not hold credentials: all of this is logged and written down."""
