"""Several rounds of continual learning on this machine, as a schedule would run them.

    python -m pipelines.run_rounds                        three real tasks, one after the other
    python -m pipelines.run_rounds --samples 1000 --set num_epochs=2

Every round runs the same compiled pipeline with the same parameters, those of `examples/rounds.yaml`. What differs is
what has arrived in the inbox since: before each round one more task's file does. A last round finds nothing new.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from osft.data import examples
from osft.process import logs
from osft.process.console import failures
from osft.storage.paths import expanded
from pipelines import run_local
from pipelines.show_round import show_history, show_round

PARAMETERS = Path(__file__).parents[1] / "examples" / "rounds.yaml"
TASKS = ("film-reviews", "malicious-strings", "exam-languages")
console = Console()
app = typer.Typer(add_completion=False)


@app.command()
def main(
    tasks: Annotated[
        str, typer.Option(help="What arrives, in this order: names of example data sets.", metavar="NAME,NAME,…")
    ] = ",".join(TASKS),
    samples: Annotated[
        int, typer.Option(help="Records of each task, a quarter of them held out; 0: all.", min=0)
    ] = 352,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A pipeline parameter over that of examples/rounds.yaml.", metavar="NAME=VALUE"),
    ] = None,
    storage: Annotated[Path, typer.Option(help="Folder for everything that is fetched and made.")] = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the parameters, run nothing.")] = False,
) -> None:
    """Teach one model several tasks, a round each, and print what it learned and forgot."""
    logs.configure()
    names = [name.strip() for name in tasks.split(",")]
    with failures():
        storage = Path(expanded(str(storage)))
        arguments = round_arguments(storage, settings or [])
        if dry_run:
            console.print_json(data=arguments | {"tasks": names, "samples": samples})
            return
        rounds = [play(arguments, storage, name, samples) for name in names]
    console.rule("a round without news")
    began = time.monotonic()
    show_round(console, run_local.run(arguments, storage))
    console.print(f"it took {time.monotonic() - began:.0f} s")
    from osft.tracking import runs

    mlflow = runs.client(arguments["mlflow_tracking_uri"], storage.absolute())
    learned = [folder for folder in rounds if (folder / "evaluation.json").is_file()]
    show_history(console, learned, arguments["model_name"], mlflow)


def round_arguments(storage: Path, settings: list[str]) -> dict[str, Any]:
    """The pipeline's parameters, the same in every round. Raises ValueError for a bad one."""
    arguments = run_local.local_arguments("", "", settings, storage, PARAMETERS)
    arguments["data_uri"] = arguments["data_uri"].replace("{storage}", str(storage.absolute()))
    return arguments


def play(arguments: dict[str, Any], storage: Path, task: str, samples: int) -> Path:
    """Let a task's records arrive and run a round. Returns the round's folder."""
    console.rule(task)
    examples.few_records(f"{examples.SCHEME}{task}", storage / "examples", storage / "inbox", samples)
    run_local.check(arguments)
    folder = run_local.run(arguments, storage)
    show_round(console, folder)
    return folder


if __name__ == "__main__":
    app()
