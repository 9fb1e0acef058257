"""Model versions and their aliases.

`candidate` names the newest version, `champion` the last one that passed the gate, `challenger` the last one that the
gate refused. A version is never overwritten: it lies in the artifacts of the MLflow run that registered it, `model/`
with the checkpoint and `lineage/` with where it came from (`osft.tracking.lineage`), and a run holds one version. A
version that was registered by its address has no more than the model card in `model/`; its checkpoint stays where it
is. The champion moves by compare-and-set (`osft.tracking.champion`).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from osft.models.origin import MODEL_CARD
from osft.storage import is_remote
from osft.storage.hashes import folder_sha256

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE = "candidate"
CHAMPION = "champion"
CHALLENGER = "challenger"
REFUSED_TAG = "osft.refused"
"""Why the gate refused a version."""
MODEL = "model"
LINEAGE = "lineage"
CHECKPOINT_TAG = "osft.checkpoint"
"""The pipeline run and the name of the checkpoint that a version is of."""
_CONTENT_TAG = "osft.checkpoint_sha256"


def register(
    mlflow: "MlflowClient",
    model_name: str,
    checkpoint: Path,
    *,
    run_id: str,
    description: str,
    tags: dict[str, Any],
    lineage: Path | None = None,
    digest: str | None = None,
    model_card: str | None = None,
    address: str | None = None,
) -> int:
    """Log a checkpoint folder to a run and make it a new version of `model_name`, with the alias `candidate`.

    With an `address`, the path or URI where `checkpoint` stays, it is not copied and the version's source names that.

    `lineage` is the folder that `osft.tracking.lineage.write` made; it is logged before the version exists. `digest` is
    the `folder_sha256` of the checkpoint, if it is known; `model_card` replaces the checkpoint's own. Returns the
    version. Called again for the same tag `osft.checkpoint`, by a retried step, it returns the version that is there.

    Raises ValueError if that version holds other bytes, or if the run holds another version's.
    """
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    digest = digest or folder_sha256(checkpoint)
    for known in mlflow.search_model_versions(f"name = '{model_name}'"):
        if known.tags.get(CHECKPOINT_TAG) == tags[CHECKPOINT_TAG]:
            if known.tags.get(_CONTENT_TAG, digest) != digest:
                raise ValueError(
                    f"{checkpoint} is not what version {known.version} of {model_name} was registered from, though "
                    f"both are {tags[CHECKPOINT_TAG]}. A version is never overwritten: start a new pipeline run"
                )
            # A newer candidate may have come since the first attempt.
            newest = version_of(mlflow, model_name, CANDIDATE)
            if newest is None or newest < int(known.version):
                mlflow.set_registered_model_alias(model_name, CANDIDATE, known.version)
            return int(known.version)
    for other in mlflow.search_model_versions(f"run_id = '{run_id}'"):
        raise ValueError(
            f"MLflow run {run_id} holds version {other.version} of {other.name}, which would be overwritten. "
            "Register each version from a run of its own"
        )
    if address is None:
        mlflow.log_artifacts(run_id, str(checkpoint), MODEL)
    if model_card is not None:
        mlflow.log_text(run_id, model_card, f"{MODEL}/{MODEL_CARD}")
    if lineage is not None:
        mlflow.log_artifacts(run_id, str(lineage), LINEAGE)
    version = mlflow.create_model_version(
        model_name,
        source=f"{mlflow.get_run(run_id).info.artifact_uri}/{MODEL}" if address is None else _source(mlflow, address),
        run_id=run_id,
        tags={name: str(value) for name, value in tags.items()} | {_CONTENT_TAG: digest},
        description=description,
    ).version
    mlflow.set_registered_model_alias(model_name, CANDIDATE, version)
    return int(version)


def _source(mlflow: "MlflowClient", address: str) -> str:
    """What a version's source says of a checkpoint that is not in MLflow's artifacts.

    A server takes no path for one, which would be on its own disk: there it says volume:///path.
    """
    if is_remote(address):
        return address
    path = Path(address).absolute()
    return f"volume://{path}" if mlflow.tracking_uri.startswith(("http:", "https:")) else path.as_uri()


def refuse(mlflow: "MlflowClient", model_name: str, version: int, reason: str) -> None:
    """Point the alias `challenger` at a version that the gate refused, and tag the version with the reason."""
    mlflow.set_model_version_tag(model_name, str(version), REFUSED_TAG, reason[:5000])
    mlflow.set_registered_model_alias(model_name, CHALLENGER, str(version))


def champion(mlflow: "MlflowClient", model_name: str) -> int | None:
    """The version that `champion` names, or None if there is none yet."""
    return version_of(mlflow, model_name, CHAMPION)


def version_of(mlflow: "MlflowClient", model_name: str, alias: str) -> int | None:
    """The version that an alias names, or None if there is no such alias or model."""
    from mlflow.exceptions import MlflowException

    try:
        return int(mlflow.get_model_version_by_alias(model_name, alias).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
