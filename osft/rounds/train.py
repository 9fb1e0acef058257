"""Decompose and train."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osft import storage
from osft.models.training_summary import FittedStep, TrainingSummary
from osft.rounds.pipeline_run import FACTORS_FILE, TRAINING_FILE, PipelineRun
from osft.settings.subspace import SubspaceConfig
from osft.settings.training import TrainConfig
from osft.settings.values import number

if TYPE_CHECKING:
    from osft.training.job import Launcher, Limits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LauncherSettings:
    """Where the training processes run."""

    launcher: str = "local"
    """"local": on this machine. "pytorchjob", "trainjob": in pods of such a job, for which the rest is."""
    job: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `osft.kubernetes.settings.JobSettings`."""
    pytorchjob: Mapping[str, Any] = field(default_factory=dict)
    """The former name of `job`."""
    training_image: str = ""
    storage_claim: str = ""
    storage_secret: str = ""
    """With the credentials of an s3:// storage root."""


def precompute_svd(
    run: PipelineRun, *, model_path: str, data_path: str, subspace: SubspaceConfig, accelerators: str = ""
) -> str:
    """Decompose the target weights that the store does not hold yet. Returns the path or URI of the set's manifest.

    What the set is like is left in the round's folder, `factors.json`, for its report. The prepared data is looked at
    with `rank_allocation="adaptive"` only.
    """
    from osft.models.loading import model_folder
    from osft.subspace.factor_summary import summarized
    from osft.subspace.preflight import preflight
    from osft.training.factors import compute_factors

    store = storage.join(run.storage_root, "factors")
    with run.step("precompute_svd") as step:
        step.log_params(subspace.to_dict() | {"accelerators": accelerators})
        model = model_folder(model_path)
        found = preflight(model)
        logger.info(found.line())
        factors = compute_factors(model, data_path, store, subspace, preflight=found)
        run.write_record(FACTORS_FILE, summarized(factors))
        step.log_metrics({"weights": len(factors.weights), "computed": factors.computed})
        step.log_params({"factors": factors.key, "statistics": factors.statistics})
    return storage.join(store, "sets", factors.path.name)


def train_osft(
    run: PipelineRun, where: LauncherSettings, *, manifest_file: str | Path, **settings: Any
) -> tuple[TrainingSummary, str]:
    """Train; `settings` are the fields of `TrainConfig` but for `ckpt_output_dir`. Returns the summary, and the model.

    With a `replay_ratio`, and no `replay_data` of one's own, samples of the datasets that the champion and its
    ancestors learned are replayed, as far as these are still there. What is started is written to `manifest_file`
    before.
    """
    from osft.training.job import run_job

    folder = run.address("train")
    settings |= {"ckpt_output_dir": folder, "use_processed_dataset": True}
    config = TrainConfig.from_parameters(settings | replay_settings(run, settings))
    with run.step("train_osft") as step:
        step.log_params(config.to_dict() | {"launcher": where.launcher})
        job, limits = _training_job(run, config, where)
        Path(manifest_file).write_text(job.describe(), encoding="utf-8")
        step.log_artifact(Path(manifest_file))
        run_job(job, limits=limits, output=folder, callbacks=[step.live_metrics()])
        summary = run.read_record(TrainingSummary, *TRAINING_FILE)
        step.log_metrics(summary.numbers())
        step.log_metrics({f"saved/{k}": v for k, v in summary.saved or () if isinstance(v, float)})
        step.log_metrics(curve_of_the_step(summary.fitted_step))
        step.log_metrics({f"replay/{k}": v for k, v in summary.replay or () if isinstance(v, int)})
        step.log_artifact(storage.local(run.address(*TRAINING_FILE)))
    return summary, storage.join(folder, summary.checkpoints[-1])


def curve_of_the_step(fitted: FittedStep | None) -> dict[str, float]:
    """What fit_step tried, as metrics: loss, gain and drift at each part of the update; none of a run without."""
    return {
        f"fitted_step/{name}_at_{tried.scale:g}": getattr(tried, name)
        for tried in (fitted.tried if fitted else ())
        for name in ("loss", "gain", "standard_error", "drift")
    }


def replay_settings(run: PipelineRun, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of replay, for a round with a `replay_ratio`: its earlier data that is still there, or none."""
    from osft.data.dataset_folder import is_dataset

    if settings.get("replay_data") or not number(settings.get("replay_ratio"), whole=False):
        return {}
    earlier = run.resolved().earlier_data
    there = {task: data for task, data in earlier.items() if is_dataset(data)}
    for task in earlier.keys() - there.keys():
        logger.warning(f"replay: nothing of {task}: its data, {earlier[task]}, is not there any more")
    if not there:
        logger.warning("replay: nothing, for there is no data of an earlier round")
        return {"replay_ratio": 0.0}
    return {"replay_data": list(there.values())}


def _training_job(run: PipelineRun, config: TrainConfig, where: LauncherSettings) -> "tuple[Launcher, Limits]":
    """What trains, and its limits. Raises ValueError for settings that cannot work."""
    from osft.training.job import Limits

    if where.launcher == "local":
        from osft.training.job import train_arguments
        from osft.training.local_job import LocalJob

        return LocalJob(train_arguments(config)), Limits()
    from osft.kubernetes.manifest import Storage
    from osft.kubernetes.settings import JobSettings, check_launcher, job_parameters
    from osft.kubernetes.training_job import training_job

    check_launcher(where.launcher)
    settings = JobSettings.from_parameters(job_parameters(where.job, where.pytorchjob))
    if storage.is_remote(run.storage_root):
        volume = Storage(secret=where.storage_secret or None)
    else:
        volume = Storage(claim=where.storage_claim)
    job = training_job(
        config,
        settings,
        launcher=where.launcher,
        image=where.training_image,
        storage=volume,
        pipeline_run_id=run.pipeline_run_id,
        mlflow_run_id=run.mlflow_run_id,
    )
    return job, settings.limits
