"""What osft uses of other packages without their promise is in one module, and still is what it was."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from osft.process import private_names
from osft.process.private_names import dtype_plan
from tests.conftest import tiny_llama

OSFT = Path(__file__).parents[1] / "osft"
DOCUMENTED = {"_exit"}
"""Names that begin with an underscore and are public all the same: `os._exit`."""


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
        if file.name != "private_names.py" and (used := foreign_private_names(file.read_text())):
            found[str(file.relative_to(OSFT))] = used
    assert found == {}


def test_dtype_plan_names_what_the_architecture_keeps_in_float32():
    model = tiny_llama()
    assert dtype_plan(model, torch.bfloat16) == {}
    model._keep_in_fp32_modules_strict = {"norm"}
    assert dtype_plan(model, torch.bfloat16) == {"norm": torch.float32}
    assert dtype_plan(model, torch.float32) == {}


def test_attention_that_is_set_is_what_computes():
    used: list[int] = []

    def recorded(module, query, key, value, mask, **_):
        used.append(1)
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None

    AttentionInterface.register("recorded", recorded)
    model = tiny_llama()
    assert private_names.attention_of(model.config) == "sdpa"
    private_names.set_attention(model.config, "recorded")
    assert private_names.attention_of(model.config) == "recorded"
    model(torch.arange(5)[None])
    assert len(used) == model.config.num_hidden_layers


def small(kind: str, **settings: int) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=64, hidden_size=32, **settings))


def test_architectures_say_whether_they_have_flash_attention():
    assert private_names.has_flash_attention(tiny_llama())
    assert not private_names.has_flash_attention(small("bloom", n_layer=1, n_head=4))


def test_experts_multiply_as_they_are_set_to():
    model = small("mixtral", intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, num_local_experts=2)
    chosen = private_names.experts_of(model.config)
    assert model.get_experts_implementation() == {"": chosen}
    assert chosen not in (None, "eager")
    private_names.set_experts(model.config, "eager")
    assert model.get_experts_implementation() == {"": "eager"}
    assert private_names.experts_of(None) is None


def test_modules_begin_with_the_values_of_the_architecture():
    module = nn.Linear(64, 64)
    private_names.initialize(tiny_llama(initializer_range=0.9), module)
    assert module.weight.std().item() == pytest.approx(0.9, rel=0.1)
    assert not module.bias.any()


def test_every_tensor_is_mapped_in_its_place():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    private_names.map_tensors(module, lambda tensor: tensor + 1)
    assert {name: tensor.tolist() for name, tensor in module.state_dict().items()} == {
        name: (tensor + 1).tolist() for name, tensor in before.items()
    }
    assert [parameter.requires_grad for parameter in module.parameters()] == [False, True, True, True]


def test_version_tells_that_the_numbers_of_a_view_were_written_over():
    tensor = torch.zeros(4)
    view = tensor[:2]
    before = private_names.version_of(view)
    tensor.add_(1)
    assert private_names.version_of(view) == private_names.version_of(tensor) != before


def test_subclasses_compute_plain_tensors_where_they_are_told_to():
    class Subclass(torch.Tensor):
        pass

    tensor = torch.zeros(2).as_subclass(Subclass)
    assert type(tensor + 1) is Subclass
    with private_names.as_plain_tensors():
        assert type(tensor + 1) is torch.Tensor
    assert type(tensor + 1) is Subclass


def test_task_of_the_harness_comes_with_what_it_includes_and_its_functions(tmp_path):
    (tmp_path / "functions.py").write_text("def double(number):\n    return 2 * number\n")
    (tmp_path / "common").write_text("output_type: multiple_choice\ntask: common\n")
    (tmp_path / "task.yaml").write_text("include: common\ntask: mine\nprocess_docs: !function functions.double\n")
    found = private_names.task_yaml(tmp_path / "task.yaml")
    assert found.pop("process_docs")(21) == 42
    assert found == {"task": "mine", "output_type": "multiple_choice"}
