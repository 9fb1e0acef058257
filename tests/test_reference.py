"""The documented contract, the function's signature and the generated reference say the same."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from docs.generate import CONTRACT, TARGET, covering_tests, render
from osft import TrainConfig, osft

ROOT = Path(__file__).parents[1]
DOCUMENTED = json.loads(CONTRACT.read_text(encoding="utf-8"))
PARAMETERS = DOCUMENTED["parameters"]


def test_signature_has_the_documented_names_order_and_kinds():
    signature = inspect.signature(osft)
    assert [(p.name, p.kind.name) for p in signature.parameters.values()] == [
        (p["name"], p["kind"]) for p in PARAMETERS
    ]


@pytest.mark.parametrize("documented", PARAMETERS, ids=lambda documented: documented["name"])
def test_parameter_has_the_documented_default_and_type(documented):
    found = inspect.signature(osft).parameters[documented["name"]]
    if documented["kind"] == "VAR_KEYWORD":
        return
    assert inspect.formatannotation(found.annotation) == documented["annotation"]
    default = found.default
    assert (default is found.empty) == documented.get("required", False)
    if default is not found.empty:
        assert default == documented["default"]


def test_function_returns_the_documented_type():
    assert inspect.signature(osft).return_annotation.__name__ == DOCUMENTED["returns"]


@pytest.mark.parametrize("documented", PARAMETERS[:-1], ids=lambda documented: documented["name"])
def test_reference_compares_the_defaults_of_every_documented_parameter(documented):
    table = TARGET.read_text(encoding="utf-8").split("## The documented parameters")[1]
    (row,) = [line for line in table.splitlines() if line.startswith(f"| `{documented['name']}` |")]
    _, here, there, _ = (cell.strip() for cell in row.strip("|").split(" | "))
    assert here
    assert there == ("required" if documented.get("required") else documented["training_hub_default"])


def test_reference_names_the_documented_errors():
    text = TARGET.read_text(encoding="utf-8")
    assert all(f"| `{error}` |" in text for error in DOCUMENTED["raises"])


@pytest.mark.parametrize("name", [documented["name"] for documented in PARAMETERS[:-1]])
def test_documented_parameter_has_a_covering_test(name):
    assert covering_tests()[name], f"mark a test that fails when {name} is ignored: @pytest.mark.covers({name!r})"


def test_every_parameter_of_the_engine_is_covered():
    """Also those beyond the documented table: a new setting needs a test that names it."""
    assert set(TrainConfig.model_fields) - set(covering_tests()) == set()


def test_reference_is_current():
    subprocess.run([sys.executable, "-m", "docs.generate", "--check"], cwd=ROOT, check=True)


def test_stale_reference_is_refused(tmp_path, monkeypatch):
    from docs import generate

    stale = tmp_path / "reference.md"
    stale.write_text(render() + "\n")
    monkeypatch.setattr(generate, "TARGET", stale)
    monkeypatch.setattr(sys, "argv", ["generate", "--check"])
    with pytest.raises(SystemExit, match="stale"):
        generate.main()
