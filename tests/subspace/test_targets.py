"""Targets are found by structure, or by patterns that must match something."""

import pytest
import torch
from torch import nn

from osft.subspace import select_targets, transformer_blocks
from tests.conftest import tiny_llama


def test_default_is_every_linear_layer_of_the_blocks():
    targets = select_targets(tiny_llama())
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(targets) == 2 * len(kinds)
    assert {target.name.rsplit(".", 1)[-1] for target in targets} == set(kinds)
    assert all(target.name.startswith("model.layers.") for target in targets), "the head is not in a block"


def test_patterns_are_searched_in_the_full_name():
    targets = select_targets(tiny_llama(), ["q_proj", r"layers\.1\..*down"])
    assert [target.name for target in targets] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_pattern_without_a_match_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"'qkv' matches no linear layer.*down_proj, gate_proj"):
        select_targets(tiny_llama(), ["q_proj", "qkv"])


def test_blocks_of_an_unknown_architecture_are_found_by_size():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(9))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapters = nn.ModuleList([nn.Linear(4, 4)])
            self.stack = nn.ModuleList([Block(), Block()])

    name, blocks = transformer_blocks(Model())
    assert name == "stack"
    assert len(blocks) == 2


def test_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no stack of transformer blocks"):
        transformer_blocks(nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(4, 2)).to(torch.float32))
