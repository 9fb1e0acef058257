"""New records -> a validated, tokenized, split dataset."""

from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare_data(
    base_model: str,
    model: str,
    records: str,
    anchor_uris: list,
    storage_root: str,
    mlflow_tracking_uri: str,
    mlflow_run_id: str,
    pipeline_run_id: str,
    max_seq_len: int,
    validation_fraction: float,
    max_train_samples: int,
    max_validation_samples: int,
    statistics: dsl.Output[dsl.Metrics],
) -> NamedTuple(
    "Prepared", [("base_model_path", str), ("model_path", str), ("data_path", str), ("anchor_paths", list)]
):
    """Fetch the models and the data, validate every record, tokenize, mask, deduplicate and split.

    Args:
        base_model: Hugging Face id, folder, or example: URI of the base model.
        model: The model to tune, as resolve_round names it.
        records: File of the new records, as resolve_round has written it.
        anchor_uris: Evaluation sets of what the model should not forget: file, folder, glob, or example: URI.
        storage_root: Folder that all steps share.
        mlflow_tracking_uri: Tracking server; empty for MLFLOW_TRACKING_URI, or outside pods a database in storage_root.
        mlflow_run_id: MLflow run of the pipeline run.
        pipeline_run_id: Id of the pipeline run.
        max_seq_len: Longer samples are dropped and counted.
        validation_fraction: Share of the prompts that is held out; at least one is.
        max_train_samples: Use at most this many training samples; 0 uses all.
        max_validation_samples: Hold out at most this many samples; 0 keeps all.

    Returns:
        base_model_path: Folder of the base model.
        model_path: Folder of the model to tune.
        data_path: Folder of the prepared dataset.
        anchor_paths: Files of the evaluation sets.
        statistics: Counts of samples and tokens.
    """
    from collections import namedtuple

    from osft import rounds

    rounds.begin_step("prepare-data", pipeline_run_id)

    prepared = rounds.prepare_data(
        rounds.PipelineRun(
            storage_root=storage_root,
            pipeline_run_id=pipeline_run_id,
            mlflow_run_id=mlflow_run_id,
            mlflow_tracking_uri=mlflow_tracking_uri,
        ),
        base_model=base_model,
        model=model,
        records=records,
        anchor_uris=anchor_uris,
        max_seq_len=max_seq_len,
        validation_fraction=validation_fraction,
        max_train_samples=max_train_samples,
        max_validation_samples=max_validation_samples,
    )
    for name, value in prepared.statistics.items():
        if isinstance(value, int):
            statistics.log_metric(name, value)
    outputs = namedtuple("Prepared", ["base_model_path", "model_path", "data_path", "anchor_paths"])
    return outputs(prepared.base_model_path, prepared.model_path, prepared.data_path, prepared.anchor_paths)
