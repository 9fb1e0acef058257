"""Target weights, or what their layers are fed -> frozen and free directions."""

from kfp import dsl

from components import TRAINING_IMAGE


@dsl.component(base_image=TRAINING_IMAGE, install_kfp_package=False)
def precompute_svd(
    model_path: str,
    data_path: str,
    unfreeze_rank_ratio: float,
    protect: str,
    free_subspace: str,
    target_patterns: list,
    rank_allocation: str,
    more_settings: dict,
    accelerators: str,
    storage_root: str,
    mlflow_tracking_uri: str,
    mlflow_run_id: str,
    pipeline_run_id: str,
) -> str:
    """Compute which directions of the target weights are frozen; what the store holds already is reused.

    With protect "activations", these are the directions of the layers' inputs that carry most energy on the text that a
    base model writes itself, and on all that earlier rounds learned, whose statistics the champion carries. What is not
    described here is the setting of `osft train` of that name.

    Args:
        model_path: Folder of the model.
        data_path: Folder of the prepared dataset, of which adaptive ranks take a calibration sample.
        target_patterns: Regular expressions searched in the names of the linear layers; empty for all.
        more_settings: As in train_osft; here those that determine the directions, such as calibration_tokens, count.
        accelerators: What the step's pod asks for, such as "1 x nvidia.com/gpu", for the record.
        storage_root: Folder that all steps share.
        mlflow_tracking_uri: Tracking server; empty for MLFLOW_TRACKING_URI, or outside pods a database in storage_root.
        mlflow_run_id: MLflow run of the pipeline run.
        pipeline_run_id: Id of the pipeline run.

    Returns:
        Output: Manifest of the factor set.
    """
    given = dict(locals())

    from osft import SubspaceConfig, rounds

    rounds.begin_step("precompute-svd", pipeline_run_id)

    given |= {"target_patterns": target_patterns or None} | more_settings
    settings = {name: given[name] for name in SubspaceConfig.model_fields if name in given}
    return rounds.precompute_svd(
        rounds.PipelineRun(
            storage_root=storage_root,
            pipeline_run_id=pipeline_run_id,
            mlflow_run_id=mlflow_run_id,
            mlflow_tracking_uri=mlflow_tracking_uri,
        ),
        model_path=model_path,
        data_path=data_path,
        subspace=SubspaceConfig(**settings),
        accelerators=accelerators,
    )
