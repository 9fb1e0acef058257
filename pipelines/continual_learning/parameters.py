"""The parameters of the pipeline: one definition, of which the form, its texts and the checks here are made."""

import inspect
from typing import Any, Literal, get_args, get_origin

from osft.evaluation.gate import GateRules
from osft.settings.base import Settings, default, plain_type
from osft.settings.subspace import Protect, SubspaceConfig
from osft.settings.training import TrainConfig
from osft.settings.values import Boolean, Integer, Number, Text, Texts

STORAGE_MOUNT = "/mnt/osft"
"""Where the shared volume is mounted in every step."""


class PipelineParameters(Settings):
    """What the form of the pipeline asks for. What has no text here is the setting of training of that name.

    A form knows no None: an empty text or list, or 0, stands for it where the texts say so.
    """

    base_model: Text
    """Model that the first round tunes: Hugging Face id (org/name), folder on the shared volume, or example: URI. Later
    rounds start from the champion."""
    data_uri: Text
    """Where new data arrives: file, folder or glob of chats ({"messages": [...]}; JSON lines, JSON, CSV, Parquet) on
    the shared volume, s3:// prefix, Hugging Face data set id (org/name@revision), or example: URI. What the champion
    has learned of it is left out."""
    anchor_uris: Texts = []  # noqa: RUF012 (pydantic copies it)
    """Evaluation sets of what the model should not forget: chats or plain texts, as data_uri. Give what should stay as
    it is; a task whose form of answers a round teaches moves, and max_drift refuses it."""
    model_name: Text = "osft-model"
    """Name of the model in the MLflow registry; its alias champion is what a round starts from."""
    min_new_samples: Integer = 1
    """With fewer records that the champion does not know, the run ends with "nothing to learn"."""

    unfreeze_rank_ratio: Number = 0.25
    protect: Protect = "activations"
    stiffness: Number = default(TrainConfig.model_fields["stiffness"])
    free_subspace: Text = "complement"
    target_patterns: Texts = []  # noqa: RUF012
    """Regular expressions searched in the names of the linear layers, such as "q_proj"; empty trains all of them."""
    rank_allocation: Text = "uniform"

    max_seq_len: Integer = 1024
    validation_fraction: Number = 0.1
    """Share of the prompts that is held out for evaluation; at least one prompt is."""
    max_train_samples: Integer = 0
    """Use at most this many training samples; 0 uses all."""
    max_validation_samples: Integer = 0
    """Evaluate on at most this many held-out samples; 0 uses all."""

    effective_batch_size: Integer = 16
    max_tokens_per_gpu: Integer = 1024
    learning_rate: Number = 1e-3
    num_epochs: Integer = 1
    lr_scheduler: Text = "cosine"
    warmup_steps: Integer = 2
    weight_decay: Number = 0.0
    replay_ratio: Number = 0.0
    """Share of the training samples that is drawn from the data of earlier rounds, where that is still there, such as
    0.05; 0 replays nothing."""
    launcher: Literal["local", "pytorchjob", "trainjob"] = "local"
    """"local" trains in the pod of the step; "pytorchjob" in pods of a PyTorchJob (Kubeflow's training operator),
    "trainjob" in those of a TrainJob (Kubeflow Trainer 2.2 or newer), with GPUs, on as many nodes as you like."""
    job: dict[str, Any] = {}  # noqa: RUF012
    """Settings of that job, such as {"num_workers": 2, "gpus": 8, "memory": "256Gi", "kueue_queue": "research"}; all of
    them are in docs/reference.md."""
    pytorchjob: dict[str, Any] = {}  # noqa: RUF012
    """The former name of job, which means the same; give only one of them."""
    nproc_per_node: Integer = 0
    """With launcher "local": training processes; 0 starts one per GPU."""
    seed: Integer = 42
    more_training_settings: dict[str, Any] = {}  # noqa: RUF012
    """Further settings of `osft train` by name, such as {"max_grad_norm": 0.5}; those of the subspace, such as
    {"calibration_tokens": 6144}, go to the step that computes it, too."""

    max_anchor_samples: Integer = 0
    """Evaluate on at most this many records of each anchor; 0 uses all."""
    gate: dict[str, Any] = GateRules().to_parameters()
    """Rules for promotion, each with bound, relative and standard_errors: least gain on the new task, most forgetting
    of an earlier one, most drift of an anchor from the base model (its metric kl, loss or accuracy), most loss in an
    lm-eval task. What is left out keeps its default; false turns a rule off."""
    lm_eval_tasks: Texts = []  # noqa: RUF012
    """Tasks of lm-evaluation-harness, such as ["arc_easy"], that the models are compared on."""
    lm_eval_folder: Text = ""
    """Folder with YAML files of such tasks of your own, whose data may be local."""
    max_lm_eval_samples: Integer = 0
    """Ask only the first so many questions of each; 0 asks all."""

    mlflow_tracking_uri: Text = ""
    """MLflow server; empty uses MLFLOW_TRACKING_URI. Without either, a run on this machine keeps a database below
    storage_root; on a cluster it is refused. One of one node may have it: sqlite:////mnt/osft/mlflow/mlflow.db."""
    mlflow_experiment: Text = "osft-continual-learning"
    """MLflow experiment of the run."""
    copy_checkpoint: Boolean = True
    """Copy each version's checkpoint into MLflow's artifacts. Without, the version names the one below storage_root,
    of which there is no second copy then (of an 8B model, 16 GB and as much of exact weights)."""
    storage_root: Text = STORAGE_MOUNT
    """Folder that all steps share, or an s3:// prefix (then mlflow_tracking_uri is needed)."""
    storage_claim: Text = "osft-storage"
    """ReadWriteMany volume claim that is mounted at /mnt/osft in every step and training pod."""
    storage_secret: Text = "osft-s3"
    """Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL for s3:// URIs."""
    svd_gpus: Text = "0"
    """GPUs of the step that decomposes the weights."""
    evaluation_gpus: Text = "0"
    """GPUs of the step that evaluates."""
    training_gpus: Text = "0"
    """GPUs of the step that trains, with launcher "local"; those of a job are its own setting."""
    gpu_resource: Text = "nvidia.com/gpu"
    """Resource that the cluster counts the GPUs of these three steps by."""
    model_cpu: Text = "2"
    """CPUs that the steps that decompose and evaluate ask for; each may use more where its node has more."""
    model_memory: Text = "8Gi"
    """Memory that these two ask for. They hold a model of 8B in 40Gi."""
    training_cpu: Text = "1"
    """CPUs that the step that trains asks for; it waits if it has started a job of its own."""
    training_memory: Text = "2Gi"
    """Memory that it asks for; with launcher "local" as much as training takes (osft train --dry-run)."""
    step_cpu: Text = "1"
    """CPUs that each of the other steps asks for."""
    step_memory: Text = "2Gi"
    """Memory that each of them asks for."""
    tolerations: list[dict[str, Any]] = []  # noqa: RUF012
    """Taints that the pods of all steps tolerate, as Kubernetes writes them, such as
    [{"key": "nvidia.com/gpu", "operator": "Exists"}]."""
    node_selector: dict[str, str] = {}  # noqa: RUF012
    """Labels of the nodes that the pods of all steps go to, such as {"pool": "osft"}."""

    def training(self) -> TrainConfig:
        """What the steps make of these settings of training. Raises ValueError for what cannot be."""
        settings = {name: getattr(self, name) for name in TRAINING} | {
            "model_path": self.base_model,
            "data_path": self.data_uri,
            "ckpt_output_dir": self.storage_root,
            "target_patterns": self.target_patterns or None,
            "nproc_per_node": self.nproc_per_node or None,
            "replay_data": [self.storage_root] if self.replay_ratio else None,  # the step finds it
        }
        return TrainConfig.from_parameters(settings | self.more_training_settings)


TRAINING = tuple(
    name
    for name in PipelineParameters.model_fields
    if name in TrainConfig.model_fields and name != "mlflow_tracking_uri"  # which all steps have: they are its runs
)
"""The parameters that are settings of training; the step that trains has them, too."""
SUBSPACE = tuple(name for name in TRAINING if name in SubspaceConfig.model_fields)
"""Of these, the ones that determine the factors."""


def form(function: Any) -> Any:
    """Give a pipeline's function the parameters above as its signature and its docstring, which KFP reads."""
    fields = PipelineParameters.model_fields
    signature, texts = [], []
    for name, field in fields.items():
        value = inspect.Parameter.empty if field.is_required() else default(field)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature.append(inspect.Parameter(name, kind, default=value, annotation=_kfp_type(field.annotation)))
        text = field.description or TrainConfig.model_fields[name].description or ""
        texts.append(f"    {name}: {' '.join(text.split())}")
    function.__signature__ = inspect.Signature(signature)
    function.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Args:", *texts])
    return function


def _kfp_type(annotation: Any) -> type:
    """KFP's word for a type: a choice is a text, a list or mapping is one of anything."""
    kind = plain_type(annotation)
    if get_origin(kind) is Literal:
        kind = type(get_args(kind)[0])
    found: type = get_origin(kind) or kind
    return found
