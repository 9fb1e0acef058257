"""Write the documents that code says: `python -m docs.generate [--check]`.

docs/reference.md from signatures, docstrings and the tests' markers, docs/scaling.md from the dry run's formulas.
"""

import ast
import inspect
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import typer.main
from pydantic.fields import FieldInfo

from docs import scaling
from osft.api import osft
from osft.cli import app
from osft.kubernetes.settings import JobSettings
from osft.models.training_summary import FittedStep, SavedUpdate, TrainingSummary, TriedScale, WeightSummary
from osft.settings import compatibility
from osft.settings.base import default_text, meaning, type_text
from osft.settings.training import TrainConfig, grouped_fields
from osft.training.result import TrainResult

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "reference.md"
SCALING = ROOT / "docs" / "scaling.md"
CONTRACT = ROOT / "tests" / "contract.json"

_WHERE_PARAMETERS_GO = (
    "The same for `osft()`, for `osft train` and in a YAML file. `osft()` takes those that its signature does not have "
    "as further keywords; None stands for the default."
)


_WHERE_JOB_SETTINGS_GO = (
    'With the pipeline\'s parameter `launcher="pytorchjob"` or `launcher="trainjob"`, these go into its parameter '
    '`job` (formerly `pytorchjob`), such as `{"num_workers": 2, "gpus": 8, "kueue_queue": "research"}`.'
)


_COMPATIBILITY = (
    "Names that training_hub 0.11.2 hands on to mini-trainer 0.9.0, and those of its other algorithms that scripts "
    "bring along, are understood, too. A line is printed for what has no effect; a setting with two different values "
    "is refused."
)


def render() -> str:
    """The reference."""
    return (
        "\n\n".join(
            [
                "# Reference",
                "Written by `make compile` from signatures, docstrings and the tests' markers.",
                "## The function",
                _function(),
                "## Parameters",
                _WHERE_PARAMETERS_GO,
                *_parameters(),
                "### What training_hub and its backends call them",
                _COMPATIBILITY,
                _compatibility(),
                "## The job on a cluster",
                _WHERE_JOB_SETTINGS_GO,
                _settings(JobSettings.model_fields),
                "## The result",
                _result(),
                *_records(),
                "## The command",
                *_commands(),
                "## The documented parameters, here and in training_hub",
                _comparison(),
            ]
        ).rstrip("\n")
        + "\n"
    )


def _function() -> str:
    signature = inspect.signature(osft)
    lines = [f"    {parameter}," for parameter in signature.parameters.values()]
    code = "\n".join(["```python", "from osft import osft", "", "osft(", *lines, ")", "```"])
    sections = _sections(inspect.getdoc(osft) or "")
    returns = " ".join(sections["Returns"].split())
    errors = re.findall(r"^(\w+): (.*(?:\n .*)*)", sections["Raises"], re.MULTILINE)
    table = _table(("error", "when"), [(f"`{name}`", " ".join(text.split())) for name, text in errors])
    return f"{code}\n\n{sections['']}\n\nReturns: {returns}\n\n{table}"


def _sections(docstring: str) -> dict[str, str]:
    """Title -> text of a docstring's sections; what is before the first has no title."""
    titles = "Args|Further parameters, by name|Returns|Raises"
    pieces = re.split(rf"^ *({titles}):\n", docstring, flags=re.MULTILINE)
    texts = [inspect.cleandoc("\n" + piece) for piece in pieces[::2]]
    return dict(zip(["", *pieces[1::2]], texts, strict=True))


def _parameters() -> list[str]:
    pieces = []
    for title, members in grouped_fields().items():
        pieces += [f"### {title}", _settings(members)]
    return pieces


def _settings(members: Mapping[str, FieldInfo]) -> str:
    rows = [
        (
            f"`{name}`",
            f"`{type_text(field)}`",
            "required" if field.is_required() else f"`{default_text(field)}`",
            meaning(field),
        )
        for name, field in members.items()
    ]
    return _table(("parameter", "type", "default", "meaning"), rows)


def _compatibility() -> str:
    rows = [(f"`{name}`", f"`{field}`") for name, field in compatibility.RENAMED.items()]
    rows += [(f"`{name}`", special.meaning) for name, special in compatibility.SPECIAL.items()]
    rows += [(f"`{name}`", f"no effect: {text}") for name, text in compatibility.WITHOUT_EFFECT.items()]
    return _table(("name there", "here"), rows)


def _result() -> str:
    rows = []
    for name in [*TrainResult.__dataclass_fields__, *vars(TrainResult)]:
        attribute = vars(TrainResult).get(name)
        if isinstance(attribute, property):
            kind = inspect.signature(attribute.fget).return_annotation  # type: ignore[arg-type]
            rows.append((f"`{name}`", f"`{_type_text(kind)}`", " ".join((attribute.__doc__ or "").split())))
    fields = [(f"`{name}`", f"`{kind}`", doc) for name, kind, doc in _documented_fields(TrainResult)]
    return f"`TrainResult`: {inspect.getdoc(TrainResult)}\n\n" + _table(("field", "type", "meaning"), fields + rows)


def _documented_fields(owner: type) -> Iterator[tuple[str, str, str]]:
    """Name, type and documentation of a dataclass's fields: the string literals that follow them in the source."""
    (definition,) = ast.parse(inspect.getsource(owner)).body
    assert isinstance(definition, ast.ClassDef)
    for field, literal in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(literal, ast.Expr):
            yield (
                ast.unparse(field.target),
                ast.unparse(field.annotation),
                " ".join(ast.literal_eval(literal.value).split()),
            )


def _records() -> list[str]:
    """What the result's records hold."""
    tables = []
    for kind in (TrainingSummary, WeightSummary, SavedUpdate, FittedStep, TriedScale):
        fields = kind.model_fields.items()
        rows = [(f"`{n}`", f"`{_type_text(f.annotation)}`", " ".join((f.description or "").split())) for n, f in fields]
        tables.append(f"`{kind.__name__}`: {inspect.getdoc(kind)}\n\n" + _table(("field", "type", "meaning"), rows))
    return tables


def _commands(group: Any = None, prefix: str = "") -> list[str]:
    group = group or typer.main.get_command(app)
    pieces = []
    for last, command in group.commands.items():
        name = prefix + last
        if hasattr(command, "commands"):
            pieces += _commands(command, f"{name} ")
            continue
        context = command.make_context(name, [], resilient_parsing=True)
        usage = " ".join([f"osft {name}", *command.collect_usage_pieces(context)])
        rows = []
        for parameter in command.params:
            names = (
                ", ".join(parameter.opts)
                if parameter.param_type_name == "option"
                else (parameter.metavar or parameter.name.upper())
            )
            default = "" if parameter.default in (None, False) else f" Default: {parameter.default}."
            rows.append((f"`{names}`", f"{parameter.help or ''}{default}"))
        pieces += [
            f"### osft {name}",
            f"```\n{usage}\n```",
            inspect.cleandoc(command.help),
            _table(("argument", "meaning"), rows),
        ]
    return pieces


def _comparison() -> str:
    contract = json.loads(CONTRACT.read_text(encoding="utf-8"))
    known, tests = TrainConfig.model_fields, covering_tests()
    rows = []
    for documented in contract["parameters"]:
        name = documented["name"]
        if documented["kind"] == "VAR_KEYWORD":
            continue
        required = documented.get("required", False)
        here = default_text(known[name]) if name in known else repr(documented["default"])
        there = "required" if required else documented["training_hub_default"]
        covering = "<br>".join(f"`{node}`" for node in tests[name]) or "none"
        rows.append((f"`{name}`", here, there, covering))
    columns = (
        "documented parameter",
        "default here",
        f"in training_hub {contract['training_hub']}",
        "test that covers it",
    )
    return (
        f"The defaults of training_hub are those of mini-trainer {contract['mini_trainer']} where it sets none.\n\n"
        + (_table(columns, rows))
    )


def covering_tests() -> defaultdict[str, list[str]]:
    """Parameter -> node ids of the tests that are marked `pytest.mark.covers(parameter, …)`."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.covers":
                    for argument in decorator.args:
                        found[ast.literal_eval(argument)].append(f"{file.relative_to(ROOT)}::{node.name}")
    return found


def _type_text(annotation: Any) -> str:
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return re.sub(r"\b(?:[a-z_]+\.)+(?=\w)", "", str(annotation))  # without modules


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    """Write the files, or with --check fail if one is not current."""
    for target, current in ((TARGET, render()), (SCALING, scaling.render())):
        if sys.argv[1:] != ["--check"]:
            target.write_text(current, encoding="utf-8")
        elif not target.is_file() or target.read_text(encoding="utf-8") != current:
            sys.exit(f"{target} is stale: run `make compile` and commit it")


if __name__ == "__main__":
    main()
