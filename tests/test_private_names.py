"""What osft uses of other packages without their promise is in one module, and still is what it was."""

import ast
from pathlib import Path

import torch

from osft.process.private_names import dtype_plan
from tests.conftest import tiny_llama

OSFT = Path(__file__).parents[1] / "osft"
DOCUMENTED = {"_exit"}
"""Names that begin with an underscore and are public all the same: `os._exit`."""

UNSEARCHED = {"data", "models", "subspace", "training", "evaluation"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1 and name not in DOCUMENTED


def foreign_private_names(source: str) -> list[str]:
    """Private names that a module imports from other packages, or takes of objects without defining them itself."""
    tree = ast.parse(source)
    own: set[str] = set()
    used: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)  # a field
        elif isinstance(node, ast.Import | ast.ImportFrom):
            paths = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("osft"):
                paths.append(node.module)
            used += [part for path in paths for part in path.split(".") if is_private(part)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            own.add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            used.append(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            used += [name] if is_private(name) and name not in own else []
    return used


def test_search_finds_each_way_of_using_a_private_name():
    assert foreign_private_names("from a.b import _c") == ["_c"]
    assert foreign_private_names("def f():\n    import a._b.c") == ["_b"]
    assert foreign_private_names("from a._b import c") == ["_b"]
    assert foreign_private_names("a._b = a.c._d()") == ["_b", "_d"]
    assert foreign_private_names("getattr(a, '_b', None)") == ["_b"]
    assert (
        foreign_private_names("class A:\n    _b: int\n    def _c(self): return self._d, other._b, A._c, a.__dict__")
        == []
    )
    assert foreign_private_names("import os\nos._exit(1)") == []


def test_no_other_module_uses_a_private_name_of_another_package():
    found = {}
    for file in sorted(OSFT.rglob("*.py")):
        room = file.relative_to(OSFT).parts[0]
        if (
            room not in UNSEARCHED
            and file.name != "private_names.py"
            and (used := foreign_private_names(file.read_text()))
        ):
            found[str(file.relative_to(OSFT))] = used
    assert found == {}


def test_dtype_plan_names_what_the_architecture_keeps_in_float32():
    model = tiny_llama()
    assert dtype_plan(model, torch.bfloat16) == {}
    model._keep_in_fp32_modules_strict = {"norm"}
    assert dtype_plan(model, torch.bfloat16) == {"norm": torch.float32}
    assert dtype_plan(model, torch.float32) == {}
