"""Base and candidate on the new task and the anchors; the gate's decision and the report."""

from kfp import dsl

from components import TRAINING_IMAGE


@dsl.component(base_image=TRAINING_IMAGE, install_kfp_package=False)
def evaluate_model(
    model_path: str,
    checkpoint_path: str,
    data_path: str,
    factors_path: str,
    task: str,
    anchor_paths: list,
    max_anchor_samples: int,
    min_task_improvement: float,
    max_anchor_increase: float,
    storage_root: str,
    mlflow_tracking_uri: str,
    mlflow_run_id: str,
    pipeline_run_id: str,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> bool:
    """Measure the base model and the candidate on everything that counts, and decide.

    Args:
        model_path: Folder of the base model.
        checkpoint_path: Folder of the candidate.
        data_path: Folder of the prepared dataset, with the held-out part.
        factors_path: Manifest of the factor set, for the report.
        task: Name of the new task.
        anchor_paths: Files of what the model should not forget.
        max_anchor_samples: Use at most this many records of each anchor; 0 uses all.
        min_task_improvement: The new task's loss must fall by at least this share.
        max_anchor_increase: No anchor's loss may rise by more than this share.
        storage_root: Folder that all steps share.
        mlflow_tracking_uri: Tracking server; empty for MLFLOW_TRACKING_URI or a database below storage_root.
        mlflow_run_id: MLflow run of the pipeline run.
        pipeline_run_id: Id of the pipeline run.

    Returns:
        Output: Whether the candidate passed the gate.
        metrics: Losses and accuracies of both models on each set.
        report: What was learned and forgotten, as a page to look at.
    """
    import shutil

    from osft import steps

    round = steps.Round(
        storage_root=storage_root,
        pipeline_run_id=pipeline_run_id,
        mlflow_run_id=mlflow_run_id,
        mlflow_tracking_uri=mlflow_tracking_uri,
    )
    evaluation = steps.evaluate_model(
        round,
        model_path=model_path,
        checkpoint_path=checkpoint_path,
        data_path=data_path,
        factors_path=factors_path,
        task=task,
        anchor_paths=anchor_paths,
        max_anchor_samples=max_anchor_samples,
        min_task_improvement=min_task_improvement,
        max_anchor_increase=max_anchor_increase,
    )
    for model, scores in evaluation["results"].items():
        for name, score in scores.items():
            for key in ("loss", "accuracy"):
                if score[key] is not None:
                    metrics.log_metric(f"{model}/{name}/{key}", score[key])
    shutil.copyfile(round.folder / "report.html", report.path)
    return evaluation["decision"]["promote"]
