"""`import osft` is light, and imports between parts go one way."""

import ast
import re
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
    """Nor do the steps that compute nothing, nor the settings of a run and a job, which a notebook checks."""
    needed = "osft, osft.kubernetes.settings, osft.rounds, osft.tracking.registry, osft.tracking.champion, mlflow"
    names = ("model_path", "data_path", "ckpt_output_dir")
    numbers = ("unfreeze_rank_ratio", "effective_batch_size", "max_tokens_per_gpu", "max_seq_len", "learning_rate")
    given = dict.fromkeys(names, "x") | dict.fromkeys(numbers, 1) | {"max_seq_len": 2}
    code = f"import sys, {needed}; from osft.settings.training import TrainConfig; TrainConfig(**{given}); "
    code += "print([n for n in ('torch', 'transformers') if n in sys.modules])"
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


def test_imports_go_down_the_drawing():
    """Those inside functions and for type checkers too; `__init__`, `api` and `cli`, which lie loose, see all rooms."""
    drawing = (ROOT / "docs" / "architecture.md").read_text()
    layers = re.search(r"^    (api, cli -> .*(?:\n    -> .*)*)$", drawing, re.MULTILINE)[1].replace("\n    ", " ")
    height = {room: -depth for depth, layer in enumerate(layers.split(" -> ")) for room in layer.split(", ")}
    rooms = {path.name for path in (ROOT / "osft").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms | {"api", "cli"} == height.keys()
    for room in rooms:
        assert f"| `{room}/` |" in drawing, "a room without a sentence"
        for file in (ROOT / "osft" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = []
                if isinstance(node, ast.ImportFrom):
                    within = node.module == "osft"
                    names = [f"osft.{alias.name}" for alias in node.names] if within else [node.module or ""]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                for name in names:
                    other = name.split(".")[1] if name.startswith("osft.") else room
                    assert other == room or height.get(other, height[room]) < height[room], f"{file} imports {name}"
