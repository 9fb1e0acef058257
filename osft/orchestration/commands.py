"""`osft submit`, `osft status`, `osft cancel` and `osft schedule …`: the functions of `orchestration` in a terminal.

Exit codes: 0 what was asked for is done; 1 the run failed, or the server did; 2 something given cannot be used, which
is found before anything is sent, or by the server; 130 interrupted.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from osft.orchestration import (
    CompiledPipeline,
    RunStatus,
    UploadedPipeline,
    cancel,
    connect,
    create_schedule,
    delete_schedule,
    find_pipeline,
    list_schedules,
    newest_runs,
    parse_trigger,
    pause_schedule,
    pipeline_arguments,
    resume_schedule,
    status,
    submit,
    upload,
)
from osft.orchestration.arguments import refuse_missing
from osft.orchestration.display import follow_in_terminal, runs_table, schedules_table, steps_table
from osft.orchestration.pipelines import LATEST
from osft.orchestration.runs import EXPERIMENT
from osft.orchestration.schedules import recurring_run
from osft.process import exit_codes
from osft.process.console import errors, failures, output
from osft.storage.paths import expanded

if TYPE_CHECKING:
    import kfp

Host = Annotated[
    str | None,
    typer.Option(help="URL of the Pipelines server; else KFP_ENDPOINT, else the cluster's.", show_default=False),
]
Namespace = Annotated[str | None, typer.Option(help="Namespace of your profile, where there are several users.")]
TokenFile = Annotated[
    Path | None, typer.Option(help="File with a bearer token; else KFP_EXISTING_TOKEN, else the one of the pod.")
]
CookieFile = Annotated[Path | None, typer.Option(help="File with the header Cookie of a login page's session.")]
Pipeline = Annotated[
    Path | None,
    typer.Option("--pipeline", metavar="FILE", help="Compiled YAML; else, without a name, that of the checkout."),
]
PipelineName = Annotated[
    str | None, typer.Option(help="Name of the pipeline on the server; without FILE, one that is there already.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A parameter, over the file's; lists as JSON. Repeatable."),
]
Parameters = Annotated[
    Path | None,
    typer.Argument(metavar="PARAMETERS.YAML", help="The pipeline's parameters, NAME: VALUE.", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check, print what would be sent, send nothing.")]
Experiment = Annotated[str, typer.Option(help="Experiment of the runs; made if it is not there.")]
ServiceAccount = Annotated[str | None, typer.Option(help="Kubernetes service account of the pods.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Id of the run.", show_default=False)]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the schedule.", show_default=False)]

schedules = typer.Typer(
    no_args_is_help=True, help="Runs that start by themselves: create, list, pause, resume, delete."
)


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module to the application."""
    for command in (_submit, _status, _cancel):
        app.command(command.__name__.removeprefix("_"))(command)
    app.add_typer(schedules, name="schedule")


def _submit(
    parameters: Parameters = None,
    settings: Settings = None,
    pipeline: Pipeline = None,
    pipeline_name: PipelineName = None,
    pipeline_version: Annotated[
        str | None, typer.Option(help="Without FILE: name or id of the version; else the newest.")
    ] = None,
    experiment: Experiment = EXPERIMENT,
    run_name: Annotated[str | None, typer.Option(help="Else the pipeline's name and the time.")] = None,
    service_account: ServiceAccount = None,
    follow_run: Annotated[bool, typer.Option("--follow", help="Follow it as `osft status RUN --follow`.")] = False,
    dry_run: DryRun = False,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    cookie_file: CookieFile = None,
) -> None:
    """Start a run of the pipeline on a Kubeflow Pipelines server, and print its id."""
    with failures():
        client = _client_unless(dry_run and not pipeline_name, host, namespace, token_file, cookie_file)
        chosen = _chosen(client, pipeline, pipeline_name, pipeline_version, send=not dry_run)
        arguments = pipeline_arguments(chosen.parameters, parameters, settings)
        refuse_missing(chosen.parameters, arguments)
        if dry_run:
            _print_json(_described(chosen) | {"experiment": experiment, "parameters": arguments})
            return
        assert client is not None
        uploaded = _uploaded(client, chosen, pipeline_name)
        run_id = submit(
            client, uploaded, arguments, experiment=experiment, run_name=run_name, service_account=service_account
        )
        output.print(run_id, soft_wrap=True)
        if follow_run:
            _follow(client, run_id)


def _status(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="Id; else the newest runs.")] = None,
    follow_run: Annotated[bool, typer.Option("--follow", help="Until the run has ended, step by step.")] = False,
    interval: Annotated[float, typer.Option(min=0.05, help="With --follow: seconds between looks.")] = 5.0,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Without RUN: how many.")] = 10,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    cookie_file: CookieFile = None,
) -> None:
    """Show a run's steps, or the newest runs.

    Exit code 0: the run succeeded or is still running. Exit code 1: it failed or was cancelled. Exit code 130: --follow
    was interrupted; the run continues.
    """
    with failures():
        client = _client(host, namespace, token_file, cookie_file)
        if run is None:
            if follow_run:
                raise ValueError("--follow needs the id of a run; `osft status` lists the newest")
            output.print(runs_table(newest_runs(client, limit)))
            return
        if follow_run:
            _follow(client, run, interval)
            return
        found = status(client, run)
        output.print(steps_table(found))
        _exit_as(found)


def _cancel(
    run: Run,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait until it has ended.")] = False,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    cookie_file: CookieFile = None,
) -> None:
    """Terminate a run and wait until it has ended; one that has ended already is left as it is."""
    with failures():
        found = cancel(_client(host, namespace, token_file, cookie_file), run, wait=not no_wait)
        output.print(f"{run} {found.state}", soft_wrap=True)


@schedules.command("create")
def _create(
    name: Name,
    parameters: Parameters = None,
    settings: Settings = None,
    cron: Annotated[
        str | None, typer.Option(help='Such as "0 3 * * 1": five fields, or six with the second first; usually UTC.')
    ] = None,
    every: Annotated[str | None, typer.Option(help="Interval, such as 30m, 6h or 7d.")] = None,
    pipeline: Pipeline = None,
    pipeline_name: PipelineName = None,
    pipeline_version: Annotated[
        str, typer.Option(help="pinned: as it is now. latest: each run takes the newest. Else a version's name or id.")
    ] = "pinned",
    catchup: Annotated[bool, typer.Option("--catchup", help="After a pause, start every run that was missed.")] = False,
    max_concurrency: Annotated[int, typer.Option(help="Runs at a time, 1 to 10.")] = 1,
    start_time: Annotated[str | None, typer.Option(help="No run before; such as 2030-01-31T00:00:00Z.")] = None,
    end_time: Annotated[str | None, typer.Option(help="No run after.")] = None,
    paused: Annotated[bool, typer.Option("--paused", help="Make it, but start no run before `resume`.")] = False,
    experiment: Experiment = EXPERIMENT,
    service_account: ServiceAccount = None,
    dry_run: DryRun = False,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    cookie_file: CookieFile = None,
) -> None:
    """Have a schedule of this name and content on the server: the same again changes nothing, another replaces it."""
    with failures():
        trigger = parse_trigger(cron=cron, every=every)
        client = _client_unless(dry_run and not pipeline_name, host, namespace, token_file, cookie_file)
        version = None if pipeline_version == "pinned" else pipeline_version
        chosen = _chosen(client, pipeline, pipeline_name, version, send=not dry_run)
        arguments = pipeline_arguments(chosen.parameters, parameters, settings)
        refuse_missing(chosen.parameters, arguments)
        options: dict[str, Any] = {
            "no_catchup": not catchup,
            "max_concurrency": max_concurrency,
            "start_time": start_time,
            "end_time": end_time,
            "service_account": service_account,
        }
        if dry_run:
            body = recurring_run(
                name, _stand_in(chosen, pipeline_version), trigger, arguments, experiment_id=experiment, **options
            )
            del body["description"]  # a hash over ids of the server
            _print_json(_described(chosen) | {"recurring_run": body | {"mode": "DISABLE" if paused else "ENABLE"}})
            return
        assert client is not None
        uploaded = _uploaded(client, chosen, pipeline_name, follow_latest=pipeline_version == LATEST)
        made = create_schedule(
            client, name, uploaded, trigger, arguments, experiment=experiment, paused=paused, **options
        )
        output.print(f"{made.name}: {made.outcome}, {made.state}, {made.trigger}", soft_wrap=True)


@schedules.command("list")
def _list(
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    cookie_file: CookieFile = None,
) -> None:
    """Show all recurring runs of the server, also those that were made by other means."""
    with failures():
        output.print(schedules_table(list_schedules(_client(host, namespace, token_file, cookie_file))))


def _named_command(verb: str, help_text: str, act: Callable[["kfp.Client", str], str]) -> None:
    """Add a command that has a schedule's name and nothing else."""

    def command(
        name: Name,
        host: Host = None,
        namespace: Namespace = None,
        token_file: TokenFile = None,
        cookie_file: CookieFile = None,
    ) -> None:
        with failures():
            done = act(_client(host, namespace, token_file, cookie_file), name)
            output.print(f"{name}: {done}", soft_wrap=True)

    schedules.command(verb, help=help_text)(command)


_named_command(
    "pause", "Start no more runs; the one that runs continues.", lambda client, name: pause_schedule(client, name).state
)
_named_command("resume", "Start runs again.", lambda client, name: resume_schedule(client, name).state)
_named_command(
    "delete",
    "Delete a schedule; its runs stay.",
    lambda client, name: "deleted" if delete_schedule(client, name) else "",
)


def _client(host: str | None, namespace: str | None, token_file: Path | None, cookie_file: Path | None) -> "kfp.Client":
    cookies = Path(expanded(str(cookie_file))).read_text(encoding="utf-8").strip() if cookie_file else None
    token = expanded(str(token_file)) if token_file else None
    return connect(host, namespace=namespace, token_file=token, cookies=cookies)


def _client_unless(offline: bool, *connection: Any) -> "kfp.Client | None":
    return None if offline else _client(*connection)


def _chosen(
    client: "kfp.Client | None", file: Path | None, name: str | None, version: str | None, *, send: bool
) -> CompiledPipeline | UploadedPipeline:
    """The pipeline of a file, or one that is on the server."""
    if file or not name:
        if version not in (None, LATEST):
            raise ValueError(f"--pipeline-version {version} is one on the server: give --pipeline-name and no FILE")
        return CompiledPipeline.read(file)
    assert client is not None
    return find_pipeline(client, name, version)


def _uploaded(
    client: "kfp.Client", chosen: CompiledPipeline | UploadedPipeline, name: str | None, *, follow_latest: bool = False
) -> UploadedPipeline:
    if isinstance(chosen, UploadedPipeline):
        return chosen
    return upload(client, chosen, name=name, follow_latest=follow_latest)


def _described(chosen: CompiledPipeline | UploadedPipeline) -> dict[str, Any]:
    return {"pipeline": chosen.name, "pipeline_version": chosen.version_name}


def _stand_in(chosen: CompiledPipeline | UploadedPipeline, version: str) -> UploadedPipeline:
    """For --dry-run: names where the server will have ids."""
    if isinstance(chosen, UploadedPipeline):
        return chosen
    return UploadedPipeline(
        chosen.name, chosen.name, chosen.version_name, chosen.version_name, chosen.parameters, version == LATEST
    )


def _print_json(value: dict[str, Any]) -> None:
    output.print(Text(json.dumps(value, indent=2)), soft_wrap=True)


def _follow(client: "kfp.Client", run_id: str, interval: float = 5.0) -> None:
    try:
        found = follow_in_terminal(client, run_id, interval)
    except KeyboardInterrupt:
        errors.print(f"no longer following {run_id}, which continues; `osft cancel {run_id}` ends it", soft_wrap=True)
        raise typer.Exit(exit_codes.KEYBOARD_INTERRUPT) from None
    _exit_as(found)


def _exit_as(found: RunStatus) -> None:
    if found.ended and found.state not in ("SUCCEEDED", "SKIPPED"):
        raise typer.Exit(exit_codes.FAILED)
