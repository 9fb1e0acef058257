"""Registry and data -> the model to train, and the records that are new to it."""

from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def resolve_round(
    model_name: str,
    base_model: str,
    data_uri: str,
    anchor_uris: list,
    gate: dict,
    min_new_samples: int,
    storage_root: str,
    mlflow_tracking_uri: str,
    mlflow_experiment: str,
    pipeline_run_id: str,
    pipeline_name: str,
) -> NamedTuple(
    "Resolved",
    [
        ("Output", bool),  # kfp.local evaluates conditions on outputs of this name only
        ("model", str),
        ("records", str),
        ("task", str),
        ("parent_version", int),
        ("mlflow_run_id", str),
    ],
):
    """Find the champion and decide by content which records its lineage has not learned; refuse bad settings.

    Args:
        model_name: Name of the registered model.
        base_model: Hugging Face id, folder, or example: URI of the model that the first round tunes.
        data_uri: File, folder, glob, s3:// prefix, Hugging Face data set id, or example: URI of the records.
        anchor_uris: Evaluation sets of what the model should not forget.
        gate: Rules of the gate, which are checked here.
        min_new_samples: With fewer new records there is nothing to learn.
        storage_root: Folder that all steps share.
        mlflow_tracking_uri: Tracking server; empty for MLFLOW_TRACKING_URI, or outside pods a database in storage_root.
        mlflow_experiment: Experiment that the pipeline run is recorded in.
        pipeline_run_id: Id of the pipeline run.
        pipeline_name: Name that the MLflow run gets.

    Returns:
        Output: False if there is nothing to learn; the run ends then.
        model: The champion's checkpoint, or the base model.
        records: File of the new records.
        task: Name of the new task.
        parent_version: The champion's version; 0 if there is none yet.
        mlflow_run_id: MLflow run of the pipeline run.
    """
    from collections import namedtuple

    from osft import rounds

    rounds.begin_step("resolve-round", pipeline_run_id)

    found, mlflow_run_id = rounds.resolve_round(
        rounds.PipelineRun(
            storage_root=storage_root, pipeline_run_id=pipeline_run_id, mlflow_tracking_uri=mlflow_tracking_uri
        ),
        model_name=model_name,
        base_model=base_model,
        data_uri=data_uri,
        anchor_uris=anchor_uris,
        gate=gate,
        min_new_samples=min_new_samples,
        experiment=mlflow_experiment,
        run_name=pipeline_name,
    )
    outputs = namedtuple("Resolved", ["Output", "model", "records", "task", "parent_version", "mlflow_run_id"])
    return outputs(
        not found.nothing_to_learn, found.model, found.records, found.task, found.parent_version or 0, mlflow_run_id
    )
