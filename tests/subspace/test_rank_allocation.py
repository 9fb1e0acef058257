"""How many directions each block freezes: the paper's formula by hand, and what follows from it in the store."""

import pytest
import torch
from torch import nn

from osft.settings.subspace import SubspaceConfig
from osft.subspace import allocate_ranks, select_targets
from osft.subspace.factor_set import FactorsMismatchError, check_settings
from osft.subspace.factor_store import precompute
from osft.subspace.rank_allocation import layer_importance, measure_importance, retention_ratios
from tests.conftest import feeding, tiny_llama
from tests.test_families import load, make_samples, train_config

BLOCKS = ("model.layers.0", "model.layers.1")


def adaptive(unfreeze_rank_ratio: float = 0.5, **more: float) -> SubspaceConfig:
    return SubspaceConfig(unfreeze_rank_ratio=unfreeze_rank_ratio, rank_allocation="adaptive", **more)


def importance(*values: float) -> dict[str, float]:
    return dict(zip(BLOCKS, values, strict=True))


def test_importance_of_a_block_that_copies_negates_or_turns_its_input():
    hidden = torch.randn(5, 8)
    turned = torch.cat([-hidden[:, 4:], hidden[:, :4]], dim=1)
    assert layer_importance(hidden, hidden) == pytest.approx(1)
    assert layer_importance(hidden, -2 * hidden) == pytest.approx(-1)
    assert layer_importance(hidden, turned) == pytest.approx(0, abs=1e-6)
    assert layer_importance(hidden, torch.where(torch.arange(5)[:, None] < 4, hidden, turned)) == pytest.approx(0.8)


def test_retention_of_three_blocks_by_hand():
    # Mean 0.6, so normalized to 1.5, 1, 0.5; 0.1 + I * (0.75 - 0.1).
    ratios = retention_ratios([0.9, 0.6, 0.3], target_retention=0.75, min_retention=0.1)
    assert ratios == pytest.approx([1.0, 0.75, 0.425])  # the first would be 1.075
    ratios = retention_ratios([0.9, 0.6, 0.3], target_retention=0.5, min_retention=0.1)
    assert ratios == pytest.approx([0.7, 0.5, 0.3])
    assert sum(ratios) / 3 == pytest.approx(0.5), "the same share on average as the uniform allocation"


def test_retention_stays_between_the_minimum_and_all():
    assert min(retention_ratios([1.0, -0.2], target_retention=0.5, min_retention=0.1)) == 0.1
    assert retention_ratios([0.9, 0.1], target_retention=0.05, min_retention=0.1) == [0.05, 0.05]
    with pytest.raises(ValueError, match="mean importance is -0.1, not positive"):
        retention_ratios([0.1, -0.3], target_retention=0.5)


def test_ranks_follow_the_importance_of_their_block():
    targets = select_targets(tiny_llama(), ["q_proj", "k_proj"])
    ranks = allocate_ranks(targets, adaptive(), importance(0.9, 0.3))
    assert ranks == {  # retained: 0.1 + 1.5 * 0.4 = 0.7 and 0.1 + 0.5 * 0.4 = 0.3, of 32 and of 16 directions
        "model.layers.0.self_attn.q_proj": 10,
        "model.layers.0.self_attn.k_proj": 5,
        "model.layers.1.self_attn.q_proj": 22,
        "model.layers.1.self_attn.k_proj": 11,
    }


def test_block_that_would_be_frozen_whole_is_refused_by_name():
    targets = select_targets(tiny_llama())
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.q_proj: .*freezes 100.00% of block model.layers.0, of imp"
    ):
        allocate_ranks(targets, adaptive(0.1), importance(0.9, 0.3))


def test_adaptive_allocation_without_a_measurement_is_refused():
    with pytest.raises(ValueError, match="needs the blocks' importance. Measure it"):
        allocate_ranks(select_targets(tiny_llama()), adaptive())


def test_measured_importance_is_that_of_each_block_over_all_tokens(tmp_path):
    """One block that returns its input, because what it adds is multiplied by zero, and one that does not."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path)
    samples = make_samples(4)
    measured = measure_importance(tmp_path, samples, feeding=feeding(30))
    assert measured["model.layers.1"] == pytest.approx(1)

    cosines = []
    for sample in samples:
        with torch.no_grad():
            states = model.eval()(input_ids=torch.tensor([sample.input_ids]), output_hidden_states=True).hidden_states
        cosines.append(nn.functional.cosine_similarity(states[0][0], states[1][0], dim=-1))
    assert measured["model.layers.0"] == pytest.approx(torch.cat(cosines).mean().item(), rel=1e-5)
    assert abs(measured["model.layers.0"]) < 0.9


def test_model_takes_the_ranks_of_its_factor_set(tmp_path):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    factors = precompute(folder, tmp_path / "factors", adaptive(), importance=importance(0.9, 0.3))
    assert factors.importance == importance(0.9, 0.3)
    model, _ = load(train_config(folder, factors=factors.path, **adaptive().to_dict()))
    assert [model.get_submodule(f"{block}.self_attn.q_proj").rank for block in BLOCKS] == [10, 22]


def test_sets_of_the_two_allocations_share_weights_but_are_not_each_others(tmp_path):
    folder, store = tmp_path / "model", tmp_path / "factors"
    tiny_llama().save_pretrained(folder)
    half = SubspaceConfig(unfreeze_rank_ratio=0.5)
    uniform = precompute(folder, store, half)
    other = precompute(folder, store, adaptive(), importance=importance(0.5, 0.5))
    assert other.computed == 0
    assert other.path != uniform.path
    targets = select_targets(tiny_llama())
    check_settings(other, adaptive(), targets)
    with pytest.raises(FactorsMismatchError, match="made with rank_allocation=uniform, this run wants adaptive"):
        check_settings(uniform, adaptive(), targets)
    with pytest.raises(FactorsMismatchError, match="made with min_retention_ratio=0.1, this run wants 0.2"):
        check_settings(other, adaptive(min_retention_ratio=0.2), targets)
