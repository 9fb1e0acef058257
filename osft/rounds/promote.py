"""A model version of what was trained, and the aliases that say what is thought of it."""

import logging
from pathlib import Path
from typing import Any

import osft
from osft import storage
from osft.data.record_hashes import RECORDS_FILE, read_hashes
from osft.evaluation.record import Evaluation
from osft.models.model_card import with_scores
from osft.models.origin import MODEL_CARD, StoredStatistics
from osft.models.training_summary import TrainingSummary
from osft.rounds.evaluate import next_scores
from osft.rounds.leftovers import remove_factors
from osft.rounds.pipeline_run import EVALUATION_FILE, TRAINING_FILE, VERSION_FILE, PipelineRun, RegisteredVersion
from osft.rounds.resolution import ResolvedRound
from osft.storage.hashes import folder_sha256
from osft.tracking import champion, lineage, registry, runs
from osft.tracking.description import describe_version
from osft.tracking.lineage import Lineage
from osft.tracking.runs import Outcome

logger = logging.getLogger(__name__)


def register_model(
    run: PipelineRun,
    *,
    model_name: str,
    checkpoint_path: str,
    data_path: str,
    factors_path: str,
    image: str,
    copy_checkpoint: bool = True,
) -> int:
    """Make the checkpoint a model version with its lineage, whatever the gate decided. Returns it.

    Without `copy_checkpoint` it is registered where it is, and not copied into MLflow's artifacts. Its alias is
    `candidate`, and `challenger` if the gate refused it.
    """
    evaluation = run.read_record(Evaluation, EVALUATION_FILE)
    resolved = run.resolved()
    decision = evaluation.decided
    tags = {
        registry.CHECKPOINT_TAG: f"{run.pipeline_run_id}/{Path(checkpoint_path).name}",
        "osft.base_model": resolved.base_model,
        runs.PIPELINE_RUN_TAG: run.pipeline_run_id,
        runs.TASK_TAG: resolved.task,
        runs.PARENT_VERSION_TAG: resolved.parent_version or "none",
        runs.DECISION_TAG: "promote" if decision.promote else "refuse",
    }
    with run.step("register_model") as step:
        folder = run.folder / "lineage"
        data = storage.fetch(data_path)
        checkpoint = storage.fetch(checkpoint_path, marker="config.json")
        digest = folder_sha256(checkpoint)
        description = describe_version(evaluation, parent_version=resolved.parent_version)
        card = checkpoint / MODEL_CARD
        lineage.write(
            folder,
            _lineage(step.client, run, model_name, checkpoint_path, digest, factors_path, image, evaluation, resolved),
            record_hashes=read_hashes(data / RECORDS_FILE),
            held_out=data / "validation.jsonl",
        )
        version = registry.register(
            step.client,
            model_name,
            checkpoint,
            run_id=step.run_id,
            description=description,
            tags=tags,
            lineage=folder,
            digest=digest,
            model_card=with_scores(card.read_text(encoding="utf-8"), description) if card.is_file() else None,
            address=None if copy_checkpoint else checkpoint_path,
        )
        step.log_params({"model_name": model_name, "model_version": version})
        run.write_record(VERSION_FILE, RegisteredVersion(model_name=model_name, version=version))
        logger.info(f"registry: {model_name} version {version} is the candidate")
        step.tag_round(
            model_version=version,
            decision=tags[runs.DECISION_TAG],
            outcome=None if decision.promote else Outcome.REFUSED,
        )
        if not decision.promote:
            registry.refuse(step.client, model_name, version, decision.reason)
            logger.info(f"registry: the gate refused it, it is the challenger: {decision.reason}")
            step.client.set_terminated(run.mlflow_run_id, "FINISHED")
    return version


def promote_model(run: PipelineRun, *, model_name: str, version: int, parent_version: int | None) -> None:
    """Point the alias `champion` at a version, if it still names `parent_version`, which the round started from.

    The factors of earlier champions are removed then. Raises ChampionChanged if it names another one: the candidate
    was not compared with that, and is the challenger.
    """
    with run.step("promote_model") as step:
        try:
            previous = champion.promote(
                step.client,
                model_name,
                version,
                storage_root=run.storage_root,
                run=run.pipeline_run_id,
                expected_champion=parent_version,
            )
        except champion.ChampionChanged as error:
            registry.refuse(step.client, model_name, version, str(error))
            raise
        step.log_params({"model_name": model_name, "model_version": version, "previous_champion": previous})
        step.tag_round(outcome=Outcome.PROMOTED)
        remove_factors(step.client, run.storage_root, ended=run.pipeline_run_id)
        before = f", before it was version {previous}" if previous else ""
        logger.info(f"registry: {model_name} version {version} is the champion{before}")
        step.client.set_terminated(run.mlflow_run_id, "FINISHED")


def _lineage(
    mlflow: Any,
    run: PipelineRun,
    model_name: str,
    checkpoint_path: str,
    checkpoint_sha256: str,
    factors_path: str,
    image: str,
    evaluation: Evaluation,
    resolved: ResolvedRound,
) -> Lineage:
    parent = None
    if resolved.parent_version is not None:
        parent = lineage.read(mlflow, model_name, resolved.parent_version)
    baseline, rows = next_scores(evaluation, parent)
    training = run.read_record(TrainingSummary, *TRAINING_FILE)
    return Lineage(
        model_name=model_name,
        parent_version=resolved.parent_version,
        base_model=resolved.base_model,
        task=resolved.task,
        checkpoint=checkpoint_path,
        checkpoint_sha256=checkpoint_sha256,
        data=resolved.data,
        settings=training.config,
        factor_key=Path(factors_path).stem,
        statistics=below_the_root(training.statistics, run.storage_root),
        code_version=osft.__version__,
        image=image,
        pipeline_run_id=run.pipeline_run_id,
        mlflow_run_id=run.mlflow_run_id,
        baseline=baseline,
        rows=rows,
    )


def below_the_root(statistics: StoredStatistics | None, storage_root: str) -> StoredStatistics | None:
    """What training.json says of the statistics, for a storage root that may be mounted elsewhere next time."""
    if statistics is None:
        return None
    return statistics.replace(address=statistics.address.removeprefix(f"{storage_root.rstrip('/')}/"))
