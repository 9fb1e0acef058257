import re

import pytest

from osft.evaluation import matrix as measures
from osft.evaluation.record import AnchorScores
from osft.evaluation.report.heat_map import DIVERGING, SEQUENTIAL, Scale, heat_map, ink_on
from osft.evaluation.report.rounds import anchor_drifts, measures_by_round
from tests.evaluation.html_page import Page
from tests.evaluation.round_report import TASKS, new_evaluation, rendered


@pytest.fixture(scope="module")
def page() -> str:
    return rendered(new_evaluation(3))


def plot(html: str, name: str) -> str:
    (found,) = re.findall(rf"<svg[^>]*{name}-title.*?</svg>", html, re.DOTALL)
    return found


def test_heat_map_has_the_number_of_every_measured_cell_and_no_other(page):
    block = new_evaluation(3)["matrix"]["metrics"]["loss"]
    expected = [f"{value:.3f}" for row in [block["baseline"], *block["rows"]] for value in row if value is not None]
    assert len(expected) == 3 + 8
    assert re.findall(r">(\d\.\d{3})</text>", plot(page, "matrix-loss")) == expected


def test_heat_map_of_accuracies_is_in_percent(page):
    assert re.findall(r">(\d\d\.\d)</text>", plot(page, "matrix-accuracy"))[:3] == ["45.6", "38.9", "47.3"]


def test_heat_map_names_its_rounds_and_tasks(page):
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", plot(page, "matrix-loss"))
    assert {"base model", "1 sarcasm-headlines (v1)", "3 film-reviews", *TASKS} <= set(labels)


def test_better_than_the_base_model_is_blue_and_worse_is_orange():
    white, worse, better = fills([[0.0, -0.1, 0.5]])
    assert (white, min(worse), min(better)) == ((255, 255, 255), worse[2], better[0])
    assert worse[0] > 1.5 * worse[2]
    assert better[2] > 1.5 * better[0]


def test_scale_of_the_matrix_leads_from_the_worst_to_the_best_change_of_each_metric(page):
    ticks = {
        name: re.findall(r">([+−]?\d+)(?:\s%)?</text>", plot(page, name)) for name in ("matrix-loss", "matrix-accuracy")
    }
    assert ticks == {"matrix-loss": ["+11", "0", "−74"], "matrix-accuracy": ["−10", "0", "+39"]}


def test_name_that_reads_like_an_attribute_stays_as_it_is():
    name = 'id="a" href="#b" url(#c)'
    scale = Scale(label="", low=-1.0, high=1.0, center=0.0, write=str)
    plot = heat_map("test", "test", [[0.5]], [["0.5"]], rows=[name], columns=["one"], scale=scale)
    assert f">{name}</text>" in plot.svg


def test_cell_that_was_not_measured_has_no_color_of_its_own():
    assert len(fills([[0.0, None, 0.5]])) == 2


def fills(cells: list[list[float | None]]) -> list[tuple[int, ...]]:
    """Red, green and blue of the cells, in their order."""
    scale = Scale(label="", low=-0.1, high=0.5, center=0.0, write=str)
    texts = [["" if value is None else f"{value}" for value in row] for row in cells]
    columns = [str(i) for i in range(len(cells[0]))]
    svg = heat_map("test", "test", cells, texts, rows=["only"], columns=columns, scale=scale).svg
    colors = re.findall(r'style="fill: #(\w{6}); stroke: #dfe4e9', svg)
    return [tuple(bytes.fromhex(color)) for color in colors]


def test_numbers_are_readable_on_every_color_of_a_heat_map():
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    def luminance(color: tuple[float, float, float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colors in (SEQUENTIAL, DIVERGING):
        for color in LinearSegmentedColormap.from_list("", colors)(range(256))[:, :3]:
            low, high = sorted((luminance(tuple(color)), luminance(to_rgb(ink_on(color)))))
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_table_beside_the_heat_map_shows_the_same_numbers(page):
    rows = [row for row in Page(page).rows if row and row[0] == "2 science-questions (v2)"]
    assert rows[0] == ["2 science-questions (v2)", "1.335", "1.273", "3.077"]
    rows = [row for row in Page(page).rows if row and row[0] == "1 sarcasm-headlines (v1)"]
    assert rows[0][-1] == "", "not measured"


def test_numbers_that_sum_up_the_matrix_are_those_of_the_evaluation(page):
    loss, accuracy = (new_evaluation(3)["matrix"]["metrics"][metric] for metric in ("loss", "accuracy"))
    text = Page(page).text["rounds"].replace("−", "-")
    assert f"{-loss['average_accuracy']:.3f} average loss" in text
    assert f"{loss['backward_transfer']:+.3f} backward transfer" in text
    assert f"{loss['forward_transfer']:+.3f} forward transfer" in text
    assert f"{100 * accuracy['average_forgetting']:+.1f} average forgetting" in text


def test_measures_after_the_last_round_equal_those_of_the_whole_matrix():
    evaluation = new_evaluation(6)
    for metric, block in evaluation["matrix"]["metrics"].items():
        history = measures_by_round(block, metric)
        sign = -1 if metric == "loss" else 1
        assert sign * history["average"][-1] == pytest.approx(block["average_accuracy"])
        assert history["backward"][-1] == pytest.approx(block["backward_transfer"])
        assert history["forward"][-1] == pytest.approx(block["forward_transfer"])
        assert history["forgetting"][-1] == pytest.approx(block["average_forgetting"])


def test_measures_after_a_round_know_nothing_of_later_ones():
    long, short = (new_evaluation(rounds)["matrix"]["metrics"]["loss"] for rounds in (6, 4))
    after = measures_by_round(long, "loss")
    assert after["backward"][3] == pytest.approx(short["backward_transfer"])
    assert after["backward"][0] is None
    assert after["task_forgetting"][3] == pytest.approx(measures.forgetting(measures.negated(short["rows"])))


def test_missing_score_leaves_a_gap_in_the_measures_that_need_it():
    block = new_evaluation(4)["matrix"]["metrics"]["loss"]
    block["rows"][2][0] = None
    history = measures_by_round(block, "loss")
    assert [value is None for value in history["average"]] == [False, False, True, False]
    assert [value is None for value in history["forgetting"]] == [True, False, True, True]


def test_matrix_with_gaps_renders_and_says_what_is_unknown():
    evaluation = new_evaluation(3)
    block = evaluation["matrix"]["metrics"]["loss"]
    del evaluation["matrix"]["metrics"]["accuracy"]
    block["rows"][2][0] = None
    block |= {"baseline": [None] * 3, "forgetting": {}}
    block |= dict.fromkeys(("average_accuracy", "backward_transfer", "forward_transfer", "average_forgetting"))
    assert "– average loss" in Page(rendered(evaluation)).text["rounds"]


def test_row_that_ends_early_is_a_row_with_gaps(page):
    evaluation = new_evaluation(3)
    for block in evaluation["matrix"]["metrics"].values():
        block["rows"] = [[value for value in row if value is not None] for row in block["rows"]]
    assert [len(row) for row in block["rows"]] == [2, 3, 3]
    assert rendered(evaluation).split('id="results"')[0] == page.split('id="results"')[0]


def test_drift_is_relative_for_losses_and_a_difference_for_accuracies():
    anchors = {
        "web": {"loss": AnchorScores(baseline=2.0, values=(2.02, None, 2.1))},
        "quiz": {
            "loss": AnchorScores(baseline=None, values=(1.0, 1.0, 1.0)),
            "accuracy": AnchorScores(baseline=0.5, values=(0.4,)),
        },
    }
    assert anchor_drifts(anchors, "loss") == {"web": [pytest.approx(0.01), None, pytest.approx(0.05)]}
    assert anchor_drifts(anchors, "accuracy") == {"quiz": [pytest.approx(-0.1)]}


def test_forgetting_of_each_task_is_drawn_with_its_number(page):
    expected = new_evaluation(3)["matrix"]["metrics"]["loss"]["forgetting"]
    labels = re.findall(r">([−+]0\.\d{3})</text>", plot(page, "forgotten-loss"))
    assert labels == [f"{value:+.3f}" for value in expected.values()]


def test_first_round_says_in_a_sentence_that_there_is_no_matrix_yet():
    evaluation = new_evaluation(1)
    assert "no matrix of rounds and tasks here" in Page(rendered(evaluation)).text["rounds"]
    block = new_evaluation(2)["matrix"]["metrics"]["loss"] | {"baseline": [3.2], "rows": [[1.28]], "forgetting": {}}
    evaluation["matrix"] = {"rounds": [{"task": TASKS[0], "version": None}], "metrics": {"loss": block}, "anchors": {}}
    html = rendered(evaluation)
    assert "This is the first round" in Page(html).text["rounds"]
    assert "matrix-loss" not in html
