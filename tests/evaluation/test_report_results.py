import math
import re

import pytest

from osft.evaluation.report.results import benchmark_rows, result_rows
from tests.evaluation.html_page import Page
from tests.evaluation.round_report import an_evaluation, new_evaluation, rendered


@pytest.fixture
def evaluation():
    return new_evaluation(3, benchmarks=True)


@pytest.fixture(scope="module")
def page() -> str:
    return rendered(new_evaluation(3, benchmarks=True))


def result_row(html: str, name: str) -> list[str]:
    (row,) = [row for row in Page(html).rows if row and row[0].startswith(name) and "samples" in row[0]]
    return row


def test_result_table_shows_all_models_and_the_change_against_the_champion(page):
    assert result_row(page, "film-reviews") == [
        "film-reviews new task 100 samples, accuracy by choice",
        *("3.098 22.15", "3.077 21.70", "0.800 2.23", "▼ −74.0 % better −2.277 ± 0.012"),
        *("47.3 % ± 5.0 %", "47.7 % ± 5.0 %", "86.4 % ± 5.0 %", "▲ +38.7 better +38.7 ± 1.2"),
    ]


def test_set_without_accuracy_shows_dashes(page):
    assert result_row(page, "web-text")[5:] == ["–"] * 4


def test_what_is_unusual_of_a_sets_accuracy_stands_below_the_table(evaluation):
    assert "no two different choices" not in rendered(evaluation)
    evaluation["sets"]["web-text"]["notes"] = ["3 of 9 records have no two different choices"]
    assert "web-text: 3 of 9 records have no two different choices." in rendered(evaluation)


def test_first_round_shows_two_models_and_the_change_against_the_base():
    row = result_row(rendered(new_evaluation(1)), "sarcasm-headlines")
    assert row[1:4] == ["3.200 24.53", "1.280 3.60", "▼ −60.0 % better −1.920 ± 0.012"]


def test_new_task_stands_first_and_anchors_last(evaluation):
    roles = [row["role"] for row in result_rows(an_evaluation(evaluation))]
    assert roles == ["new task", "earlier task", "earlier task", "anchor", "anchor"]


def test_change_within_its_error_is_neither_better_nor_worse(evaluation):
    measured = evaluation["changes"]["champion"]["web-text"]["loss"]
    measured |= {"change": 0.01, "stderr": 0.02}
    verdicts = {row["name"]: row["changes"]["loss"].verdict for row in result_rows(an_evaluation(evaluation))}
    assert verdicts["web-text"] == "within error"
    measured |= {"stderr": 0.005}
    verdicts = {row["name"]: row["changes"]["loss"].verdict for row in result_rows(an_evaluation(evaluation))}
    assert verdicts["web-text"] == "worse"


def test_loss_change_plot_is_labelled_with_the_changes(page):
    (plot,) = re.findall(r"<svg[^>]*loss-change-title.*?</svg>", page, re.DOTALL)
    assert re.findall(r">([−+]\d+\.\d)</text>", plot) == ["−74.0", "+1.8", "+1.6", "+0.2", "+0.4"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_shown_as_such(loss: float):
    evaluation = new_evaluation()
    evaluation["results"]["candidate"]["web-text"] |= {"loss": loss, "perplexity": loss}
    evaluation["changes"]["base"]["web-text"]["loss"] |= {"change": loss, "relative": loss, "stderr": math.nan}
    row = result_row(rendered(evaluation), "web-text")
    assert row[2:4] == [f"{loss} {loss}", "–"]


def test_benchmark_table_shows_scores_and_what_is_better(page):
    assert Page(page).row("arc_easy acc, 400 questions, higher is better")[1:] == [
        *("0.6125 ± 0.0244", "0.6100 ± 0.0244", "0.6050 ± 0.0244"),
        "▼ −0.0050 within error −0.0050 ± 0.0345",
    ]


def test_benchmark_where_lower_is_better_got_better(evaluation):
    evaluation["benchmarks"]["tasks"]["piqa"]["higher_is_better"] = False
    for scores in evaluation["benchmarks"]["results"].values():
        scores["piqa"]["stderr"] = None
    changes = {row["name"]: row["change"] for row in benchmark_rows(an_evaluation(evaluation))}
    assert (changes["piqa"].verdict, changes["piqa"].stderr) == ("better", None)


def test_benchmark_that_the_base_model_was_not_run_on_has_no_change():
    evaluation = new_evaluation(benchmarks=True)
    del evaluation["benchmarks"]["results"]["base"]["piqa"]
    row = Page(rendered(evaluation)).row("piqa acc, 400 questions, higher is better")
    assert row[1:] == ["–", "0.6050 ± 0.0244", "–"]
