"""The command `osft doctor`: what is wrong with a cluster or this machine, and what to do about it.

Exit code 0: no errors. Exit code 1: there are errors. Exit code 2: what was given cannot be used.
"""

import inspect
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from osft.doctor.finding import Finding
from osft.process import exit_codes
from osft.process.console import failures, output
from osft.settings.base import refuse_unknown

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red", "not checked": "dim"}


class DoctorCommand(TyperCommand):
    """`--help` continues with what is checked."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The usual help, then the checks by area."""
        from osft.doctor.checks import AREAS, CHECKS

        super().format_help(ctx, formatter)
        for area in AREAS:
            output.print(Text(f"\n{area}", style="bold"))
            for check in CHECKS:
                if check.area == area:
                    question = " ".join((inspect.getdoc(check.find) or "").split())
                    output.print(
                        Padding(Text(f"{check.about}: ", style="cyan").append(question, style=""), (0, 0, 0, 2))
                    )


def doctor(
    parameters: Annotated[
        Path | None,
        typer.Argument(
            metavar="PARAMETERS.YAML", help="The pipeline's parameters, as for `osft submit`.", show_default=False
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter, over the file's; lists as JSON. Repeatable."),
    ] = None,
    pipeline: Annotated[
        Path | None,
        typer.Option(
            "--pipeline", metavar="FILE", help="Compiled YAML; else that of the checkout.", show_default=False
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this area: cluster, pods, services, inputs, machine. Repeatable.")
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(help="Of the pods; else the pod's own, or that of kubectl's context.")
    ] = None,
    service_account: Annotated[
        str | None,
        typer.Option(help="Ask for this account's rights, not for your own. Takes the right to ask that."),
    ] = None,
    pull_images: Annotated[
        bool,
        typer.Option("--pull-images", help="Start a pod for each image, see whether it is pulled, delete the pod."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    host: Annotated[
        str | None, typer.Option(help="URL of the Pipelines server; else KFP_ENDPOINT, else the cluster's.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with a bearer token for it.")] = None,
    cookie_file: Annotated[Path | None, typer.Option(help="File with the header Cookie for it.")] = None,
) -> None:
    """Check a cluster and this machine for what a round needs, and name the remedy of each finding.

    It asks the cluster of kubectl's context, or in a pod its own. Nothing is changed there: jobs and pods are tried by
    a server-side dry run, of secrets only the metadata is asked for. What an account may not read is "not checked". Two
    probes are made and removed: a folder on a mounted storage root, an object in an object store.

    Exit code 0: no errors. Exit code 1: errors. Exit code 2: what was given cannot be used.
    """
    from osft.doctor.checks import AREAS, examine
    from osft.doctor.configuration import Configuration
    from osft.doctor.subject import Subject

    with failures():
        refuse_unknown(only or (), AREAS, kind="area")
        configured, reason = None, ""
        try:
            configured = Configuration.read(pipeline, parameters, settings or [])
        except FileNotFoundError as missing:
            if parameters or settings or pipeline:
                raise
            reason = f"{missing}"  # an installed wheel has no pipeline: the machine and the cluster can be looked at
        subject = Subject(
            configured=configured,
            why_not_configured=reason,
            namespace=namespace,
            account=service_account,
            host=host,
            token_file=token_file,
            cookie_file=cookie_file,
            pull_images=pull_images,
        )
        found = list(examine(subject, only or AREAS))
    show(found, as_json=as_json)
    if any(finding.level == "error" for finding in found):
        raise typer.Exit(exit_codes.FAILED)


def show(found: list[Finding], *, as_json: bool) -> None:
    """Print a table to a terminal, plain lines elsewhere, or JSON."""
    if as_json:
        text = json.dumps({"findings": [one.to_dict() for one in found], "counts": _counts(found)}, indent=2)
        output.print(Text(text), soft_wrap=True)
        return
    lines = merged(found)
    if output.is_terminal:
        output.print(_table(lines))
    else:
        for one in lines:
            remedy = f" -> {one.remedy}" if one.remedy else ""
            output.print(Text(f"{one.level}: {one.area}: {one.about}: {one.text}{remedy}"), soft_wrap=True)
    output.print(Text(", ".join(f"{number} {level}" for level, number in _counts(found).items())))


def merged(found: Iterable[Finding]) -> list[Finding]:
    """The findings with one line for what was not checked for the same reason."""
    lines: list[Finding] = []
    for one in found:
        same = (one.level, one.area, one.text)
        at = next((n for n, line in enumerate(lines) if (line.level, line.area, line.text) == same), None)
        if one.level == "not checked" and at is not None:
            lines[at] = lines[at].replace(about=f"{lines[at].about}, {one.about}")
        else:
            lines.append(one)
    return lines


def _table(found: Iterable[Finding]) -> Table:
    table = Table("area", "", "what", "finding, and what to do")
    area = ""
    for one in found:
        told = Text(one.text)
        if one.remedy:
            told.append(f"\n{one.remedy}", style="italic")
        if area and one.area != area:
            table.add_section()
        table.add_row(one.area if one.area != area else "", Text(one.level, _STYLES[one.level]), Text(one.about), told)
        area = one.area
    return table


def _counts(found: Iterable[Finding]) -> dict[str, int]:
    return dict.fromkeys(_STYLES, 0) | Counter(str(one.level) for one in found)
