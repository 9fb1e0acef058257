"""Write each component's README.md from its signature and docstring: `python -m components.readme [--check]`."""

import importlib
import sys
from pathlib import Path

from kfp.dsl.base_component import BaseComponent

FOLDER = Path(__file__).parent


def render(component: BaseComponent) -> str:
    """The README of one component."""
    spec = component.component_spec
    name = spec.name.replace("-", "_")
    lines = [f"# {name}", "", spec.description or "", ""]
    lines += [
        "Written by `make compile` from the component's signature and docstring, and from the settings of training.",
        "",
    ]
    for title, described in (("Inputs", spec.inputs), ("Outputs", spec.outputs)):
        if described:
            lines += [f"## {title}", "", "| name | type | meaning |", "|---|---|---|"]
            for key, value in described.items():
                kind = str(value.type).split("@")[0].removeprefix("system.")
                lines.append(f"| `{key}` | {kind} | {_meaning(key, value.description)} |")
            lines.append("")
    return "\n".join(lines)


def _meaning(name: str, described: str | None) -> str:
    """What a component says of an input, else what the setting of training of that name is."""
    from osft.settings.training import TrainConfig

    text = described or TrainConfig.model_fields[name].description or ""
    return " ".join(text.split())


def components() -> dict[Path, BaseComponent]:
    """README file -> component, for every folder with a component."""
    found = {}
    for file in sorted(FOLDER.glob("*/component.py")):
        module = importlib.import_module(f"components.{file.parent.name}.component")
        found[file.parent / "README.md"] = getattr(module, file.parent.name)
    return found


def main() -> None:
    """Write the files, or with --check fail if one is not current."""
    for file, component in components().items():
        current = render(component)
        if sys.argv[1:] != ["--check"]:
            file.write_text(current, encoding="utf-8")
        elif not file.is_file() or file.read_text(encoding="utf-8") != current:
            sys.exit(f"{file} is stale: run `make compile` and commit it")


if __name__ == "__main__":
    main()
