"""Versions with a lineage, made without training."""

from pathlib import Path
from typing import Any

from osft.data.record_hashes import record_hash, union
from osft.data.records import read_records
from osft.tracking import lineage, registry
from osft.tracking.lineage import DataManifest, Lineage
from tests.conftest import write_jsonl


def a_lineage(parent: Lineage | None = None, parent_version: int | None = None, **changes: Any) -> Lineage:
    """The lineage of a round that learned `task` after `parent`."""
    task = changes.pop("task", "first")
    scores = changes.pop("scores", {task: {"loss": 1.0, "accuracy": 0.5}})
    parent_scores = changes.pop("parent_scores", {})
    fields: dict[str, Any] = {
        "model_name": "m",
        "parent_version": parent_version,
        "base_model": "org/base",
        "task": task,
        "checkpoint": "/nowhere",
        "data": DataManifest(uri=f"{task}.jsonl", files=(), num_records=3, num_new=2),
        "settings": {"learning_rate": 1e-5, "target_patterns": None},
        "factor_key": "key",
        "code_version": "0.1.0",
        "image": "",
        "pipeline_run_id": "kfp-1",
        "mlflow_run_id": "mlflow-1",
        "baseline": {task: {"loss": 2.0, "accuracy": 0.25}},
        "rows": lineage.next_rows(parent, task, parent_scores=parent_scores, scores=scores),
    }
    return Lineage(**(fields | changes))


def register_round(mlflow: Any, folder: Path, entry: Lineage, records: list[dict], held_out: list[dict]) -> int:
    """Make a version of a checkpoint folder, `folder`/checkpoint, that took `records` and `held_out`."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(str(folder))
    taken = write_jsonl(folder / "taken.jsonl", records + held_out)
    lineage.write(
        folder / "lineage",
        entry,
        record_hashes=union([[record_hash(record) for record in read_records(str(taken))]]),
        held_out=write_jsonl(folder / "held_out.jsonl", held_out),
    )
    run_id = new_run(mlflow, folder)
    return registry.register(
        mlflow,
        entry.model_name,
        checkpoint,
        run_id=run_id,
        description="d",
        tags={"osft.checkpoint": str(folder)},
        lineage=folder / "lineage",
    )


def new_run(mlflow: Any, folder: Path) -> str:
    """A run whose artifacts lie beside `folder`."""
    name = str(folder.parent)
    known = mlflow.get_experiment_by_name(name)
    artifacts = (folder.parent / "artifacts").as_uri()
    experiment = known.experiment_id if known else mlflow.create_experiment(name, artifact_location=artifacts)
    return mlflow.create_run(experiment).info.run_id
