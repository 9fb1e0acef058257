"""One round of continual learning, as a Kubeflow pipeline.

    resolve_round -> nothing to learn: the end
                  -> prepare_data -> precompute_svd -> train_osft -> evaluate_model -> register_model
                                                                                    -> promote_model, if it passed

It is compiled to two files beside this one (`python -m pipelines.continual_learning.pipeline`, or `make compile`):
`continual_learning.yaml` for a cluster with a ReadWriteMany claim, which every step mounts, and
`continual_learning_s3.yaml`, which mounts none and wants an s3:// storage_root.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

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
from pipelines.continual_learning.parameters import STORAGE_MOUNT, SUBSPACE, TRAINING, PipelineParameters, form

YAML = Path(__file__).parent / "continual_learning.yaml"
YAML_S3 = YAML.with_name("continual_learning_s3.yaml")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPolicy:
    """How long the pod of a step may run, and how often it is tried again, after a minute, then two, …

    KFP's cache is off for all of them. resolve_round answers what the registry and the data are now. For the others, it
    is keyed by a step's inputs, which name a file and not its content, and each
    step's inputs have the run's id. What never changes for a content is found by content below storage_root instead:
    the converted model, the prepared data, the factors, a finished training.
    """

    needs: Literal["step", "model", "training"]
    """Which parameters say what CPUs and memory its pod asks for: <needs>_cpu, <needs>_memory. Requests only, unless
    STEP_LIMITS asks for more: a limit would end a step that a larger node could have finished."""
    timeout_hours: float
    """Of the running pod; time in a queue does not count. 0: no limit."""
    retries: int


_POLICIES = {
    # Reads the registry and the data: the network may fail.
    "resolve-round": StepPolicy(needs="step", timeout_hours=6, retries=2),
    # Fetches models.
    "prepare-data": StepPolicy(needs="step", timeout_hours=12, retries=2),
    # Resumes with the weights that are not in the store yet.
    "precompute-svd": StepPolicy(needs="model", timeout_hours=24, retries=2),
    # Its limits are the job's. A retry finds the running job, and does not repeat a program error.
    "train-osft": StepPolicy(needs="training", timeout_hours=0, retries=2),
    "evaluate-model": StepPolicy(needs="model", timeout_hours=24, retries=2),
    # A retry finds the version that was registered.
    "register-model": StepPolicy(needs="step", timeout_hours=6, retries=3),
    "promote-model": StepPolicy(needs="step", timeout_hours=1, retries=3),
}

SCRATCH, SCRATCH_SIZE = "/scratch", os.environ.get("OSFT_SCRATCH_SIZE", "")
"""With a size, such as 200Gi, each step keeps its local copies of an object store in an emptyDir of at most that: no
parameter can say so, `make compile SCRATCH_SIZE=200Gi` does."""

STEP_LIMITS = frozenset(filter(None, os.environ.get("OSFT_STEP_LIMITS", "").split(",")))
"""Of "cpu" and "memory": where the namespace's quota asks for limits, each request is the limit too. A parameter could
not leave it out: Pipelines reads an empty quantity as an error. `make compile STEP_LIMITS=cpu,memory`."""
if not {"cpu", "memory"} >= STEP_LIMITS:
    raise ValueError(f"STEP_LIMITS must be of cpu and memory, such as cpu,memory; got {','.join(sorted(STEP_LIMITS))}")

_CREDENTIALS = {
    "osft-huggingface": ("HF_TOKEN",),
    "osft-mlflow": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
}
"""Secrets whose keys each step has as environment variables, where they exist."""

_STORAGE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION")
"""Keys of the secret that the parameter storage_secret names."""


def one_round(given: SimpleNamespace) -> list[dsl.PipelineTask]:
    """The steps of a round, of the parameters in `pipelines.continual_learning.parameters`."""
    where = {
        "storage_root": given.storage_root,
        "mlflow_tracking_uri": given.mlflow_tracking_uri,
        "pipeline_run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    }
    resolved = resolve_round(
        model_name=given.model_name,
        base_model=given.base_model,
        data_uri=given.data_uri,
        anchor_uris=given.anchor_uris,
        gate=given.gate,
        min_new_samples=given.min_new_samples,
        mlflow_experiment=given.mlflow_experiment,
        pipeline_name=dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
        **where,
    )
    common = where | {"mlflow_run_id": resolved.outputs["mlflow_run_id"]}
    with dsl.If(resolved.outputs["Output"] == True, name="something-new"):  # noqa: E712 (kfp overloads ==)
        prepared = prepare_data(
            base_model=given.base_model,
            model=resolved.outputs["model"],
            records=resolved.outputs["records"],
            anchor_uris=given.anchor_uris,
            max_seq_len=given.max_seq_len,
            validation_fraction=given.validation_fraction,
            max_train_samples=given.max_train_samples,
            max_validation_samples=given.max_validation_samples,
            **common,
        )
        factors = precompute_svd(
            model_path=prepared.outputs["model_path"],
            data_path=prepared.outputs["data_path"],
            more_settings=given.more_training_settings,
            accelerators=f"{given.svd_gpus} x {given.gpu_resource}",
            **{name: getattr(given, name) for name in SUBSPACE},
            **common,
        )
        trained = train_osft(
            model_path=prepared.outputs["model_path"],
            data_path=prepared.outputs["data_path"],
            factors_path=factors.output,
            more_settings=given.more_training_settings,
            launcher=given.launcher,
            job=given.job,
            pytorchjob=given.pytorchjob,
            training_image=TRAINING_IMAGE,
            storage_claim=given.storage_claim,
            storage_secret=given.storage_secret,
            **{name: getattr(given, name) for name in TRAINING},
            **common,
        )
        evaluated = evaluate_model(
            model_name=given.model_name,
            base_model_path=prepared.outputs["base_model_path"],
            model_path=prepared.outputs["model_path"],
            parent_version=resolved.outputs["parent_version"],
            checkpoint_path=trained.outputs["Output"],
            data_path=prepared.outputs["data_path"],
            task=resolved.outputs["task"],
            anchor_paths=prepared.outputs["anchor_paths"],
            max_anchor_samples=given.max_anchor_samples,
            gate=given.gate,
            lm_eval_tasks=given.lm_eval_tasks,
            lm_eval_folder=given.lm_eval_folder,
            max_lm_eval_samples=given.max_lm_eval_samples,
            accelerators=f"{given.evaluation_gpus} x {given.gpu_resource}",
            **common,
        )
        registered = register_model(
            model_name=given.model_name,
            checkpoint_path=trained.outputs["Output"],
            data_path=prepared.outputs["data_path"],
            factors_path=factors.output,
            image=TRAINING_IMAGE,
            copy_checkpoint=given.copy_checkpoint,
            **common,
        )
        registered.after(evaluated)
        with dsl.If(evaluated.outputs["Output"] == True, name="gate"):  # noqa: E712
            promoted = promote_model(
                model_name=given.model_name,
                version=registered.output,
                parent_version=resolved.outputs["parent_version"],
                **common,
            )
    steps = [resolved, prepared, factors, trained, evaluated, registered, promoted]
    for step, gpus in (
        (factors, given.svd_gpus),
        (trained, given.training_gpus),
        (evaluated, given.evaluation_gpus),
    ):
        step.register_pipeline_channels([given.gpu_resource, gpus])
        step.set_accelerator_type(given.gpu_resource).set_accelerator_limit(gpus)
    for step in steps:
        policy = _POLICIES[step.name]
        _apply_policy(step, policy)
        cpu, memory = getattr(given, f"{policy.needs}_cpu"), getattr(given, f"{policy.needs}_memory")
        # Inside of dsl.If, the compiler hands on what a step's arguments name, and what is registered so.
        step.register_pipeline_channels([cpu, memory])
        step.set_cpu_request(cpu).set_memory_request(memory)
        if "cpu" in STEP_LIMITS:
            step.set_cpu_limit(cpu)
        if "memory" in STEP_LIMITS:
            step.set_memory_limit(memory)
        kubernetes.add_toleration_json(step, given.tolerations)
        kubernetes.add_node_selector_json(step, given.node_selector)
        if SCRATCH_SIZE:
            kubernetes.empty_dir_mount(step, "scratch", SCRATCH, size_limit=SCRATCH_SIZE)
            step.set_env_variable("OSFT_SCRATCH", SCRATCH)
        for secret, keys in (*_CREDENTIALS.items(), (given.storage_secret, _STORAGE_KEYS)):
            kubernetes.use_secret_as_env(step, secret, {key: key for key in keys}, optional=True)
    return steps


def _apply_policy(step: dsl.PipelineTask, policy: StepPolicy) -> None:
    step.set_caching_options(enable_caching=False)
    step.set_retry(policy.retries, backoff_duration="60s", backoff_factor=2.0, backoff_max_duration="900s")
    if policy.timeout_hours:
        kubernetes.set_timeout(step, int(policy.timeout_hours * 3600))


def _pipeline(*, mount_claim: bool) -> BaseComponent:
    """The pipeline, with or without the claim in every step: whether a pod mounts one, no parameter can say."""

    @form
    def continual_learning(*values):
        """Teach a model a new task without forgetting."""
        given = SimpleNamespace(**dict(zip(PipelineParameters.model_fields, values, strict=True)))
        steps = one_round(given)
        for step in steps if mount_claim else ():
            kubernetes.mount_pvc(step, pvc_name=given.storage_claim, mount_path=STORAGE_MOUNT)

    return dsl.pipeline(
        continual_learning,
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
