"""The command `osft`: train, decompose, evaluate, export, lineage, clean, doctor; of runs: `orchestration.commands`.

Importing this module loads neither torch nor transformers, so that `--help` answers at once; each command imports
what it needs.
"""

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from osft.doctor.doctor_command import DoctorCommand, doctor
from osft.models.export_command import export
from osft.orchestration.commands import add_commands
from osft.process import exit_codes
from osft.process.console import failures, output
from osft.rounds.clean_command import clean
from osft.settings import compatibility
from osft.settings.base import default_text, meaning, plain_type, read_file, refuse_unknown, type_text
from osft.settings.training import TrainConfig, grouped_fields
from osft.storage.paths import expanded
from osft.tracking.lineage_command import lineage

if TYPE_CHECKING:
    from osft.training.plan import TrainingPlan

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Continual learning by Orthogonal Subspace Fine-Tuning."
)


class _TrainCommand(TyperCommand):
    """`--help` continues with the documentation of every parameter."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        output.print(parameter_help())


@app.command(cls=_TrainCommand)
def train(
    config_file: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.YAML", help="Parameters, NAME: VALUE.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A parameter, over that of the file; VALUE as in YAML. Repeatable."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, load no weights, start nothing.")
    ] = False,
    gpu_memory: Annotated[float, typer.Option(min=1.0, help="With --dry-run: GiB of a GPU.")] = 80.0,
) -> None:
    """Train a model, with parameters from a YAML file and from --set.

    Exit code 2: a parameter, the data or the model cannot be used. Exit code 1: training failed. From 128 on: the run
    was interrupted or lost a peer, and the same command resumes from its saved state.
    """
    with failures(connection_lost=exit_codes.CONNECTION_LOST):
        given = read_parameters(config_file, settings or [])
        if dry_run or given.get("dry_run"):
            gc.disable()  # over a second of the time that importing torch and transformers takes
            from osft.api import check_places
            from osft.training.plan import plan

            config = TrainConfig.from_parameters(given)
            check_places(config)
            output.print(plan_tables(plan(config, gpu_memory_gib=gpu_memory)))
            return
        config = TrainConfig.from_parameters(given)
        from osft.api import run

        result = run(config)
    output.print(Text(repr(result)), soft_wrap=True)


@app.command()
def decompose(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hugging Face id of the model.", show_default=False)
    ],
    store: Annotated[Path, typer.Option(help="Folder of the factor store.", show_default=False)],
    unfreeze_rank_ratio: Annotated[float, typer.Option(help="As in training.", show_default=False)],
    target_patterns: Annotated[
        list[str] | None, typer.Option("--target-pattern", help="As in training. Repeatable.")
    ] = None,
    protect: Annotated[str, typer.Option(help="weights or activations, as in training.")] = "weights",
    free_subspace: Annotated[str, typer.Option(help="complement or core, as in training.")] = "complement",
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Of the text that the model writes, as in training.", show_default=False)
    ] = None,
    calibration_data: Annotated[
        str | None, typer.Option(help="Records that stand for what it knows, as in training.", show_default=False)
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As in training.")] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="That share the weights, each on a GPU. One a GPU, or one.")
    ] = None,
) -> None:
    """Split the weights of a model before it is trained, and print the path to give as `factors`."""
    with failures():
        from osft.models.loading import model_folder
        from osft.settings.subspace import SubspaceConfig
        from osft.subspace.preflight import preflight
        from osft.training.factors import compute_factors

        subspace = SubspaceConfig(
            unfreeze_rank_ratio=unfreeze_rank_ratio,
            target_patterns=target_patterns or None,
            protect=protect,  # type: ignore[arg-type]  # checked there
            free_subspace=free_subspace,  # type: ignore[arg-type]
            calibration_tokens=calibration_tokens,
            calibration_data=calibration_data,
        )
        folder = model_folder(model)
        factors = compute_factors(
            folder,
            "",  # only adaptive ranks need the training data
            expanded(str(store)),
            subspace,
            preflight=preflight(folder, trust_remote_code=trust_remote_code),
            trust_remote_code=trust_remote_code,
            processes=processes,
        )
    output.print(Text(str(factors.path)), soft_wrap=True)


@app.command()
def evaluate(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Folder or Hugging Face id of the model before.", show_default=False)
    ],
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="The tuned model.", show_default=False)],
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA", help="JSON lines: first of the new task, then of what should stay.", show_default=False
        ),
    ],
    max_samples: Annotated[int, typer.Option(min=0, help="Records of each; 0: all.")] = 0,
    benchmarks: Annotated[
        list[str] | None,
        typer.Option("--benchmark", help="A task, group or tag of the lm-evaluation-harness. Repeatable."),
    ] = None,
    benchmark_folder: Annotated[
        str | None, typer.Option(help="Folder or URI of YAML files with tasks of one's own.", show_default=False)
    ] = None,
    gate: Annotated[
        Path | None, typer.Option(metavar="GATE.YAML", help="Decide by these rules; the rest are the defaults.")
    ] = None,
    score_store: Annotated[
        str | None, typer.Option(help="Folder or URI: what it holds is not measured again.", show_default=False)
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As in training.")] = False,
) -> None:
    """Compare a tuned model with the one that it came from: loss in nats per token, accuracy of tasks, drift (KL)."""
    with failures():
        from osft.evaluation.evaluate import evaluate as compare
        from osft.evaluation.evaluate import load_set
        from osft.evaluation.gate import GateRules, decide

        rules = GateRules.from_parameters(read_file(gate, "gate")) if gate else None
        roles = ["new task"] + ["anchor"] * (len(data) - 1)
        found = compare(
            {"base": base, "candidate": checkpoint},
            [load_set(uri, role, max_samples=max_samples) for uri, role in zip(data, roles, strict=True)],
            benchmarks=benchmarks or (),
            benchmark_folder=benchmark_folder and expanded(benchmark_folder),
            score_store=score_store and expanded(score_store),
            num_examples=0,
            trust_remote_code=trust_remote_code,
        )
        decision = decide(found, rules) if rules else None
    table = Table("data", "role", "loss before", "after", "change", "accuracy before", "after", "KL")
    for name, described in found.sets.items():
        before, after = (found.results[model][name] for model in ("base", "candidate"))
        losses = [f"{before.loss:.4f}", f"{after.loss:.4f}", f"{after.loss / before.loss - 1:+.2%}"]
        accuracies = ["-" if s.accuracy is None else f"{s.accuracy:.1%}" for s in (before, after)]
        moved = found.drift["base"][name]
        table.add_row(name, described.role, *losses, *accuracies, "-" if moved is None else f"{moved.kl:.4f}")
    output.print(table)
    if found.exact:
        loss = found.exact.loss
        output.print(Text(f"The exact weights, before they were rounded to be served: {loss:.4f} on {found.task}"))
    if found.benchmarks:
        table = Table("benchmark", "metric", "before", "after")
        for name, task in found.benchmarks.tasks.items():
            values = [found.benchmarks.results[model][name].value for model in ("base", "candidate")]
            table.add_row(name, task.metric, *(f"{value:.4f}" for value in values))
        output.print(table)
    if decision:
        output.print(Text("gate: promote" if decision.promote else f"gate: refuse: {decision.reason}"))


def read_parameters(config_file: Path | None, settings: list[str]) -> dict[str, Any]:
    """The parameters of a YAML file, and over them those of `settings`, NAME=VALUE.

    Raises FileNotFoundError if there is no such file, ValueError for text that is not YAML and for unknown names.
    """
    import yaml

    known = TrainConfig.model_fields
    names = [*known, *compatibility.NAMES]
    given = read_file(config_file, "config") if config_file else {}
    refuse_unknown(given, names)
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting}: expected NAME=VALUE")
        refuse_unknown([name], names)
        field = known.get(compatibility.RENAMED.get(name, name))
        if field and _takes_text_only(field):
            given[name] = None if text in ("null", "~") else text  # a name may look like a number or a date
        else:
            try:
                given[name] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(f"--set {setting}: {' '.join(str(error).split())}") from None
    return given


def _takes_text_only(field: FieldInfo) -> bool:
    kind = plain_type(field.annotation)
    return (set(get_args(kind)) or {kind}) <= {str, type(None)}


def parameter_help() -> Group:
    """Name, type, default and documentation of every parameter of training."""
    shown: list[Any] = []
    for title, members in grouped_fields().items():
        shown.append(Text(f"\n{title}", style="bold"))
        for name, field in members.items():
            head = Text("  ").append(name, style="cyan").append(f"  {type_text(field)}")
            head.append("  required" if field.is_required() else f"  = {default_text(field)}", style="dim")
            shown += [head, Padding(Text(meaning(field)), (0, 0, 0, 6))]
    return Group(*shown)


def plan_tables(plan: "TrainingPlan") -> Group:
    """What `--dry-run` prints."""
    from osft.training.plan import gib

    facts = Table(show_header=False, box=None)
    for name, text in plan.facts():
        facts.add_row(Text(name, style="bold"), Text(text))
    largest = plan.memory[-1].gpus
    memory = Table(title="GiB on each GPU at the peak, estimated", title_justify="left", show_footer=True)
    memory.add_column("part", footer="sum", no_wrap=True)
    for estimate in plan.memory:
        fits = estimate.bytes <= plan.gpu_memory_gib * 2**30
        memory.add_column(
            f"{estimate.gpus} GPU{'' if estimate.gpus == 1 else 's'}",
            footer=Text(gib(estimate.bytes), style="green" if fits else "red"),
            justify="right",
            no_wrap=True,
        )
    memory.add_column(f"how it is counted ({largest} GPU{'' if largest == 1 else 's'})")
    for row in zip(*(estimate.lines for estimate in plan.memory), strict=True):
        memory.add_row(row[0].name, *(gib(line.bytes) for line in row), Text(row[-1].explanation), end_section=True)
    notes = [Text(note) for note in plan.notes]
    return Group(Text(plan.model_path, style="bold"), facts, memory, Text(plan.verdict(), style="bold"), *notes)


app.command()(export)
app.command()(lineage)
app.command()(clean)
app.command(cls=DoctorCommand)(doctor)
add_commands(app)
