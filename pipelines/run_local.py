"""Run the compiled pipeline on this machine, without a cluster.

    python -m pipelines.run_local --parameters examples/demonstration.yaml     a real model, a real task
    python -m pipelines.run_local --model ./my-model --data chats.jsonl --set num_epochs=3

It executes `pipelines/continual_learning/continual_learning.yaml` itself with kfp.local: every step is a process
of its own, with the code that a pod would run. Only a step that fails is not tried again. What kfp.local and the steps
print goes to a file in `logs/` of the storage; the terminal has the steps, their progress and their results.
"""

import os
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from osft.orchestration import CompiledPipeline, pipeline_arguments
from osft.orchestration.arguments import refuse_missing
from osft.process import logs
from osft.process.console import errors, failures
from osft.storage.paths import check_writable, expanded
from pipelines.continual_learning.parameters import PipelineParameters
from pipelines.local_console import RunConsole, display_for
from pipelines.local_process import execute, new_log
from pipelines.show_round import show_round

YAML = Path(__file__).parent / "continual_learning" / "continual_learning.yaml"
console = Console()
app = typer.Typer(add_completion=False)


@app.command()
def main(
    parameters: Annotated[
        Path | None, typer.Option(help="YAML file of pipeline parameters, NAME: VALUE, below all that is given here.")
    ] = None,
    model: Annotated[str, typer.Option(help="Hugging Face id, local folder, or example: URI.")] = "",
    data: Annotated[str, typer.Option(help="File, folder, glob, or example: URI of the new task.")] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A pipeline parameter, NAME=VALUE; lists as JSON. Repeatable.", metavar="NAME=VALUE"
        ),
    ] = None,
    storage: Annotated[Path, typer.Option(help="Folder for everything that is fetched and made.")] = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the parameters, run nothing.")] = False,
) -> None:
    """Run one round of continual learning on this machine and print what it learned and forgot."""
    logs.configure()
    with failures():
        storage = Path(expanded(str(storage)))
        arguments = local_arguments(model, data, settings or [], storage, parameters)
        check(arguments)
    if dry_run:
        console.print_json(data=arguments)
        return
    show_round(console, run(arguments, storage))


def local_arguments(
    model: str, data: str, settings: list[str], storage: Path, file: Path | None = None
) -> dict[str, Any]:
    """All pipeline parameters: the defaults, then the `file`'s, then what was given.

    Raises ValueError for a bad one.
    """
    known = CompiledPipeline.read(YAML).parameters
    given = [f"base_model={model}"] * bool(model) + [f"data_uri={data}"] * bool(data) + settings
    arguments = {"storage_root": str(storage.absolute())} | pipeline_arguments(known, file, given)
    refuse_missing(known, arguments)
    arguments = PipelineParameters(**arguments).to_dict()
    for name in ("base_model", "data_uri", "lm_eval_folder"):
        arguments[name] = _absolute(arguments[name])
    arguments["anchor_uris"] = [_absolute(uri) for uri in arguments["anchor_uris"]]
    return arguments


def _absolute(location: str) -> str:
    """A path that is there as the steps find it, which run in another folder; everything else as it is."""
    path = expanded(location)
    return str(Path(path).absolute()) if path and Path(path).exists() else path


def check(arguments: dict[str, Any]) -> None:
    """Refuse what can be seen to be wrong before a step is started."""
    from osft.data.files import check_names
    from osft.doctor.inputs import count_records, is_local_model, look_at_model
    from osft.tracking.addresses import check_model_name, checked_address

    check_model_name(arguments["model_name"])
    if arguments["mlflow_tracking_uri"]:
        checked_address(arguments["mlflow_tracking_uri"], make=False)
    check_writable("storage", arguments["storage_root"])
    model = arguments["base_model"]
    training = PipelineParameters(**arguments).training()
    check_names([arguments["data_uri"], *arguments["anchor_uris"]])
    for uri in (arguments["data_uri"], *arguments["anchor_uris"]):
        count_records(uri, allow_text=uri != arguments["data_uri"])
    if is_local_model(model):
        found = look_at_model(model, training.target_patterns, training.unfreeze_rank_ratio)
        errors.print(found.line())  # the parameters alone go to the standard output


def run(arguments: dict[str, Any], storage: Path) -> Path:
    """Execute the compiled YAML. Returns the round's folder. Raises typer.Exit with code 1 if a step fails."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    pipeline = without_retries(YAML.read_text(encoding="utf-8"))
    log = new_log(storage / "logs")
    with RunConsole(console, display_for(console, step_names(pipeline)), log) as shown:
        if execute(pipeline, arguments, storage / "kfp", log, shown) != 0:
            shown.failed()
            raise typer.Exit(1)
    return storage / "rounds" / round_id(log)


def round_id(log: Path) -> str:
    """The id that kfp.local gave to a run, by which the steps name its folder."""
    found = re.search(r'"pipeline_run_id": "([^"]+)"', log.read_text(encoding="utf-8", errors="replace"))
    assert found is not None, f"{log} has no step"
    return found[1]


def step_names(pipeline: str) -> list[str]:
    """The steps of a compiled pipeline, in the order in which they run."""
    spec = next(yaml.safe_load_all(pipeline))

    def steps(dag: dict[str, Any]) -> Iterator[str]:
        tasks = dag["tasks"]
        for task in TopologicalSorter({name: tasks[name].get("dependentTasks", ()) for name in tasks}).static_order():
            name = tasks[task]["componentRef"]["name"]
            component = spec["components"][name]
            if "dag" in component:
                yield from steps(component["dag"])
            else:
                yield name.removeprefix("comp-")

    return list(steps(spec["root"]["dag"]))


def without_retries(pipeline: str) -> str:
    """The compiled pipeline with no step tried again after a failure: on a cluster pods die, here it is an answer."""
    documents = list(yaml.safe_load_all(pipeline))
    spec = documents[0]
    for dag in [spec["root"]["dag"], *(part["dag"] for part in spec["components"].values() if "dag" in part)]:
        for task in dag["tasks"].values():
            task.pop("retryPolicy", None)
    return yaml.safe_dump_all(documents, sort_keys=False)


if __name__ == "__main__":
    app()
