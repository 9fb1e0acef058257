import math
import re

import pytest

from osft.evaluation.report.drift import drift_shares
from tests.evaluation.html_page import Page
from tests.evaluation.round_report import SELF_WRITTEN, new_evaluation, new_factors, new_training, rendered


@pytest.fixture
def evaluation():
    return new_evaluation(3)


def drift_rows(html: str) -> dict[str, list[str]]:
    section = html.split('<section id="drift">')[1].split("</section>")[0]
    return {row[0]: row[1:] for row in Page(section).rows if row}


def test_table_shows_the_drift_from_each_model_with_its_error_on_every_set(evaluation):
    evaluation["drift"]["champion"]["web-text"]["stderr"] = None
    rows = drift_rows(rendered(evaluation))
    assert rows["Evaluation set"] == ["from base", "from champion, version 2", "Tokens"]
    assert rows["web-text anchor"] == ["0.00500 ± 0.00050", "0.00500", "350"]
    assert rows[f"{SELF_WRITTEN} self-written"] == ["0.03000 ± 0.00300", "0.03000 ± 0.00300", "350"]
    assert len(rows) == 1 + 6


def test_first_round_shows_the_drift_from_the_base_model():
    assert drift_rows(rendered(new_evaluation(1)))["Evaluation set"] == ["from base", "Tokens"]


def test_drift_that_could_not_be_measured_is_a_dash(evaluation):
    evaluation["drift"]["base"]["web-text"] = None
    assert drift_rows(rendered(evaluation))["web-text anchor"] == ["–", "0.00500 ± 0.00050", "–"]


def test_comparison_in_bfloat16_tells_its_own_error(evaluation):
    assert "rounding alone" not in rendered(evaluation)
    evaluation["drift"]["base"]["web-text"]["dtype"] = "bfloat16"
    assert "compared in bfloat16, whose rounding alone counts" in Page(rendered(evaluation)).text["drift"]


def test_evaluation_of_an_earlier_release_has_no_such_section(evaluation):
    del evaluation["drift"], evaluation["matrix"]["drift"]
    assert 'id="drift"' not in rendered(evaluation)


def test_drift_after_each_round_is_drawn_for_every_set(evaluation):
    (plot,) = re.findall(r"<svg[^>]*drift-kl-title.*?</svg>", rendered(evaluation), re.DOTALL)
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", plot)
    assert {"web-text", "code-comments", SELF_WRITTEN} <= set(labels)
    assert "drift-kl-title" not in rendered(new_evaluation(1))


def test_predicted_drift_stands_beside_the_measured_one(evaluation, tmp_path):
    training = new_training(new_factors(tmp_path))
    evaluation["drift"]["champion"][SELF_WRITTEN] = {
        "kl": 0.0024,
        "stderr": 0.0002,
        "num_tokens": 3000,
        "dtype": "float32",
    }
    html = rendered(evaluation, training=training)
    text = Page(html).text["drift"]
    assert "predicted a drift of 0.00210 nats per token from the champion" in text
    assert "Measured on the text that the base model wrote: 0.00240 ± 0.00020." in text
    (plot,) = re.findall(r"<svg[^>]*predicted-drift-title.*?</svg>", html, re.DOTALL)
    shares = [float(found) for found in re.findall(r">(\d+\.\d)</text>", plot)]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert max(shares) == pytest.approx(28.6), "6 of 1 + … + 6"
    for layout in training["rank_layout"].values():
        del layout["predicted_drift"]
    assert "What training predicted" not in rendered(evaluation, training=training)


def test_shares_are_of_the_sampled_drift_where_there_is_one(evaluation, tmp_path):
    training = new_training(new_factors(tmp_path))
    assert "as a percentage of the sum, by the formula." in Page(rendered(evaluation, training=training)).text["drift"]
    first, *others = training["rank_layout"].values()
    first["sampled_drift"] = 1e-3
    for layout in others:
        layout["sampled_drift"] = 0.0
    training["sampled_drift"] = {"draws": 200, "relative_error": 0.1}
    html = rendered(evaluation, training=training)
    text = Page(html).text["drift"]
    assert "predicted a drift of 0.00210" in text
    assert "sampled at the end of training on text that the model wrote, each ± 10 % of itself" in text
    (plot,) = re.findall(r"<svg[^>]*predicted-drift-title.*?</svg>", html, re.DOTALL)
    assert max(float(found) for found in re.findall(r">(\d+\.\d)</text>", plot)) == 100.0
    for layout in training["rank_layout"].values():
        del layout["predicted_drift"]
    text = Page(rendered(evaluation, training=training)).text["drift"]
    assert "predicted a drift" not in text, "of a split by the weights"
    assert "each ± 10 % of itself" in text


def test_shares_of_experts_add_up_and_what_is_in_no_block_counts_in_the_sum():
    predicted = {"layers.0.experts.0.up": 1.0, "layers.0.experts.1.up": 2.0, "layers.1.up": 4.0, "head": 1.0}
    assert drift_shares(predicted) == {(0, "up"): 0.375, (1, "up"): 0.5}


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_drift_that_is_nothing_or_no_number_has_no_shares(value):
    assert drift_shares({"layers.0.up": value, "layers.1.up": 0.0}) == {}
