"""Model versions and their aliases.

`candidate` names the newest version, `champion` the one that passed the gate. A version is never overwritten.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE = "candidate"
CHAMPION = "champion"


def register(
    mlflow: "MlflowClient",
    model_name: str,
    checkpoint: Path,
    *,
    run_id: str,
    description: str,
    tags: dict[str, Any],
) -> int:
    """Log a checkpoint folder to a run and make it a new version of `model_name`, with the alias `candidate`.

    Returns the version. Called again for the same checkpoint content (tag `osft.checkpoint`), by a retried step,
    it returns the version that is there.
    """
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for known in mlflow.search_model_versions(f"name = '{model_name}'"):
        if known.tags.get("osft.checkpoint") == tags["osft.checkpoint"]:
            mlflow.set_registered_model_alias(model_name, CANDIDATE, known.version)
            return int(known.version)
    mlflow.log_artifacts(run_id, str(checkpoint), "model")
    version = mlflow.create_model_version(
        model_name,
        source=f"{mlflow.get_run(run_id).info.artifact_uri}/model",
        run_id=run_id,
        tags={name: str(value) for name, value in tags.items()},
        description=description,
    ).version
    mlflow.set_registered_model_alias(model_name, CANDIDATE, version)
    return int(version)


def promote(mlflow: "MlflowClient", model_name: str, version: int) -> int | None:
    """Point the alias `champion` at a version. Returns the version that it named before, or None."""
    previous = champion(mlflow, model_name)
    mlflow.set_registered_model_alias(model_name, CHAMPION, str(version))
    return previous


def champion(mlflow: "MlflowClient", model_name: str) -> int | None:
    """The version that `champion` names, or None if there is none yet."""
    from mlflow.exceptions import MlflowException

    try:
        return int(mlflow.get_model_version_by_alias(model_name, CHAMPION).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
