"""Checkpoint -> a model version with its lineage and the alias `candidate`."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register_model(
    model_name: str,
    checkpoint_path: str,
    data_path: str,
    factors_path: str,
    image: str,
    copy_checkpoint: bool,
    storage_root: str,
    mlflow_tracking_uri: str,
    mlflow_run_id: str,
    pipeline_run_id: str,
) -> int:
    """Register the checkpoint in MLflow, promoted or not, so that every round can be looked at and gone back to.

    Args:
        model_name: Name of the registered model.
        checkpoint_path: Folder of the candidate.
        data_path: Folder of the prepared dataset, whose held-out part stays with the version.
        factors_path: Manifest of the factor set.
        image: Image that trained.
        copy_checkpoint: Copy the checkpoint into MLflow's artifacts; else the version names where it is.
        storage_root: Folder that all steps share.
        mlflow_tracking_uri: Tracking server; empty for MLFLOW_TRACKING_URI, or outside pods a database in storage_root.
        mlflow_run_id: MLflow run of the pipeline run.
        pipeline_run_id: Id of the pipeline run.

    Returns:
        Output: The model version.
    """
    from osft import rounds

    rounds.begin_step("register-model", pipeline_run_id)

    return rounds.register_model(
        rounds.PipelineRun(
            storage_root=storage_root,
            pipeline_run_id=pipeline_run_id,
            mlflow_run_id=mlflow_run_id,
            mlflow_tracking_uri=mlflow_tracking_uri,
        ),
        model_name=model_name,
        checkpoint_path=checkpoint_path,
        data_path=data_path,
        factors_path=factors_path,
        image=image,
        copy_checkpoint=copy_checkpoint,
    )
