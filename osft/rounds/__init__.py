"""The steps of the continual-learning pipeline, as functions.

A pipeline component is a call of one of these. Each validates before it works, records itself as a nested MLflow
run, and can be called again after it was killed: what it had finished is found by content or by the run's id.

Everything lies below one storage root that all steps share: on a cluster a ReadWriteMany volume, or an `s3://` URI,
with which each step fetches what it needs to a scratch folder and publishes what it made (`osft.storage` says who
writes what and what completes it). What steps hand to each other are paths or URIs below the root, never scratch paths.

    examples/ models/    models and data that were fetched
    records/             what was new to a round, by content
    data/<hash>/         prepared datasets
    factors/             what is frozen, by content; statistics of what models know, which rounds hand on
    scores/              what models scored on evaluation sets, by content
    champions/           which run replaced which champion (`osft.tracking.champion`)
    rounds/<run id>/     what one pipeline run found, trained and measured:
        round.json         what `resolve_round` decided
        factors.json       what the factors are like (`osft.subspace.factor_summary`)
        train/             a run's output folder
        evaluation.json report.html version.json; the JSON files hold their own hash (`osft.storage.sealed`): a damaged
                           one is named, and the step that needs it ends
    mlflow/              runs and model versions, unless there is a tracking server; with a URI there must be one
"""

from osft.rounds.evaluate import evaluate_model
from osft.rounds.pipeline_run import PipelineRun, begin_step
from osft.rounds.prepare import PreparedData, prepare_data
from osft.rounds.promote import promote_model, register_model
from osft.rounds.resolve import resolve_round
from osft.rounds.train import LauncherSettings, precompute_svd, train_osft

__all__ = [
    "LauncherSettings",
    "PipelineRun",
    "PreparedData",
    "begin_step",
    "evaluate_model",
    "precompute_svd",
    "prepare_data",
    "promote_model",
    "register_model",
    "resolve_round",
    "train_osft",
]
