import json
import math
import re
from typing import Any

import pytest

from osft.data.packing import Batching
from osft.evaluation.report.formats import format_duration, format_number, format_percent
from osft.settings.subspace import SubspaceConfig
from osft.subspace.factor_set import FactorSet
from osft.subspace.preflight import Preflight
from osft.training.factors import compute_factors
from tests.evaluation.html_page import Page
from tests.evaluation.round_report import (
    COST,
    SCRIPT,
    new_dataset,
    new_evaluation,
    new_factors,
    new_metrics,
    new_training,
    rendered,
    rule,
)

SECTIONS = [
    "decision",
    "rounds",
    "results",
    "benchmarks",
    "drift",
    "training",
    "subspace",
    "examples",
    "cost",
    "provenance",
]


@pytest.fixture(scope="module")
def factors(tmp_path_factory: pytest.TempPathFactory) -> FactorSet:
    """Three blocks with two kinds each; every weight has singular values 4 (frozen) and 3 (unfrozen), norm 5."""
    return new_factors(tmp_path_factory.mktemp("store"))


evaluation = pytest.fixture(new_evaluation)
metrics = pytest.fixture(new_metrics)
dataset = pytest.fixture(new_dataset)
training = pytest.fixture(new_training)


@pytest.fixture(scope="module")
def page(factors: FactorSet) -> str:
    """The whole report of a third round, for tests that only read it."""
    inputs = {"training": new_training(factors), "metrics": new_metrics(), "dataset": new_dataset(), "cost": COST}
    return rendered(new_evaluation(3, benchmarks=True), factors=factors, **inputs)


def test_sections_are_there_in_order(page):
    assert re.findall(r'<section id="(\w+)">', page) == SECTIONS


def test_contents_link_to_every_section(page):
    assert [value for name, value in Page(page).attributes if name == "href" and value[1:] in SECTIONS] == [
        f"#{name}" for name in SECTIONS
    ]


def test_rules_show_numbers_bounds_and_outcome(page):
    assert Page(page).row("Gain on the new task min_gain")[1:] == [
        *("✓ pass", "film-reviews loss", "champion", "3.0771 → 0.8004"),
        *("gained 73.99 % ± 0.40 %", "gain at least 15.00 %"),
    ]


def test_rule_that_takes_an_error_off_says_what_it_compared(page):
    (row,) = [row for row in Page(page).rows if row[0].startswith("Forgetting") and "sarcasm" in row[2]]
    assert row[5:] == [
        "lost 1.83 % ± 0.40 % compared: lost 1.43 %, 1 standard error taken off",
        "lose at most 5.00 %",
    ]


def test_rule_on_the_divergence_says_how_far_the_model_moved(page):
    (row,) = [row for row in Page(page).rows if row[0].startswith("Drift") and "web-text" in row[2]]
    assert row[1:] == [
        *("✓ pass", "web-text kl", "base", "0.0000 → 0.0050"),
        *("moved by 0.0050 ± 0.0005", "move at most 0.0500"),
    ]


def test_rule_that_needs_an_error_that_is_unknown_says_so(evaluation):
    unknown = rule("min_gain", "news", 0.2, 0.15, passed=False, stderr=None, standard_errors=2)
    evaluation["decision"]["rules"] = [unknown]
    measured = Page(rendered(evaluation)).row("Gain on the new task min_gain")[5]
    assert measured == "gained 20.00 % compared: with an unknown standard error"


def test_rule_in_the_unit_of_its_metric_shows_no_percent(evaluation):
    numbers = {"before": 0.61, "after": 0.64, "relative": False, "metric": "acc", "stderr": None}
    evaluation["decision"]["rules"] = [
        rule("max_benchmark_regression", "arc_easy", -0.03, 0.02, passed=True, **numbers)
    ]
    assert Page(rendered(evaluation)).row("Benchmark regression max_benchmark_regression")[1:] == [
        *("✓ pass", "arc_easy acc", "base", "0.6100 → 0.6400", "gained 0.0300", "lose at most 0.0200")
    ]


def test_rule_on_a_number_that_is_none_says_so(evaluation):
    evaluation["decision"]["rules"] = [rule("max_drift", "web-text", math.nan, 0.02, passed=False, stderr=None)]
    assert Page(rendered(evaluation)).row("Drift of general ability max_drift")[5] == "not a number"


def test_promoted_page_does_not_say_refused(page):
    assert "Promoted" in Page(page).text["decision"]
    assert "refused" not in page.lower()


def test_refused_page_gives_the_reason_and_the_failed_rule_first(evaluation):
    evaluation["decision"] |= {"promote": False, "reason": "web-text lost 2.04 %"}
    evaluation["decision"]["rules"].append(rule("max_drift", "code-comments", 0.0204, 0.02, passed=False))
    html = rendered(evaluation)
    banner = html.split('class="banner bad"')[1].split("</div>")[0]
    assert "Refused" in banner
    assert "web-text lost 2.04 %" in banner
    assert "1 of 5 rules failed" in banner
    assert "promoted" not in html.lower()
    verdicts = [row[1] for row in Page(html).rows if len(row) == 7 and row[1] in ("✓ pass", "✗ fail")]
    assert verdicts == ["✗ fail", *["✓ pass"] * 4]


def test_many_rules_hide_passed_ones_but_no_failed_one(evaluation):
    rules = [rule("max_forgetting", f"task {i}", 0.1, 0.05, passed=i % 2 == 0) for i in range(24)]
    evaluation["decision"]["rules"] = rules
    visible, hidden = rendered(evaluation).split("<details><summary>12 more rules")
    assert (visible.count("✗ fail"), visible.count("✓ pass")) == (12, 0)
    assert hidden.split("</details>")[0].count("✓ pass") == 12


@pytest.mark.parametrize(
    ("left_out", "missing"),
    [
        ({"metrics"}, {"training"}),
        ({"factors"}, {"subspace"}),
        ({"training", "metrics", "factors", "dataset", "cost"}, {"training", "subspace", "cost"}),
    ],
)
def test_missing_inputs_drop_their_sections(
    evaluation, training, metrics, factors, dataset, left_out: set[str], missing: set[str]
):
    inputs = {"training": training, "metrics": metrics, "factors": factors, "dataset": dataset, "cost": COST}
    html = rendered(evaluation, **{name: None if name in left_out else v for name, v in inputs.items()})
    kept = [name for name in SECTIONS if name not in missing | {"benchmarks"}]
    assert re.findall(r'<section id="(\w+)">', html) == kept
    assert re.findall(r'<a href="#(\w+)">', html) == kept


def test_evaluation_as_it_comes_without_matrix_and_versions_renders(evaluation):
    for name in ("matrix", "benchmarks"):
        evaluation.pop(name)
    for model in evaluation["models"].values():
        model.pop("version")
    assert "no matrix of rounds and tasks here" in Page(rendered(evaluation)).text["rounds"]


def test_provenance_without_training_and_data_holds_the_models_only(evaluation):
    text = Page(rendered(evaluation)).text["provenance"]
    assert "/models/base" in text
    assert "Training settings" not in text
    assert "Training data" not in text


def test_data_section_says_what_was_replayed(evaluation, training):
    sources = [
        {"data_uri": f"/data/{name}.jsonl", "dataset": "k", "num_samples": number, "num_tokens": 9}
        for name, number in REPLAYED.items()
    ]
    training["replay"] = {"num_samples": 32, "num_tokens": 4321, "num_loss_tokens": 432, "sources": sources}
    text = Page(rendered(evaluation, training=training, dataset=new_dataset())).text["provenance"]
    assert "Replayed32 samples (4,321 tokens)" in text
    assert "20 of /data/questions.jsonl, 12 of /data/reviews.jsonl" in text
    training["replay"] = None
    assert "Replayed" not in rendered(evaluation, training=training, dataset=new_dataset())


REPLAYED = {"questions": 20, "reviews": 12}


def test_page_without_examples_has_no_such_section(evaluation):
    evaluation["examples"] = []
    assert "Examples" not in rendered(evaluation)


def test_settings_and_counts_equal_the_inputs(page):
    text = Page(page).text["provenance"]
    assert "lr_scheduler_kwargs.ratio0.5" in text
    assert "lr_scheduler_kwargs.min_lr–" in text
    assert "2 × NVIDIA H100" in text
    assert Page(page).row("Trainable parameters") == ["Trainable parameters", "22,809,600 of 91,238,400 (25.0 %)"]


def test_data_files_are_listed_with_their_hashes(page):
    assert Page(page).row("/data/sarcasm.jsonl") == ["/data/sarcasm.jsonl", "0faa2067" * 8]
    assert "7 dropped" in Page(page).row("Records")[1]


def hostile_inputs(factors: FactorSet, hostile: str) -> dict[str, Any]:
    """All of the report's inputs with `hostile` wherever text can stand that somebody else wrote."""
    evaluation = new_evaluation(3, benchmarks=True)
    text = json.dumps(evaluation)
    for name in ("film-reviews", "sarcasm-headlines", "web-text", "arc_easy", "acc", "choice", "/models/champion"):
        text = text.replace(json.dumps(name), json.dumps(f"{name} {hostile}"))
    evaluation = json.loads(text)
    evaluation |= {"created": hostile}
    evaluation["decision"] |= {"promote": False, "reason": hostile}
    evaluation["decision"]["rules"].append(rule(hostile, hostile, 1, 1, passed=False, metric=hostile, against=hostile))
    for example in evaluation["examples"]:
        example |= {"prompt": hostile, "reference": hostile, "answers": dict.fromkeys(example["answers"], hostile)}
    for described in evaluation["sets"].values():
        described["source"] = hostile
    training = new_training(factors)
    training |= {"device": hostile, "config": {"max_grad_norm": 0, hostile: hostile}}
    dataset = new_dataset() | {"data_uri": hostile, "files": {hostile: hostile}, "settings": {hostile: hostile}}
    return {
        "evaluation": evaluation,
        "training": training,
        "metrics": new_metrics(),
        "factors": factors,
        "dataset": dataset,
        "cost": {hostile: 1.0},
    }


def test_untrusted_text_is_escaped_everywhere(factors):
    hostile = f"{SCRIPT}\"'$x$&\x00"
    html = rendered(**hostile_inputs(factors, hostile))
    assert "<script" not in html
    assert "script" not in Page(html).tags
    by_section = {section: text.count("alert(1)") for section, text in Page(html).text.items()}
    untouched = {name for name in ("decision", *SECTIONS) if not by_section.get(name)}
    assert untouched == {"training", "subspace"}, "where only our own names stand"
    assert not [name for name, value in Page(html).attributes if "alert(1)" in value]


def test_prompt_with_a_script_is_shown_as_text(page):
    assert "One word, please. &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page


def test_what_rounding_did_to_the_update_is_told_with_what_it_cost(factors):
    evaluation = new_evaluation()
    evaluation["exact"] = evaluation["results"]["candidate"][evaluation["task"]] | {"loss": 1.23456}
    training = new_training(factors)
    text = Page(rendered(evaluation, training=training, factors=factors)).text["subspace"]
    for said in ("bfloat16, rounded (nearest)", "27.2", "54.3", "39.9", "the exact ones of 1.2346"):
        assert said in text, said
    training["saved"] |= {"rounding": "none", "dtype": "float32"}
    text = Page(rendered(new_evaluation(), training=training, factors=factors)).text["subspace"]
    assert "stored in float32, which holds the update" in text
    assert "frozen directions" not in text.split("What saving did")[1].split("Use of")[0]


def test_split_by_inputs_is_told_as_such_and_no_update_is_compared_with_an_inputs_size(tmp_path, model_folder):
    subspace = SubspaceConfig(protect="activations", calibration_tokens=256, unfreeze_rank_ratio=0.25)
    found = compute_factors(model_folder, "none", tmp_path, subspace, preflight=Preflight(Batching.PACKED, "tiny"))
    html = rendered(new_evaluation(), training=new_training(found), factors=found)
    text = Page(html).text["subspace"]
    held = re.search(r"frozen directions hold (\d+\.\d) % of the inputs' energy", " ".join(text.split()))
    assert 75 < float(held[1]) < 100, "the three quarters with the most"
    assert "Size of the updates" not in text
    assert "largest singular directions" not in text


def test_examples_stand_side_by_side_the_new_task_first(page):
    text = Page(page).text["examples"]
    assert re.findall(r"[\w-]+ (?:new|earlier) task", text) == [
        *("film-reviews new task", "sarcasm-headlines earlier task", "science-questions earlier task")
    ]
    headings = re.findall(r"<h4>([^<]*)</h4>", page.split('<section id="examples">')[1].split("</section>")[0])
    assert headings == ["Prompt", "Reference", "Base", "Champion, version 2", "Candidate ✓ as the reference"] * 3


def test_answer_equal_to_the_reference_is_marked(page):
    text = Page(page).text["examples"]
    assert "Candidate ✓ as the reference" in text
    assert "Base ✓" not in text


def test_page_refers_to_nothing_outside_it(page):
    assert re.findall(r"https?://|//[\w.]+\.\w+/|@import", page) == []
    assert not {"script", "link", "img", "image", "iframe", "object"} & set(Page(page).tags)
    references = [value for name, value in Page(page).attributes if name in ("href", "xlink:href", "src")]
    assert all(value.startswith("#") for value in references)


def test_ids_are_unique_and_references_resolve(page):
    attributes = Page(page).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in attributes if name in ("href", "xlink:href")}
    targets |= {target for _, value in attributes for target in re.findall(r"url\(#([^)]+)\)", value)}
    targets |= {target for name, value in attributes if name == "aria-labelledby" for target in value.split()}
    assert targets
    assert targets <= set(ids)


def test_every_plot_has_a_title(page):
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) > 10
    for plot in plots:
        assert re.match(r'<svg viewBox="[^"]+" role="img" aria-labelledby="([\w-]+)[^>]*>\s*<title id="\1">\w', plot)


def test_equal_inputs_give_equal_pages(factors):
    assert rendered(new_evaluation(), factors=factors) == rendered(new_evaluation(), factors=factors)


def test_page_with_lone_surrogates_can_be_written(evaluation, tmp_path):
    evaluation["examples"][0]["answers"]["candidate"] = json.loads(r'"\ud83d"')
    (tmp_path / "report.html").write_text(rendered(evaluation), encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "text"), [(-0.421, "−42.1"), (0.01, "+1.0"), (-0.00001, "0.0"), (12.5, "+1,250.0"), (math.nan, "+nan")]
)
def test_signed_percent(value: float, text: str):
    assert format_percent(value, signed=True) == f"{text}\N{NO-BREAK SPACE}%"


@pytest.mark.parametrize(("value", "text"), [(-0.0004, "0.00"), (-1234.5, "−1,234.50"), (None, "–")])
def test_number(value: float | None, text: str):
    assert format_number(value, 2) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(23.44, "23.4 s"), (59.97, "1 min 00 s"), (204, "3 min 24 s"), (7505, "2 h 05 min")]
)
def test_duration(seconds: float, text: str):
    assert format_duration(seconds) == text
