"""`import osft` is light, and imports between parts go one way."""

import ast
import subprocess
import sys
from pathlib import Path

import osft

HEAVY = ("kfp", "mlflow", "kubernetes", "datasets", "matplotlib", "liger_kernel", "pandas", "peft")
ROOT = Path(__file__).parents[1]


def test_import_needs_torch_and_transformers_only():
    code = f"import sys; from osft import *; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_import_alone_loads_neither_torch_nor_transformers():
    """Nor do the settings of a PyTorchJob, which a notebook checks before it submits a run."""
    code = (
        "import sys, osft, osft.kubernetes.settings; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_components_import_kfp_and_the_standard_library_only():
    for file in (ROOT / "components").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] in {"kfp", "components", *sys.stdlib_module_names}, f"{file}: {name}"


def test_public_names_exist():
    assert all(hasattr(osft, name) for name in osft.__all__)


def test_lower_parts_do_not_import_upper_ones():
    upper = {"subspace": ("training", "evaluation", "tracking", "steps"), "data": ("subspace", "training", "tracking")}
    upper |= {"training": ("tracking", "evaluation", "steps", "kubernetes")}
    upper |= {"evaluation": ("tracking", "training", "steps"), "kubernetes": ("tracking", "evaluation", "steps")}
    for part, forbidden in upper.items():
        for file in (ROOT / "osft" / part).rglob("*.py"):
            imported = {n.module or "" for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)}
            for name in forbidden:
                assert not any(module.startswith(f"osft.{name}") for module in imported), f"{file} imports {name}"
