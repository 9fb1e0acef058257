"""What a user sets of a run: the model, what is written, the processes, where metrics go."""

import re
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from osft.settings.base import Settings
from osft.settings.values import Boolean, GivenLocation, Integer, Location, Number, Text

Rounding = Literal["nearest", "stochastic", "compensated"]


class ModelSettings(Settings):
    """The model, and how it is computed."""

    model_config = ConfigDict(title="Model and kernels")

    model_path: GivenLocation
    """Folder of the model to tune (config.json and safetensors), a path or a URI such as `s3://bucket/model`; or its
    Hugging Face id, `org/name` or `org/name@revision`."""

    use_liger: Boolean | None = None
    """Liger kernels (the extra `osft[liger]`, CUDA only). None: where both are there. True: refuse to run without."""

    gradient_checkpointing: Boolean = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    torch_compile: Boolean = False
    """Compile the transformer blocks with torch.compile, for any length of a micro-batch. It needs a C++ compiler,
    which the training image lacks. On a CPU it does not pay: a step of two blocks of the benchmark took 1.06 seconds of
    a core instead of 1.08, after minutes of compiling. Not measured on a GPU."""

    attn_implementation: Text | None = None
    """Attention kernel, as `transformers` names it: sdpa, eager, flash_attention_2, … None: sdpa, or eager for an
    architecture that does not support it (Gemma 2, gpt-oss); and packed samples without a mask of all tokens by all, if
    the architecture can (osft/models/packed_attention.py): on a GPU that computes in bfloat16 by flash-attn where it is
    installed, else by PyTorch's varlen kernel, if that agrees with sdpa there, and on a CPU one after the other."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Computation dtype. "auto": bfloat16 on CUDA, float32 on CPUs. The trained coefficients are always float32."""

    trust_remote_code: Boolean = False
    """Run Python code that the model's repository brings along. Leave off unless you have read it."""


class CheckpointSettings(Settings):
    """What is written, when, and where."""

    model_config = ConfigDict(title="Checkpoints")

    ckpt_output_dir: GivenLocation
    """Folder for checkpoints (`hf_format/samples_<n>.0`, plain Hugging Face models), metrics and training state. With
    an `s3://` URI the run writes to a scratch folder (OSFT_SCRATCH), and all of it is published to the URI as it
    comes; a node that is restarted, with an empty scratch folder, resumes from there. See osft/storage."""

    checkpoint_at_epoch: Boolean = False
    """Write a model at the end of each epoch."""

    save_final_checkpoint: Boolean = True
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

    save_state_minutes: Annotated[Number, Field(ge=0.0)] = 15.0
    """Minutes between two savings of the training state (coefficients, optimizer, position), from which a run that
    was killed resumes. It goes when the run has finished. 0: only when the run is asked to end (SIGTERM)."""

    save_state_steps: Annotated[Integer | None, Field(ge=1)] = None
    """Optimizer steps between two savings of the training state. None: by the clock only."""

    resume: Location = "auto"
    """"auto": resume from the newest training state of the same run in ckpt_output_dir, and return a finished run as it
    is. "off": start over; what the folder holds of an earlier run is replaced. Else the path or URI of a training
    state, `…/state/step-<n>`."""


class ProcessSettings(Settings):
    """The processes that train together."""

    model_config = ConfigDict(title="Processes")

    nproc_per_node: Annotated[Integer, Field(ge=1)] | Literal["auto", "gpu"] = "auto"
    """Processes on this node. "gpu": one per GPU. "auto": the same, or one on a machine without a GPU."""

    nnodes: Annotated[Integer, Field(ge=1)] = 1
    """Nodes that train together; call the function on each of them."""

    node_rank: Annotated[Integer, Field(ge=0)] = 0
    """Rank of this node, from 0 to nnodes - 1. Node 0 is the master and writes the checkpoints."""

    rdzv_id: Annotated[str | Integer | None, Field(union_mode="left_to_right")] = None  # "0123" stays a text
    """Id of the job, the same on all nodes. None: a random one on a single node, else "osft"."""

    rdzv_endpoint: Text | None = None
    """Where the nodes meet, "host:port" of node 0. Required with more than one node, unless master_addr is given."""

    master_addr: Text | None = None
    """Host of node 0; instead of rdzv_endpoint, with master_port."""

    master_port: Annotated[Integer | None, Field(ge=1, le=65535)] = None
    """Port of node 0 that goes with master_addr. None: 29500, as torchrun."""

    rdzv_timeout_minutes: Annotated[Number, Field(ge=0.01)] = 15.0
    """How long a node waits for the others to come. A single node waits for none."""

    process_group_timeout_minutes: Annotated[Number, Field(ge=0.01)] = 30.0
    """How long a process waits for another one in a collective operation (NCCL, gloo) before it gives the run up.
    Longer than rank 0 takes to write a model; uploads do not count."""

    dry_run: Boolean = False
    """Check everything, and return what would be done (samples, tokens, steps, memory, number of GPUs) without loading
    weights or starting a process."""

    @model_validator(mode="after")
    def _check_processes(self) -> Self:
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
        return self


class LoggingSettings(Settings):
    """Where metrics are sent, beside metrics.jsonl."""

    model_config = ConfigDict(title="Logging")

    mlflow_tracking_uri: Text | None = None
    """Log the run to this MLflow server (or `sqlite:///…`). None: MLFLOW_TRACKING_URI, or no logging where that is not
    set."""

    mlflow_experiment_name: Text | None = None
    """MLflow experiment. None: MLFLOW_EXPERIMENT_NAME, or "osft"."""

    mlflow_run_name: Text | None = None
    """Name of the MLflow run. None: MLflow makes one up."""

    wandb_project: Text | None = None
    """Log the run to this project of Weights & Biases (the extra `osft[wandb]`). None: WANDB_PROJECT, or no logging
    where that is not set."""

    wandb_entity: Text | None = None
    """Team or user of Weights & Biases that the project belongs to. None: WANDB_ENTITY, or the key's own."""

    wandb_run_name: Text | None = None
    """Name of the run in Weights & Biases. None: WANDB_RUN_NAME, or one that it makes up."""

    tensorboard_log_dir: Location | None = None
    """Write TensorBoard event files to this folder (the extra `osft[tensorboard]`)."""
