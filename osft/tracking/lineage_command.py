"""The command `osft lineage`: the history of a model version as a tree."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from osft.process.console import failures, output
from osft.storage.paths import expanded

if TYPE_CHECKING:
    from osft.tracking.lineage import Lineage

_REFERENCE = re.compile(r"(?P<model>.+?)(?:@(?P<alias>[^@/]+)|/(?P<version>[0-9]+))")


def lineage(
    version: Annotated[
        str, typer.Argument(metavar="VERSION", help="MODEL@ALIAS or MODEL/VERSION, as registered.", show_default=False)
    ],
    storage_root: Annotated[
        Path | None, typer.Option(help="Folder with the runs' own MLflow database.", show_default=False)
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="The tracking server; else MLFLOW_TRACKING_URI.", show_default=False)
    ] = None,
) -> None:
    """Show how a model version came to be: every round back to the base model, and what each one scored."""
    with failures():
        from osft.tracking import lineage as lineages

        mlflow = tracking_client(tracking_uri, storage_root)
        model_name, number = _resolve(mlflow, version)
        tree = tree_of(mlflow, model_name, lineages.history(mlflow, model_name, number))
    output.print(tree, soft_wrap=True)


def tracking_client(tracking_uri: str | None, storage_root: Path | None) -> Any:
    """A client for what is there already: `tracking_uri`, the database below a folder, or MLFLOW_TRACKING_URI.

    Raises FileNotFoundError for a folder without a database, ValueError where nothing says what to ask, and as
    `runs.client`.
    """
    from osft.tracking import runs

    if not tracking_uri and storage_root is not None:
        storage_root = Path(expanded(str(storage_root)))
        tracking_uri = runs.local_tracking_uri(storage_root)
        # MLflow would make a database here, and find nothing in it.
        if not Path(tracking_uri.removeprefix("sqlite:///")).is_file():
            raise FileNotFoundError(f"{storage_root} holds no mlflow/mlflow.db. Give --tracking-uri, or another folder")
    if not tracking_uri and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError("give --storage-root or --tracking-uri, or set MLFLOW_TRACKING_URI")
    return runs.client(tracking_uri or "", storage_root or "")


def _resolve(mlflow: Any, reference: str) -> tuple[str, int]:
    """Model and version that `reference` names."""
    from osft.tracking import registry

    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise ValueError(f"{reference!r} names no version. Give MODEL@ALIAS, such as m@champion, or MODEL/VERSION")
    model_name = found["model"]
    if found["version"]:
        return model_name, int(found["version"])
    number = registry.version_of(mlflow, model_name, found["alias"])
    if number is None:
        raise ValueError(f"the registry has no model {model_name} with the alias {found['alias']!r}")
    return model_name, number


def tree_of(mlflow: Any, model_name: str, versions: "dict[int, Lineage]") -> Tree:
    """The base model, and below each other the versions of `osft.tracking.lineage.history`."""
    aliases: dict[int, list[str]] = {}
    for alias, number in mlflow.get_registered_model(model_name).aliases.items():
        aliases.setdefault(int(number), []).append(alias)
    root: Tree | None = None
    branch = root
    for number, entry in versions.items():
        if branch is None:
            root = branch = Tree(Text(entry.base_model, style="bold"))
        named = f" ({', '.join(sorted(aliases[number]))})" if number in aliases else ""
        branch = branch.add(Text(f"{model_name} version {number}{named}", style="bold").append(f"  {entry.task}"))
        for line in _details(entry):
            branch.add(Text(line, style="dim"))
    assert root is not None, "a history has at least one version"
    return root


def _is_shown(metric: str, value: float | None) -> bool:
    return value is not None and not metric.endswith("_stderr")


def _details(entry: "Lineage") -> list[str]:
    data = entry.data
    revision = f" at {data.revision}" if data.revision else ""
    lines = [f"data: {data.uri}{revision}, {data.num_new} new of {data.num_records} records"]
    tasks = {row.task for row in entry.rows}
    for kind, of_task in (("tasks", True), ("anchors", False)):
        scores = {name: values for name, values in entry.rows[-1].scores.items() if (name in tasks) == of_task}
        if scores:
            shown = (
                f"{name} "
                + ", ".join(f"{metric} {value:.4f}" for metric, value in values.items() if _is_shown(metric, value))
                for name, values in scores.items()
            )
            lines.append(f"{kind}: {' · '.join(shown)}")
    code = f"code: {entry.code_version}" + (f", image {entry.image}" if entry.image else "")
    return [*lines, f"{code}; pipeline run {entry.pipeline_run_id}, MLflow run {entry.mlflow_run_id}"]
