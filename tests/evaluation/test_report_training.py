import math
import re

import pytest

from osft.evaluation.report.subspace import relative_update_sizes, used_shares
from osft.evaluation.report.training import cost_of
from osft.subspace.factor_set import FactorSet
from tests.evaluation.html_page import Page
from tests.evaluation.round_report import (
    COST,
    KINDS,
    a_summary,
    a_weight,
    new_evaluation,
    new_factors,
    new_metrics,
    new_training,
    rendered,
)


@pytest.fixture(scope="module")
def factors(tmp_path_factory: pytest.TempPathFactory) -> FactorSet:
    return new_factors(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def page(factors: FactorSet) -> str:
    inputs = {"training": new_training(factors), "metrics": new_metrics(), "cost": COST}
    return rendered(new_evaluation(), factors=factors, **inputs)


def test_cost_equals_the_inputs(page):
    text = Page(page).text["cost"]
    for expected in (
        "6 min 53 s for all steps of the round",
        "1 min 35 s training time",
        "3,796 tokens in 2 steps",
        "40 tokens per second",
        "0.0552 GPU-hours: 2 processes for 1 min 39 s",  # 2 (4 + 94.9 + 0.5) / 3600
        "3.00 GiB",
    ):
        assert expected in text
    assert Page(page).row("precompute_svd")[1] == "1 min 01 s"
    assert Page(page).row("training process: load")[1] == "4.0 s"


def test_run_on_cpus_claims_no_gpu_hours(factors):
    tiles = cost_of(a_summary(new_training(factors) | {"device": "cpu"}), None, None)["tiles"]
    assert ("0.0552", "CPU process-hours: 2 processes for 1 min 39 s") in tiles
    assert not any("GPU" in part for tile in tiles for part in tile)


def test_run_that_was_taken_up_again_counts_all_its_steps(factors):
    metrics = [line | {"step_seconds": 100.0} for line in new_metrics()]
    tiles = {label: value for value, label in cost_of(a_summary(new_training(factors)), metrics, None)["tiles"]}
    assert tiles["training time"] == "3 min 20 s"
    assert tiles["tokens per second"] == "19"


def test_cost_without_training_shows_the_steps_alone():
    found = cost_of(None, None, {"prepare_data": 30.0, "evaluate_model": 60.0})
    assert found["parts"] == [("prepare_data", 30.0, 0.5), ("evaluate_model", 60.0, 1.0)]
    assert found["tiles"] == [("1 min 30 s", "for all steps of the round")]


def test_subspace_section_shows_frozen_energy_and_each_relative_update(page):
    text = Page(page).text["subspace"]
    assert "hold 64.0 % of the weights' squared norm" in text  # 4² of 4² + 3²
    assert "1 frozen | 1 unfrozen" in text
    (plot,) = re.findall(r"<svg[^>]*updates-title.*?</svg>", page, re.DOTALL)
    numbers = re.findall(r">(\d\.\d\d)</text>", plot)
    assert sorted(numbers) == [f"{percent}.00" for percent in range(1, 7)]  # 0.05 i / 5
    assert "Largest: 6.00 % in up_proj of block 2" in text


def test_subspace_section_shows_what_part_of_the_free_directions_is_used(page):
    text = Page(page).text["subspace"]
    assert "spread over 45.0 % of their free directions on average" in text  # 0.2 … 0.7
    assert "most in up_proj of block 2 (70.0 %), least in q_proj of block 0 (20.0 %)" in text
    (plot,) = re.findall(r"<svg[^>]*used-title.*?</svg>", page, re.DOTALL)
    assert sorted(re.findall(r">(\d\d)</text>", plot)) == ["20", "30", "40", "50", "60", "70"]


def test_training_from_before_the_effective_rank_still_renders(factors):
    training = new_training(factors)
    for layout in training["rank_layout"].values():
        del layout["effective_rank"]
    text = Page(rendered(new_evaluation(), training=training, factors=factors)).text["subspace"]
    assert "Size of the updates" in text
    assert "Use of the free subspace" not in text


def test_experts_of_a_block_count_as_one_weight():
    updates = {"layers.0.experts.0.up": 3.0, "layers.0.experts.1.up": 4.0, "lm_head": 1.0}
    assert relative_update_sizes(updates, {"layers.0.experts.0.up": 6.0, "layers.0.experts.1.up": 8.0}) == {
        (0, "up"): 0.5
    }
    ranks = {f"layers.0.experts.{i}.up": a_weight(effective_rank=rank) for i, rank in enumerate((1.0, 3.0))}
    assert used_shares(ranks) == {(0, "up"): 0.5}


def test_update_that_is_not_finite_has_no_share():
    layout = {"layers.0.up": a_weight(effective_rank=math.nan)}
    assert used_shares(layout) == {}
    assert relative_update_sizes({"layers.0.up": math.nan}, {"layers.0.up": 1.0}) == {}


def test_loss_plot_has_the_tokens_as_second_axis(page):
    (plot,) = re.findall(r"<svg[^>]*training-loss-title.*?</svg>", page, re.DOTALL)
    assert {"tokens", "1,898", "3,796", "step"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", plot))


def test_gradient_plot_shows_the_clipping(page):
    (plot,) = re.findall(r"<svg[^>]*gradient-norm-title.*?</svg>", page, re.DOTALL)
    assert "clipped to 1" in plot


def test_loss_plot_shows_the_loss_on_held_out_data_where_it_was_measured():
    metrics = new_metrics()
    assert "held-out data" not in rendered(new_evaluation(), metrics=metrics)
    metrics[1]["validation_loss"] = 3.0
    assert "held-out data" in rendered(new_evaluation(), metrics=metrics)


def fitted() -> dict:
    curve = [(0.25, 0.1234, 0.0025), (0.5, 0.2345, 0.01), (1.0, 0.2, 0.0777)]
    tried = [{"scale": s, "loss": 3 - g, "gain": g, "standard_error": 0.0321, "drift": d} for s, g, d in curve]
    counts = {"num_samples": 40, "num_text_tokens": 3048, "reason": "the largest gain"}
    return {"scale": 0.5, "start_loss": 3.0, "tried": tried, "max_drift": 0.05} | counts


def test_fitted_step_shows_what_was_tried_and_taken(factors):
    training = new_training(factors) | {"fitted_step": fitted()}
    html = rendered(new_evaluation(), training=training, metrics=new_metrics())
    text = Page(html).text["training"]
    assert "0.50 of the update that training found is in the model: the largest gain" in text
    assert "40 held-out samples" in text
    assert "3,048 tokens that the model wrote itself" in text
    assert "0.50 2.7655 +0.2345 ± 0.0321 0.0100 ✓ taken" in text
    assert "1.00 2.8000 +0.2000 ± 0.0321 0.0777 above 0.0500" in text
    (plot,) = re.findall(r"<svg[^>]*fitted-step-title.*?</svg>", html, re.DOTALL)
    assert {"0.25", "0.5", "1"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", plot))


def test_run_that_fitted_no_step_shows_none(page):
    assert "The step that fits" not in page


@pytest.mark.parametrize("name", ["predicted_drift", "distillation_loss"])
def test_drift_is_drawn_where_it_was_measured(page, name):
    assert "training-drift" not in page
    metrics = [line | {name: 0.001 * line["step"]} for line in new_metrics()]
    assert "training-drift" in rendered(new_evaluation(), metrics=metrics)


def test_long_run_is_thinned_and_keeps_both_ends():
    html = rendered(new_evaluation(), metrics=new_metrics(5000))
    assert len(html) < 200_000
    assert "9,490,000" in html


def test_page_of_thirty_rounds_and_a_deep_model_stays_small(tmp_path):
    factors = new_factors(tmp_path, blocks=32, kinds=KINDS)
    inputs = {"training": new_training(factors), "metrics": new_metrics(300), "cost": COST}
    assert len(rendered(new_evaluation(30, benchmarks=True), factors=factors, **inputs).encode()) < 2_000_000
