"""Dataset and factors -> a tuned checkpoint."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train_osft(
    model_path: str,
    data_path: str,
    factors_path: str,
    unfreeze_rank_ratio: float,
    protect: str,
    stiffness: float,
    free_subspace: str,
    target_patterns: list,
    effective_batch_size: int,
    max_tokens_per_gpu: int,
    learning_rate: float,
    num_epochs: int,
    lr_scheduler: str,
    warmup_steps: int,
    weight_decay: float,
    replay_ratio: float,
    nproc_per_node: int,
    seed: int,
    max_seq_len: int,
    rank_allocation: str,
    more_settings: dict,
    launcher: str,
    job: dict,
    pytorchjob: dict,
    training_image: str,
    storage_claim: str,
    storage_secret: str,
    storage_root: str,
    mlflow_tracking_uri: str,
    mlflow_run_id: str,
    pipeline_run_id: str,
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Tune the model in the free directions of its weights, in processes of this step or in a job of its own.

    The step can be retried: it finds the job that it has started, or resumes from the saved training state. Cancelled,
    it deletes the job at once; it is seldom left the time to see it gone. It fails with the reason of the rank that
    failed first.

    What is not described here is the setting of `osft train` of that name.

    Args:
        model_path: Folder of the model.
        data_path: Folder of the prepared dataset.
        factors_path: Manifest of the factor set.
        target_patterns: Regular expressions searched in the names of the linear layers; empty for all.
        replay_ratio: Share of the training samples that is drawn from the data of earlier rounds, where that is still
            there; 0 replays nothing.
        nproc_per_node: Processes; 0 for one per GPU. Not with a job, which has num_procs_per_worker.
        more_settings: Further settings of `osft train` by name, which go before those above.
        launcher: "local": processes of this step. "pytorchjob": a PyTorchJob of Kubeflow's training operator.
            "trainjob": a TrainJob of Kubeflow Trainer.
        job: Settings of the job by name (osft.kubernetes.settings.JobSettings).
        pytorchjob: The former name of job; only one of them can be given.
        training_image: Image of the job's pods, unless job has one.
        storage_claim: ReadWriteMany claim that the pods mount where the steps have it.
        storage_secret: Secret with the credentials of an s3:// storage_root, as the pods' environment.
        storage_root: Folder that all steps share.
        mlflow_tracking_uri: Tracking server; empty for MLFLOW_TRACKING_URI, or outside pods a database in storage_root.
        mlflow_run_id: MLflow run of the pipeline run.
        pipeline_run_id: Id of the pipeline run.

    Returns:
        Output: Folder of the checkpoint, a plain Hugging Face model.
        manifest: The job, or the local command, written before it is started.
        metrics: Loss, counts, time and memory.
    """
    given = dict(locals())

    from osft import TrainConfig, rounds

    rounds.begin_step("train-osft", pipeline_run_id)

    settings = {name: given[name] for name in TrainConfig.model_fields if name in given}
    del settings["mlflow_tracking_uri"]  # the step logs what its processes measure
    settings |= {
        "factors": factors_path,
        "target_patterns": target_patterns or None,
        "nproc_per_node": nproc_per_node or None,
    }
    summary, checkpoint = rounds.train_osft(
        rounds.PipelineRun(
            storage_root=storage_root,
            pipeline_run_id=pipeline_run_id,
            mlflow_run_id=mlflow_run_id,
            mlflow_tracking_uri=mlflow_tracking_uri,
        ),
        rounds.LauncherSettings(
            launcher=launcher,
            job=job,
            pytorchjob=pytorchjob,
            training_image=training_image,
            storage_claim=storage_claim,
            storage_secret=storage_secret,
        ),
        manifest_file=manifest.path,
        **(settings | more_settings),
    )
    for name, value in summary.numbers().items():
        metrics.log_metric(name, value)
    return checkpoint
