"""The command `osft clean`: what is left below a storage root that nothing refers to.

It removes nothing without `--yes`. Exit code 2: what is needed cannot be found out, so nothing was removed.
"""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from osft import storage
from osft.process.console import failures, output
from osft.storage.paths import expanded
from osft.tracking.lineage_command import tracking_client


def clean(
    storage_root: Annotated[
        str, typer.Argument(metavar="STORAGE_ROOT", help="The pipeline's: a folder or URI.", show_default=False)
    ],
    tracking_uri: Annotated[
        str | None,
        typer.Option(help="The tracking server; else MLFLOW_TRACKING_URI, or the root's database.", show_default=False),
    ] = None,
    ended: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID",
            help="A pipeline run that is over, whatever MLflow says; with --yes, MLflow is told. Repeatable.",
            show_default=False,
        ),
    ] = None,
    retry_days: Annotated[float, typer.Option(min=0.0, help="A round that failed keeps its files for so long.")] = 7.0,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; else only say what would be.")] = False,
) -> None:
    """Remove what no model version, alias or running round refers to, below the storage root of the pipeline."""
    with failures():
        from osft.rounds.leftovers import end_runs, remove, sort_files

        root = expanded(storage_root)
        elsewhere = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or storage.is_remote(root)
        mlflow = tracking_client(tracking_uri, None if elsewhere else Path(root))
        parts = sort_files(mlflow, root, ended=ended or (), retry_days=retry_days)
        table = Table("place", "files", "size", "what becomes of it", "why")
        for part in sorted(parts, key=lambda part: (part.fate == "stay", -part.size)):
            fate = {"remove": "removed" if yes else "would go", "stay": "stays", "unknown": "stays, unknown"}[part.fate]
            texts = (part.place, str(len(part.files)), decimal(part.size), fate, part.reason)
            table.add_row(*map(Text, texts), style="" if part.fate == "remove" else "dim")
        output.print(table)
        size = decimal(sum(part.size for part in parts if part.fate == "remove"))
        if not yes:
            output.print(Text(f"Nothing was removed. With --yes, {size} are."))
            return
        remove(root, parts)
        if left := end_runs(mlflow, ended or ()):
            output.print(Text(f"MLflow took {left} for running: now KILLED."))
        output.print(Text(f"{size} were removed."))
