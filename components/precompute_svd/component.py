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
    base model writes itself, and on all that earlier rounds learned, whose statistics the champion carries.

    Args:
        model_path: Folder of the model.
        data_path: Folder of the prepared dataset, of which adaptive ranks take a calibration sample.
        unfreeze_rank_ratio: Share of each weight's directions that may be trained, in (0, 1].
        protect: weights (their singular directions) or activations (what their layers are fed).
        free_subspace: complement or core.
        target_patterns: Regular expressions searched in the names of the linear layers; empty for all.
        rank_allocation: uniform, or adaptive to each layer's importance.
        more_settings: As in train_osft; here those that determine the directions, such as calibration_tokens, count.
        accelerators: What the step's pod asks for, such as "1 x nvidia.com/gpu", for the record.
        storage_root: Folder that all steps share.
        mlflow_tracking_uri: Tracking server; empty for MLFLOW_TRACKING_URI or a database below storage_root.
        mlflow_run_id: MLflow run of the pipeline run.
        pipeline_run_id: Id of the pipeline run.

    Returns:
        Output: Manifest of the factor set.
    """
    from osft import SubspaceConfig, rounds
    from osft.process.errors import tell_in_one_line

    tell_in_one_line()

    settings = {
        "unfreeze_rank_ratio": unfreeze_rank_ratio,
        "protect": protect,
        "free_subspace": free_subspace,
        "target_patterns": target_patterns or None,
        "rank_allocation": rank_allocation,
    }
    known = SubspaceConfig.model_fields
    settings |= {name: value for name, value in more_settings.items() if name in known}
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
