"""The alias `champion` moves to a version that passed the gate."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def promote_model(
    model_name: str,
    version: int,
    parent_version: int,
    storage_root: str,
    mlflow_tracking_uri: str,
    mlflow_run_id: str,
    pipeline_run_id: str,
):
    """Make a model version the champion.

    Args:
        model_name: Name of the registered model.
        version: The version to promote.
        parent_version: The champion that it was compared with; 0 if there was none. If there is another one now,
            nothing is promoted.
        storage_root: Folder that all steps share.
        mlflow_tracking_uri: Tracking server; empty for MLFLOW_TRACKING_URI, or outside pods a database in storage_root.
        mlflow_run_id: MLflow run of the pipeline run.
        pipeline_run_id: Id of the pipeline run.
    """
    from osft import rounds

    rounds.begin_step("promote-model", pipeline_run_id)

    rounds.promote_model(
        rounds.PipelineRun(
            storage_root=storage_root,
            pipeline_run_id=pipeline_run_id,
            mlflow_run_id=mlflow_run_id,
            mlflow_tracking_uri=mlflow_tracking_uri,
        ),
        model_name=model_name,
        version=version,
        parent_version=parent_version or None,
    )
