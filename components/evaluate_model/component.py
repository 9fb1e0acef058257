"""Base, champion and candidate on the new task, the earlier ones and the anchors; the decision and the report."""

from kfp import dsl

from components import TRAINING_IMAGE


@dsl.component(base_image=TRAINING_IMAGE, install_kfp_package=False)
def evaluate_model(
    model_name: str,
    base_model_path: str,
    model_path: str,
    parent_version: int,
    checkpoint_path: str,
    data_path: str,
    task: str,
    anchor_paths: list,
    max_anchor_samples: int,
    gate: dict,
    lm_eval_tasks: list,
    lm_eval_folder: str,
    max_lm_eval_samples: int,
    accelerators: str,
    storage_root: str,
    mlflow_tracking_uri: str,
    mlflow_run_id: str,
    pipeline_run_id: str,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> bool:
    """Measure the models on everything that counts, and decide.

    Args:
        model_name: Name of the registered model.
        base_model_path: Folder of the base model.
        model_path: Folder of the model that was tuned: the champion, or the base model.
        parent_version: The champion's version; 0 if there is none yet.
        checkpoint_path: Folder of the candidate.
        data_path: Folder of the prepared dataset, with the held-out part.
        task: Name of the new task.
        anchor_paths: Files of what the model should not forget.
        max_anchor_samples: Use at most this many records of each anchor; 0 uses all.
        gate: Rules that the candidate must pass.
        lm_eval_tasks: Tasks of lm-evaluation-harness to compare the models on.
        lm_eval_folder: Folder with YAML files of tasks of one's own.
        max_lm_eval_samples: Ask only the first so many questions of each; 0 asks all.
        accelerators: What the step's pod asks for, such as "1 x nvidia.com/gpu", for the record.
        storage_root: Folder that all steps share.
        mlflow_tracking_uri: Tracking server; empty for MLFLOW_TRACKING_URI, or outside pods a database in storage_root.
        mlflow_run_id: MLflow run of the pipeline run.
        pipeline_run_id: Id of the pipeline run.

    Returns:
        Output: Whether the candidate passed the gate.
        metrics: Losses and accuracies of the models on each set, and the candidate's drift from the others.
        report: What was learned and forgotten, as a page to look at.
    """
    import shutil

    from osft import rounds

    rounds.begin_step("evaluate-model", pipeline_run_id)

    run = rounds.PipelineRun(
        storage_root=storage_root,
        pipeline_run_id=pipeline_run_id,
        mlflow_run_id=mlflow_run_id,
        mlflow_tracking_uri=mlflow_tracking_uri,
    )
    evaluation = rounds.evaluate_model(
        run,
        model_name=model_name,
        base_model_path=base_model_path,
        model_path=model_path,
        parent_version=parent_version or None,
        checkpoint_path=checkpoint_path,
        data_path=data_path,
        task=task,
        anchor_paths=anchor_paths,
        max_anchor_samples=max_anchor_samples,
        gate=gate,
        lm_eval_tasks=lm_eval_tasks,
        lm_eval_folder=lm_eval_folder,
        max_lm_eval_samples=max_lm_eval_samples,
        accelerators=accelerators,
    )
    for model, scores in evaluation.results.items():
        for name, score in scores.items():
            metrics.log_metric(f"{model}/{name}/loss", score.loss)
            if score.accuracy is not None:
                metrics.log_metric(f"{model}/{name}/accuracy", score.accuracy)
    for model, of_sets in evaluation.drift.items():
        for name, drift in of_sets.items():
            if drift is not None:
                metrics.log_metric(f"drift/{model}/{name}", drift.kl)
    shutil.copyfile(run.folder / "report.html", report.path)
    return evaluation.decided.promote
