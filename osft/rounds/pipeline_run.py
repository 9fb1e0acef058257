"""Where one pipeline run keeps its things, and how its steps find them."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from osft import storage
from osft.process import logs
from osft.process.errors import tell_in_one_line
from osft.rounds.resolution import ResolvedRound
from osft.storage.atomic import atomic_path
from osft.storage.paths import expanded
from osft.storage.record import Migration, Record
from osft.storage.sealed import read_sealed, sealed
from osft.tracking import runs

ROUND_FILE, FACTORS_FILE = "round.json", "factors.json"
EVALUATION_FILE, REPORT_FILE, VERSION_FILE = "evaluation.json", "report.html", "version.json"
"""What steps leave in a round's folder for those that follow."""
TRAINING_FILE = ("train", "training.json")
"""What the training run leaves there."""
_POD = "KFP_POD_NAME"
"""Kubeflow Pipelines sets it in the pod of each step."""
_REMEDY = "Start a new pipeline run, or retry the step that writes it"
R = TypeVar("R", bound=Record)


class RegisteredVersion(Record):
    """The model version of a round; `version.json`."""

    MIGRATIONS: ClassVar[Mapping[int, Migration]] = {0: lambda found: found}  # had no format

    model_name: str
    version: int


def begin_step(name: str, pipeline_run_id: str) -> None:
    """What a component calls first: lines of the log bear its name, and one line says why it ends (`osft.process`)."""
    tell_in_one_line()
    logs.configure(step=name, run_id=pipeline_run_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineRun:
    """Where one pipeline run keeps its things."""

    storage_root: str
    pipeline_run_id: str
    mlflow_run_id: str = ""
    """The pipeline run's MLflow run; empty until `resolve_round` has made it."""
    mlflow_tracking_uri: str = ""
    """Empty: MLFLOW_TRACKING_URI, or outside of a pod a database below the storage root."""

    def __post_init__(self) -> None:
        if expanded(self.storage_root) != self.storage_root:
            raise ValueError(
                f"storage_root {self.storage_root}: each step's pod has a home folder of its own. Give the whole path "
                "of a folder that all steps share"
            )
        tracking = self.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if storage.is_remote(self.storage_root) and not tracking:
            raise ValueError(
                f"storage_root {self.storage_root} cannot hold MLflow's database. Give mlflow_tracking_uri, or set "
                "MLFLOW_TRACKING_URI to a tracking server"
            )
        if _POD in os.environ and not tracking:
            raise ValueError(
                "mlflow_tracking_uri is empty, and this step runs in a pod: MLflow's database would be a SQLite file "
                f"on the volume {self.storage_root}, which pods of several nodes damage (network file systems do not "
                "keep its locks). Give mlflow_tracking_uri, or MLFLOW_TRACKING_URI, the address of an MLflow server; "
                "on a cluster of one node with a disk of its own, "
                f"mlflow_tracking_uri={runs.local_tracking_uri(self.storage_root)}"
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

    def write_record(self, name: str, record: Record) -> Path:
        """Make a JSON file of this pipeline run that holds its own hash (`osft.storage.sealed`), for all steps."""
        return self.write(name, json.dumps(sealed(record.to_dict()), indent=2) + "\n")

    def read_record(self, kind: type[R], *parts: str) -> R:
        """What a step left. Raises DamagedFile or RecordError if it is not what was written, or of a newer release."""
        return kind.read(self.address(*parts), _REMEDY)

    def step(self, name: str) -> Any:
        """The context of one step: a nested MLflow run (`osft.tracking.runs.StepRun`)."""
        return runs.step_run(self.mlflow(), self.mlflow_run_id, name)

    def resolved(self) -> ResolvedRound:
        """What `resolve_round` decided."""
        return self.read_record(ResolvedRound, ROUND_FILE)

    def mlflow(self) -> Any:
        """A client of the tracking server."""
        return runs.client(self.mlflow_tracking_uri, self.storage_root)


def read_json(location: str) -> dict[str, Any]:
    """A JSON file of a path or URI, without its hash. Raises DamagedFile if it is not what was written."""
    return read_sealed(storage.fetch(location), _REMEDY)
