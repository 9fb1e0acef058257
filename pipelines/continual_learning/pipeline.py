"""One round of continual learning, as a Kubeflow pipeline.

    resolve_round -> nothing to learn: the end
                  -> prepare_data -> precompute_svd -> train_osft -> evaluate_model -> register_model
                                                                                    -> promote_model, if it passed

It is compiled to two files beside this one (`python -m pipelines.continual_learning.pipeline`, or `make compile`):
`continual_learning.yaml` for a cluster with a ReadWriteMany claim, which every step mounts, and
`continual_learning_s3.yaml`, which mounts none and wants an s3:// storage_root.
"""

import functools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler, dsl, kubernetes
from kfp.dsl.base_component import BaseComponent

from components import TRAINING_IMAGE
from components.evaluate_model.component import evaluate_model
from components.precompute_svd.component import precompute_svd
from components.prepare_data.component import prepare_data
from components.promote_model.component import promote_model
from components.register_model.component import register_model
from components.resolve_round.component import resolve_round
from components.train_osft.component import train_osft
from osft.evaluation.gate import GateRules

STORAGE_MOUNT = "/mnt/osft"
"""Where the shared volume is mounted in every step."""

YAML = Path(__file__).parent / "continual_learning.yaml"
YAML_S3 = YAML.with_name("continual_learning_s3.yaml")


DEFAULT_GATE = GateRules().to_parameters()
"""Shown in the form of the Kubeflow UI."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPolicy:
    """How long the pod of a step may run, and how often it is tried again, after a minute, then two, …

    KFP's cache is off for all of them. resolve_round answers what the registry and the data are now. For the others, it
    is keyed by a step's inputs, which name a file and not its content, and each
    step's inputs have the run's id. What never changes for a content is found by content below storage_root instead:
    the converted model, the prepared data, the factors, a finished training.
    """

    timeout_hours: float
    """Of the running pod; time in a queue does not count. 0: no limit."""
    retries: int


_POLICIES = {
    # Reads the registry and the data: the network may fail.
    "resolve-round": StepPolicy(timeout_hours=6, retries=2),
    # Fetches models.
    "prepare-data": StepPolicy(timeout_hours=12, retries=2),
    # Goes on with the weights that are not in the store yet.
    "precompute-svd": StepPolicy(timeout_hours=24, retries=2),
    # Its limits are the PyTorchJob's. A retry finds the running job, and does not repeat a program error.
    "train-osft": StepPolicy(timeout_hours=0, retries=2),
    "evaluate-model": StepPolicy(timeout_hours=24, retries=2),
    # A retry finds the version that was registered.
    "register-model": StepPolicy(timeout_hours=6, retries=3),
    "promote-model": StepPolicy(timeout_hours=1, retries=3),
}

_CREDENTIALS = {
    "osft-huggingface": ("HF_TOKEN",),
    "osft-mlflow": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
}
"""Secrets whose keys each step has as environment variables, where they exist."""

_STORAGE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION")
"""Keys of the secret that the parameter storage_secret names."""


def one_round(
    base_model: str = "example:smollm2-135m-instruct",
    data_uri: str = "example:sarcasm-headlines",
    anchor_uris: list = ["example:web-text"],  # noqa: B006 (kfp reads it once)
    model_name: str = "osft-model",
    min_new_samples: int = 1,
    unfreeze_rank_ratio: float = 0.25,
    protect: str = "activations",
    stiffness: float = 10_000.0,
    free_subspace: str = "complement",
    target_patterns: list = [],  # noqa: B006
    rank_allocation: str = "uniform",
    max_seq_len: int = 1024,
    validation_fraction: float = 0.1,
    max_train_samples: int = 384,
    max_validation_samples: int = 64,
    effective_batch_size: int = 16,
    max_tokens_per_gpu: int = 1024,
    learning_rate: float = 1e-3,
    num_epochs: int = 1,
    lr_scheduler: str = "cosine",
    warmup_steps: int = 2,
    weight_decay: float = 0.0,
    replay_ratio: float = 0.0,
    launcher: str = "local",
    pytorchjob: dict = {},  # noqa: B006
    nproc_per_node: int = 0,
    seed: int = 42,
    more_training_settings: dict = {},  # noqa: B006
    max_anchor_samples: int = 32,
    gate: dict = DEFAULT_GATE,
    lm_eval_tasks: list = [],  # noqa: B006
    lm_eval_folder: str = "",
    max_lm_eval_samples: int = 0,
    mlflow_tracking_uri: str = "",
    mlflow_experiment: str = "osft-continual-learning",
    storage_root: str = STORAGE_MOUNT,
    storage_claim: str = "osft-storage",
    storage_secret: str = "osft-s3",
    svd_gpus: str = "0",
    evaluation_gpus: str = "0",
    gpu_resource: str = "nvidia.com/gpu",
):
    """Teach a model a new task without forgetting.

    Args:
        base_model: Model that the first round tunes: Hugging Face id (org/name), folder on the shared volume, or
            example: URI. Later rounds start from the champion.
        data_uri: Where new data arrives: file, folder or glob of chats ({"messages": [...]}; JSON lines, JSON, CSV,
            Parquet) on the shared volume, s3:// prefix, Hugging Face data set id (org/name@revision), or example: URI.
            What the champion has learned of it is left out.
        anchor_uris: Evaluation sets of what the model should not forget: chats or plain texts, as data_uri. Give what
            should stay as it is; a task whose form of answers a round teaches moves, and max_drift refuses it.
        model_name: Name of the model in the MLflow registry; its alias champion is what a round starts from.
        min_new_samples: With fewer records that the champion does not know, the run ends with "nothing to learn".
        unfreeze_rank_ratio: Share of each weight's directions that may be trained, in (0, 1]. Low values preserve, high
            values adapt; 0.25 is a good start.
        protect: What is protected: "weights" (each weight's largest singular directions) or "activations" (what the
            layers are fed on text that the base model writes itself, and on all that earlier rounds learned).
        stiffness: With protect "activations": how firmly the free directions are held back, each by how much the model
            depends on it; 0 holds none back.
        free_subspace: With protect "weights": "complement" (all updates orthogonal to the frozen directions) or "core"
            (least memory).
        target_patterns: Regular expressions searched in the names of the linear layers, such as "q_proj"; empty
            trains all of them.
        rank_allocation: With protect "weights": "uniform", or "adaptive": layers that matter more keep more frozen
            directions.
        max_seq_len: Longest sample in tokens; longer ones are dropped and counted.
        validation_fraction: Share of the prompts that is held out for evaluation; at least one prompt is.
        max_train_samples: Use at most this many training samples; 0 uses all. The default fits ten minutes on two
            CPU cores.
        max_validation_samples: Evaluate on at most this many held-out samples; 0 uses all.
        effective_batch_size: Samples per optimizer step, over all processes.
        max_tokens_per_gpu: Hard bound on the tokens of one micro-batch of one process.
        learning_rate: Peak learning rate of AdamW.
        num_epochs: Passes over the training set.
        lr_scheduler: Learning-rate schedule: cosine, linear, constant or another name that transformers knows.
        warmup_steps: Optimizer steps of linear warm-up.
        weight_decay: Pulls the update towards zero, that is, back to the base model.
        replay_ratio: Share of the training samples that is drawn from the data of earlier rounds, where that is still
            there, such as 0.05; 0 replays nothing.
        launcher: "local" trains in the pod of the step; "pytorchjob" in pods of a PyTorchJob (Kubeflow's training
            operator), with GPUs, on as many nodes as you like.
        pytorchjob: Settings of the PyTorchJob, such as {"num_workers": 2, "gpus": 8, "memory": "256Gi",
            "kueue_queue": "research"}; all of them are in docs/reference.md.
        nproc_per_node: With launcher "local": training processes; 0 starts one per GPU.
        seed: Seed of the sample order.
        more_training_settings: Further settings of `osft train` by name, such as {"max_grad_norm": 0.5}; those of the
            subspace, such as {"calibration_tokens": 6144}, go to the step that computes it, too.
        max_anchor_samples: Evaluate on at most this many records of each anchor; 0 uses all.
        gate: Rules for promotion, each with bound, relative and standard_errors: least gain on the new task, most
            forgetting of an earlier one, most drift of an anchor from the base model (its metric kl, loss or
            accuracy), most loss in an lm-eval task. What is left out keeps its default; false turns a rule off.
        lm_eval_tasks: Tasks of lm-evaluation-harness, such as ["arc_easy"], that the models are compared on.
        lm_eval_folder: Folder with YAML files of such tasks of your own, whose data may be local.
        max_lm_eval_samples: Ask only the first so many questions of each; 0 asks all.
        mlflow_tracking_uri: MLflow server; empty uses MLFLOW_TRACKING_URI, or else a database below storage_root.
        mlflow_experiment: MLflow experiment of the run.
        storage_root: Folder that all steps share, or an s3:// prefix (then mlflow_tracking_uri is needed).
        storage_claim: ReadWriteMany volume claim that is mounted at /mnt/osft in every step and training pod.
        storage_secret: Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL for s3:// URIs.
        svd_gpus: GPUs of the step that decomposes the weights.
        evaluation_gpus: GPUs of the step that evaluates.
        gpu_resource: Resource that the cluster counts the GPUs of these two steps by.
    """
    where = {
        "storage_root": storage_root,
        "mlflow_tracking_uri": mlflow_tracking_uri,
        "pipeline_run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    }
    resolved = resolve_round(
        model_name=model_name,
        base_model=base_model,
        data_uri=data_uri,
        anchor_uris=anchor_uris,
        gate=gate,
        min_new_samples=min_new_samples,
        mlflow_experiment=mlflow_experiment,
        pipeline_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
        **where,
    )
    common = where | {"mlflow_run_id": resolved.outputs["mlflow_run_id"]}
    subspace = {
        "protect": protect,
        "unfreeze_rank_ratio": unfreeze_rank_ratio,
        "free_subspace": free_subspace,
        "target_patterns": target_patterns,
        "rank_allocation": rank_allocation,
    }
    with dsl.If(resolved.outputs["Output"] == True, name="something-new"):  # noqa: E712 (kfp overloads ==)
        prepared = prepare_data(
            base_model=base_model,
            model=resolved.outputs["model"],
            records=resolved.outputs["records"],
            anchor_uris=anchor_uris,
            max_seq_len=max_seq_len,
            validation_fraction=validation_fraction,
            max_train_samples=max_train_samples,
            max_validation_samples=max_validation_samples,
            **common,
        )
        factors = precompute_svd(
            model_path=prepared.outputs["model_path"],
            data_path=prepared.outputs["data_path"],
            more_settings=more_training_settings,
            accelerators=f"{svd_gpus} x {gpu_resource}",
            **subspace,
            **common,
        )
        trained = train_osft(
            model_path=prepared.outputs["model_path"],
            data_path=prepared.outputs["data_path"],
            factors_path=factors.output,
            effective_batch_size=effective_batch_size,
            max_tokens_per_gpu=max_tokens_per_gpu,
            learning_rate=learning_rate,
            num_epochs=num_epochs,
            lr_scheduler=lr_scheduler,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            replay_ratio=replay_ratio,
            nproc_per_node=nproc_per_node,
            seed=seed,
            max_seq_len=max_seq_len,
            stiffness=stiffness,
            more_settings=more_training_settings,
            launcher=launcher,
            pytorchjob=pytorchjob,
            training_image=TRAINING_IMAGE,
            storage_claim=storage_claim,
            storage_secret=storage_secret,
            **subspace,
            **common,
        )
        evaluated = evaluate_model(
            model_name=model_name,
            base_model_path=prepared.outputs["base_model_path"],
            model_path=prepared.outputs["model_path"],
            parent_version=resolved.outputs["parent_version"],
            checkpoint_path=trained.outputs["Output"],
            data_path=prepared.outputs["data_path"],
            factors_path=factors.output,
            task=resolved.outputs["task"],
            anchor_paths=prepared.outputs["anchor_paths"],
            max_anchor_samples=max_anchor_samples,
            gate=gate,
            lm_eval_tasks=lm_eval_tasks,
            lm_eval_folder=lm_eval_folder,
            max_lm_eval_samples=max_lm_eval_samples,
            accelerators=f"{evaluation_gpus} x {gpu_resource}",
            **common,
        )
        registered = register_model(
            model_name=model_name,
            checkpoint_path=trained.outputs["Output"],
            data_path=prepared.outputs["data_path"],
            factors_path=factors.output,
            image=TRAINING_IMAGE,
            **common,
        )
        registered.after(evaluated)
        with dsl.If(evaluated.outputs["Output"] == True, name="gate"):  # noqa: E712
            promoted = promote_model(
                model_name=model_name,
                version=registered.output,
                parent_version=resolved.outputs["parent_version"],
                **common,
            )
    steps = [resolved, prepared, factors, trained, evaluated, registered, promoted]
    # Inside of dsl.If, the compiler hands on what a step's arguments name, so these two name their resources there too.
    for step, gpus in ((factors, svd_gpus), (evaluated, evaluation_gpus)):
        step.set_accelerator_type(gpu_resource).set_accelerator_limit(gpus)
    for step in steps:
        _apply_policy(step, _POLICIES[step.name])
        for secret, keys in (*_CREDENTIALS.items(), (storage_secret, _STORAGE_KEYS)):
            kubernetes.use_secret_as_env(step, secret, {key: key for key in keys}, optional=True)
    return steps, storage_claim


def _apply_policy(step: dsl.PipelineTask, policy: StepPolicy) -> None:
    step.set_caching_options(enable_caching=False)
    step.set_retry(policy.retries, backoff_duration="60s", backoff_factor=2.0, backoff_max_duration="900s")
    if policy.timeout_hours:
        kubernetes.set_timeout(step, int(policy.timeout_hours * 3600))


def _pipeline(*, mount_claim: bool) -> BaseComponent:
    """The pipeline, with or without the claim in every step: whether a pod mounts one, no parameter can say."""

    @functools.wraps(one_round)
    def mounted(*parameters):
        steps, storage_claim = one_round(*parameters)
        for step in steps if mount_claim else ():
            kubernetes.mount_pvc(step, pvc_name=storage_claim, mount_path=STORAGE_MOUNT)

    return dsl.pipeline(
        mounted,
        name="osft-continual-learning",
        description="Teaches a language model a new task by Orthogonal Subspace Fine-Tuning, measures what it learned "
        "and what it forgot, and promotes the result only if it passes the gate.",
    )


continual_learning = _pipeline(mount_claim=True)
continual_learning_s3 = _pipeline(mount_claim=False)


def main() -> None:
    """Write the YAML files, or with `--check [FOLDER]` fail if they are not what this file compiles to."""
    committed = Path(sys.argv[2]) if sys.argv[2:] else YAML.parent
    for file, pipeline in ((YAML, continual_learning), (YAML_S3, continual_learning_s3)):
        with tempfile.TemporaryDirectory() as folder:
            compiled = Path(folder) / file.name
            compiler.Compiler().compile(pipeline, str(compiled))
            current = _documents(compiled) == _documents(committed / file.name)
            if sys.argv[1:2] != ["--check"]:
                if not current:
                    file.write_bytes(compiled.read_bytes())
                print(f"{file} {'is current' if current else 'is written'}")
            elif not current:
                sys.exit(f"{committed / file.name} is stale: run `make compile` and commit it")


def _documents(file: Path) -> list[Any]:
    """What is in a YAML file: the compiler's comment has a mapping's keys in another order each time."""
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8"))) if file.is_file() else []


if __name__ == "__main__":
    main()
