"""The steps of the continual-learning pipeline, as functions.

A pipeline component is a call of one of these. Each validates before it works, records itself as a nested MLflow
run, and can be called again after it was killed: what it had finished is found by content or by the run's id.

Everything lies below one storage root that all steps share: on a cluster a ReadWriteMany volume, or an `s3://` URI,
with which each step fetches what it needs to a scratch folder and publishes what it made (`osft.storage` says who
writes what and what completes it). What steps hand to each other are paths or URIs below the root, never scratch paths.

    examples/ models/    models and data that were fetched
    data/<hash>/         prepared datasets
    factors/             decompositions, by content
    rounds/<run id>/     what one pipeline run trained and measured:
        train/             a run's output folder
        evaluation.json report.html version.json
    mlflow/              runs and model versions, unless there is a tracking server; with a URI there must be one
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osft import examples, storage
from osft.atomic import atomic_path
from osft.config import SubspaceConfig, TrainConfig
from osft.tracking import registry, runs

if TYPE_CHECKING:
    from osft.training.job import Launcher, Limits


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Where one pipeline run keeps its things."""

    storage_root: str
    pipeline_run_id: str
    mlflow_run_id: str = ""
    """The pipeline run's MLflow run; empty until `prepare_data` has made it."""
    mlflow_tracking_uri: str = ""
    """Empty: MLFLOW_TRACKING_URI, or a database below the storage root."""

    def __post_init__(self) -> None:
        tracking = self.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if storage.is_remote(self.storage_root) and not tracking:
            raise ValueError(
                f"storage_root {self.storage_root} cannot hold MLflow's database. Give mlflow_tracking_uri, or set "
                "MLFLOW_TRACKING_URI to a tracking server"
            )

    @property
    def folder(self) -> Path:
        """What this pipeline run writes, on this machine; with a URI as storage root what this step wrote or read."""
        return storage.local(self.address())

    def address(self, *parts: str) -> str:
        """The path or URI of something that this pipeline run writes."""
        return storage.join(self.storage_root, "rounds", self.pipeline_run_id, *parts)

    def write(self, name: str, text: str) -> Path:
        """Make a file of this pipeline run, for all steps. Returns it as it is on this machine."""
        with atomic_path(self.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        storage.publish(self.address(name))
        return self.folder / name

    def step(self, name: str) -> Any:
        """The context of one step: a nested MLflow run (`osft.tracking.runs.StepRun`)."""
        return runs.step_run(self.mlflow(), self.mlflow_run_id, name)

    def mlflow(self) -> Any:
        """A client of the tracking server."""
        return runs.client(self.mlflow_tracking_uri, self.storage_root)


@dataclass(frozen=True, kw_only=True, slots=True)
class LauncherSettings:
    """Where the training processes run."""

    launcher: str = "local"
    """"local": on this machine. "pytorchjob": in pods of a PyTorchJob, for which the rest is."""
    pytorchjob: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `osft.kubernetes.settings.PyTorchJobSettings`."""
    training_image: str = ""
    storage_claim: str = ""
    storage_secret: str = ""
    """With the credentials of an s3:// storage root."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRound:
    """What `prepare_data` hands to the other steps."""

    model_path: str
    data_path: str
    task: str
    anchor_paths: list[str]
    mlflow_run_id: str
    statistics: dict[str, Any]


def prepare_data(
    round: Round,
    *,
    base_model: str,
    data_uri: str,
    anchor_uris: list[str],
    experiment: str,
    run_name: str,
    max_seq_len: int,
    validation_fraction: float,
    max_train_samples: int,
    max_validation_samples: int,
) -> PreparedRound:
    """Fetch what is named by URI, check every evaluation set, and prepare the training data."""
    from osft.data.prepare import prepare
    from osft.data.records import check_names, data_files, data_name, read_records
    from osft.models import model_folder, stored_model

    for uri in (base_model, data_uri, *anchor_uris):
        storage.is_remote(uri)  # refuses credentials, before anything is written down
    root = round.storage_root
    fetched = storage.join(root, "examples")
    mlflow = round.mlflow()
    parent = runs.pipeline_run(
        mlflow,
        experiment=experiment,
        pipeline_run_id=round.pipeline_run_id,
        name=run_name,
        storage_root=round.storage_root,
    )
    with runs.step_run(mlflow, parent, "prepare_data") as step:
        step.log_params({"base_model": base_model, "data_uri": data_uri, "anchor_uris": anchor_uris})
        # The cheap checks first: nothing is fetched or converted for a run that cannot start.
        check_names([data_uri, *anchor_uris])
        for uri in (data_uri, *anchor_uris):
            if not uri.startswith(examples.SCHEME):
                data_files(uri)
        data_path = examples.resolve(data_uri, fetched)
        anchors = [examples.resolve(uri, fetched) for uri in anchor_uris]
        for anchor in anchors:
            for _ in read_records(anchor, allow_text=True):
                pass
        model = stored_model(examples.resolve(base_model, fetched), storage.join(root, "models"))
        prepared = prepare(
            data_path,
            model_folder(model),
            storage.join(root, "data"),
            max_seq_len=max_seq_len,
            validation_fraction=validation_fraction,
            max_train_samples=max_train_samples,
            max_validation_samples=max_validation_samples,
        )
        step.log_params(prepared.statistics["settings"])
        step.log_metrics({k: v for k, v in prepared.statistics.items() if isinstance(v, int)})
        step.log_artifact(prepared.folder / "dataset.json")
    return PreparedRound(
        model_path=model,
        data_path=storage.join(root, "data", prepared.key),
        task=data_name(data_uri),
        anchor_paths=anchors,
        mlflow_run_id=parent,
        statistics=prepared.statistics,
    )


def precompute_svd(round: Round, *, model_path: str, data_path: str, subspace: SubspaceConfig) -> str:
    """Decompose the target weights that the store does not hold yet. Returns the path or URI of the set's manifest.

    The prepared data is looked at with `rank_allocation="adaptive"` only.
    """
    from osft.models import model_folder
    from osft.training.inputs import compute_factors

    store = storage.join(round.storage_root, "factors")
    with round.step("precompute_svd") as step:
        step.log_params(asdict(subspace))
        factors = compute_factors(model_folder(model_path), data_path, store, subspace)
        step.log_metrics({"weights": len(factors.weights), "computed": factors.computed})
        step.log_params({"factors": factors.key})
    return storage.join(store, "sets", factors.path.name)


def train_osft(round: Round, where: LauncherSettings, *, manifest_file: str | Path, **settings: Any) -> dict[str, Any]:
    """Train; `settings` are the fields of `TrainConfig` but for `ckpt_output_dir`. Returns the summary.

    What is started is written to `manifest_file` before.
    """
    from osft.training.job import run_job

    folder = round.address("train")
    config = TrainConfig.from_parameters(settings | {"ckpt_output_dir": folder, "use_processed_dataset": True})
    with round.step("train_osft") as step:
        step.log_params(config.to_dict() | {"launcher": where.launcher})
        job, limits = _training_job(round, config, where)
        Path(manifest_file).write_text(job.describe(), encoding="utf-8")
        step.log_artifact(Path(manifest_file))
        run_job(job, limits=limits, output=folder, callbacks=[step.live_metrics()])
        summary = _read_json(storage.join(folder, "training.json"))
        step.log_metrics({k: v for k, v in summary.items() if isinstance(v, int | float)})
        step.log_artifact(storage.local(storage.join(folder, "training.json")))
    return summary | {"checkpoint": storage.join(folder, summary["checkpoints"][-1])}


def _training_job(round: Round, config: TrainConfig, where: LauncherSettings) -> "tuple[Launcher, Limits]":
    """What trains, and its limits. Raises ValueError for settings that cannot work."""
    from osft.training.job import Limits

    if where.launcher == "local":
        from osft.training.command import train_arguments
        from osft.training.local_job import LocalJob

        return LocalJob(train_arguments(config)), Limits()
    if where.launcher != "pytorchjob":
        raise ValueError(f"launcher must be 'local' or 'pytorchjob', got {where.launcher!r}")
    from osft.kubernetes.manifest import Storage
    from osft.kubernetes.settings import PyTorchJobSettings
    from osft.kubernetes.training_job import training_job

    settings = PyTorchJobSettings.from_parameters(where.pytorchjob)
    if storage.is_remote(round.storage_root):
        volume = Storage(secret=where.storage_secret or None)
    else:
        volume = Storage(claim=where.storage_claim)
    job = training_job(
        config,
        settings,
        image=where.training_image,
        storage=volume,
        pipeline_run_id=round.pipeline_run_id,
        mlflow_run_id=round.mlflow_run_id,
    )
    return job, settings.limits


def evaluate_model(
    round: Round,
    *,
    model_path: str,
    checkpoint_path: str,
    data_path: str,
    factors_path: str,
    task: str,
    anchor_paths: list[str],
    max_anchor_samples: int,
    min_task_improvement: float,
    max_anchor_increase: float,
) -> dict[str, Any]:
    """Measure base and candidate, decide, and write `evaluation.json` and `report.html` to the round's folder."""
    from osft.evaluation.evaluate import evaluate, load_set
    from osft.evaluation.gate import GateRules
    from osft.evaluation.report import render_report
    from osft.subspace.factor_store import load_factor_set

    rules = GateRules(min_task_improvement=min_task_improvement, max_anchor_increase=max_anchor_increase)
    held_out = storage.join(data_path, "validation.jsonl")
    sets = [load_set(held_out, "new task", name=task)]
    sets += [load_set(path, "anchor", max_samples=max_anchor_samples) for path in anchor_paths]
    with round.step("evaluate_model") as step:
        step.log_params(asdict(rules) | {"max_anchor_samples": max_anchor_samples})
        evaluation = evaluate(model_path, checkpoint_path, sets, rules=rules)
        evaluation_file = round.write("evaluation.json", json.dumps(evaluation, indent=2) + "\n")
        for model, scores in evaluation["results"].items():
            for name, score in scores.items():
                numbers = {key: score[key] for key in ("loss", "perplexity", "accuracy")}
                step.log_metrics({f"{model}/{name}/{key}": value for key, value in numbers.items()}, to_parent=True)
        metrics = storage.fetch(round.address("train", "metrics.jsonl")).read_text(encoding="utf-8")
        html = render_report(
            evaluation,
            training=_read_json(round.address("train", "training.json")),
            metrics=[json.loads(line) for line in metrics.splitlines()],
            factors=load_factor_set(factors_path),
            dataset=_read_json(storage.join(data_path, "dataset.json")),
        )
        step.log_artifact(round.write("report.html", html), to_parent=True)
        step.log_artifact(evaluation_file, to_parent=True)
    return evaluation


def register_model(round: Round, *, model_name: str, checkpoint_path: str) -> int:
    """Make the checkpoint a model version with the alias `candidate`, whatever the gate decided. Returns it."""
    evaluation = _read_json(round.address("evaluation.json"))
    change = {
        name: evaluation["results"]["candidate"][name]["loss"] / evaluation["results"]["base"][name]["loss"] - 1
        for name in evaluation["sets"]
    }
    described = ", ".join(f"{name} {value:+.1%}" for name, value in change.items())
    with round.step("register_model") as step:
        version = registry.register(
            step.client,
            model_name,
            storage.fetch(checkpoint_path, marker="config.json"),
            run_id=step.run_id,
            description=f"OSFT of {evaluation['base_model']} on {evaluation['task']}. Change of loss: {described}",
            tags={
                "osft.checkpoint": f"{round.pipeline_run_id}/{Path(checkpoint_path).name}",
                "osft.task": evaluation["task"],
                "osft.base_model": evaluation["base_model"],
                "osft.decision": "promote" if evaluation["decision"]["promote"] else "refuse",
            },
        )
        step.log_params({"model_name": model_name, "model_version": version})
        round.write("version.json", json.dumps({"model_name": model_name, "version": version}, indent=2) + "\n")
        print(f"registry: {model_name} version {version} is the candidate", flush=True)
        step.client.set_terminated(round.mlflow_run_id, "FINISHED")
    return version


def promote_model(round: Round, *, model_name: str, version: int) -> None:
    """Point the alias `champion` at a version."""
    with round.step("promote_model") as step:
        previous = registry.promote(step.client, model_name, version)
        step.log_params({"model_name": model_name, "model_version": version, "previous_champion": previous})
        print(f"registry: {model_name} version {version} is the champion, before it was {previous}", flush=True)
        step.client.set_terminated(round.mlflow_run_id, "FINISHED")


def _read_json(location: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(storage.fetch(location).read_text(encoding="utf-8"))
    return value
