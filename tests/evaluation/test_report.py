import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from osft.evaluation.report import format_duration, format_percent, relative_update_sizes, render_report
from osft.subspace.factor_store import FORMAT, FactorSet, load_factor_set

SECTIONS = ["decision", "results", "training", "subspace", "examples", "provenance"]
SCRIPT = "<script>alert(1)</script>"


def score(loss: float, accuracy: float | None = None) -> dict[str, Any]:
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "num_loss_tokens": 350,
        "num_samples": 100,
        "accuracy": accuracy,
        "accuracy_stderr": None if accuracy is None else 0.05,
        "accuracy_kind": None if accuracy is None else "choice",
    }


def new_evaluation() -> dict[str, Any]:
    return {
        "task": "sarcasm-headlines",
        "created": "2026-11-22T18:00:00+00:00",
        "base_model": "/models/base",
        "candidate_model": "/models/candidate",
        "sets": {
            "film-plots": {"role": "anchor", "source": "/data/film-plots.jsonl", "num_samples": 100},
            "sarcasm-headlines": {"role": "new task", "source": "/data/validation.jsonl", "num_samples": 100},
        },
        "results": {
            "base": {"film-plots": score(3.0), "sarcasm-headlines": score(4.0, 0.51)},
            "candidate": {"film-plots": score(3.15), "sarcasm-headlines": score(2.5, 0.84)},
        },
        "decision": {
            "promote": True,
            "rules": [
                rule("loss of the new task", -0.375, -0.15, passed=True),
                rule("loss of the anchor film-plots", 0.05, 0.0625, passed=True),
            ],
        },
        "examples": [
            {
                "set": "sarcasm-headlines",
                "prompt": f"Sarcastic? {SCRIPT}",
                "reference": "sarcastic",
                "base": "serious",
                "candidate": " sarcastic\n",
            }
        ],
    }


def rule(name: str, value: float, bound: float, *, passed: bool) -> dict[str, Any]:
    detail = "4.0000 -> 2.5000"
    return {"name": name, "value": value, "bound": bound, "comparison": "at most", "passed": passed, "detail": detail}


@pytest.fixture(scope="module")
def factors(tmp_path_factory: pytest.TempPathFactory) -> FactorSet:
    """Three blocks with two kinds each; every weight has singular values 4 (frozen) and 3 (unfrozen), norm 5."""
    weights = {}
    store = tmp_path_factory.mktemp("store")
    (store / "weights").mkdir()
    for block in range(3):
        for kind in ("self_attn.q_proj", "mlp.up_proj"):
            file = f"weights/{block}{kind}.safetensors"
            save_file({"singular_values": torch.tensor([4.0, 3.0])}, store / file)
            name = f"model.layers.{block}.{kind}"
            weights[name] = {"sha256": "0" * 64, "shape": [2, 2], "rank": 1, "file": file}
    manifest = {"format": FORMAT, "unfreeze_rank_ratio": 0.5, "free_subspace": "core", "weights": weights}
    path = store / "sets" / "abc123.json"
    path.parent.mkdir()
    path.write_text(json.dumps(manifest))
    return load_factor_set(path)


def new_training(factors: FactorSet) -> dict[str, Any]:
    return {
        "config": {
            "learning_rate": 0.0005,
            "max_grad_norm": 1.0,
            "lr_scheduler_kwargs": {"min_lr": None, "ratio": 0.5},
        },
        "steps": 2,
        "tokens": 3796,
        "loss_tokens": 226,
        "world_size": 2,
        "device": "NVIDIA H100",
        "trainable_parameters": 22_809_600,
        "total_parameters": 91_238_400,
        "load_seconds": 4.0,
        "train_seconds": 94.9,
        "save_seconds": 0.5,
        "peak_memory_bytes": 3 * 2**30,
        "rank_layout": {name: {"update_norm": 0.05 * (i + 1)} for i, name in enumerate(factors.weights)},
    }


def new_metrics() -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "epoch": step / 2,
            "loss": 4.0 / step,
            "learning_rate": 5e-4 / step,
            "grad_norm": 8.0 / step,
            "tokens": 1898 * step,
            "loss_tokens": 113 * step,
            "tokens_per_second": 100.0,
            "step_seconds": 1.0,
        }
        for step in (1, 2)
    ]


def new_dataset() -> dict[str, Any]:
    return {
        "data_uri": "/data/sarcasm.jsonl",
        "files": {"/data/sarcasm.jsonl": "0faa2067" * 8},
        "settings": {"max_seq_len": 1024},
        "num_records": 28614,
        "num_duplicates": 116,
        "num_train_samples": 640,
        "num_validation_samples": 100,
        "num_tokens": 37331,
        "num_loss_tokens": 2236,
        "longest_sample": 79,
        "dropped_as_too_long": {"samples": 7, "tokens": 9000},
    }


evaluation = pytest.fixture(new_evaluation)
metrics = pytest.fixture(new_metrics)
dataset = pytest.fixture(new_dataset)
training = pytest.fixture(new_training)


def new_page(factors: FactorSet) -> str:
    inputs = {"training": new_training(factors), "metrics": new_metrics(), "dataset": new_dataset()}
    return render_report(new_evaluation(), factors=factors, **inputs)


@pytest.fixture(scope="module")
def page(factors: FactorSet) -> str:
    """The whole report, for tests that only read it."""
    return new_page(factors)


class Page(HTMLParser):
    """What a reader and a browser see: table rows, text per section, ids, tags and attributes."""

    VOID = ("meta", "br", "hr", "link", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.text: dict[str, str] = {}
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.section = "head"
        self.feed(html)
        assert self.open == [], "every element is closed"
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        self.text = {section: " ".join(text.split()) for section, text in self.text.items()}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        (found,) = [row for row in self.rows if row and row[0] == first]
        return found


def test_sections_are_there_in_order(page):
    assert re.findall(r'<section id="(\w+)">', page) == SECTIONS


def test_rules_show_numbers_bounds_and_outcome(page):
    assert Page(page).row("loss of the new task")[1:4] == ["−37.50 %", "at most −15.00 %", "✓ pass"]
    assert Page(page).row("loss of the anchor film-plots")[1:4] == ["+5.00 %", "at most +6.25 %", "✓ pass"]


def test_result_table_shows_the_inputs_numbers_and_the_new_task_first(page):
    rows = [row for row in Page(page).rows if len(row) == 9 and row[1] in ("new task", "anchor")]
    assert rows == [
        [
            "sarcasm-headlines 100 samples, accuracy by choice",
            "new task",
            *("4.000", "2.500", "▼ −37.5 % better"),
            *("54.60", "12.18"),
            *("51.0 % ± 5.0 %", "84.0 % ± 5.0 %"),
        ],
        ["film-plots 100 samples", "anchor", "3.000", "3.150", "▲ +5.0 % worse", "20.09", "23.34", "–", "–"],
    ]


def test_loss_change_plot_is_labelled_with_the_changes(page):
    (plot,) = re.findall(r"<svg[^>]*loss-change-title.*?</svg>", page, re.DOTALL)
    assert re.findall(r"[−+][\d.]+\s%", plot) == ["−37.5\N{NO-BREAK SPACE}%", "+5.0\N{NO-BREAK SPACE}%"]


def test_promoted_page_does_not_say_refused(page):
    assert "Promoted" in Page(page).text["decision"]
    assert "refused" not in page.lower()


def test_refused_page_says_so_and_names_only_the_failing_rule(evaluation):
    evaluation["decision"]["promote"] = False
    evaluation["decision"]["rules"][1] = rule("loss of the anchor film-plots", 0.0204, 0.02, passed=False)
    html = render_report(evaluation)
    banner = html.split('class="banner bad"')[1].split("</div>")[0]
    assert "Refused" in banner
    assert "1 of 2 rules failed" in banner
    assert "loss of the anchor film-plots" in banner
    assert "loss of the new task" not in banner
    assert "promoted" not in html.lower()
    assert Page(html).row("loss of the anchor film-plots")[1:4] == ["+2.04 %", "at most +2.00 %", "✗ fail"]


@pytest.mark.parametrize(
    ("left_out", "missing"),
    [
        ({"metrics"}, {"training"}),
        ({"factors"}, {"subspace"}),
        ({"training", "metrics", "factors", "dataset"}, {"training", "subspace"}),
    ],
)
def test_missing_inputs_drop_their_sections(
    evaluation, training, metrics, factors, dataset, left_out: set[str], missing: set[str]
):
    inputs = {"training": training, "metrics": metrics, "factors": factors, "dataset": dataset}
    html = render_report(evaluation, **{name: None if name in left_out else v for name, v in inputs.items()})
    assert re.findall(r'<section id="(\w+)">', html) == [name for name in SECTIONS if name not in missing]


def test_provenance_without_training_and_data_holds_the_models_only(evaluation):
    text = Page(render_report(evaluation)).text["provenance"]
    assert "/models/base" in text
    assert "Training settings" not in text
    assert "Training data" not in text


def test_page_without_examples_has_no_such_section(evaluation):
    evaluation["examples"] = []
    assert "Examples" not in render_report(evaluation)


def test_cost_and_settings_equal_the_inputs(page):
    text = Page(page).text["provenance"]
    for expected in (
        "1 min 35 s training time",
        "3,796 tokens in 2 steps",
        "40 tokens per second",
        "3.00 GiB",
        "25.0 % of parameters trainable",
        "2 × NVIDIA H100",
        "lr_scheduler_kwargs.ratio0.5",
        "lr_scheduler_kwargs.min_lr–",
    ):
        assert expected in text
    assert Page(page).row("Trainable parameters") == ["Trainable parameters", "22,809,600 of 91,238,400"]


def test_data_files_are_listed_with_their_hashes(page):
    assert Page(page).row("/data/sarcasm.jsonl") == ["/data/sarcasm.jsonl", "0faa2067" * 8]
    assert "7 dropped" in Page(page).row("Records")[1]


def test_subspace_section_shows_frozen_energy_and_each_relative_update(page):
    text = Page(page).text["subspace"]
    assert "hold 64.0 % of the weights' squared norm" in text  # 4² of 4² + 3²
    assert "1 frozen | 1 unfrozen" in text
    for percent in range(1, 7):  # 0.05 i / 5
        assert f" {percent}.00 " in text
    assert "Largest: 6.00 % in up_proj of block 2" in text


def test_experts_of_a_block_count_as_one_weight():
    updates = {"layers.0.experts.0.up": 3.0, "layers.0.experts.1.up": 4.0, "lm_head": 1.0}
    assert relative_update_sizes(updates, {"layers.0.experts.0.up": 6.0, "layers.0.experts.1.up": 8.0}) == {
        (0, "up"): 0.5
    }


def test_loss_plot_has_the_tokens_as_second_axis(page):
    (plot,) = re.findall(r"<svg[^>]*training-title.*?</svg>", page, re.DOTALL)
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", plot)
    assert {"tokens", "1,898", "3,796", "step", "clipped to 1"} <= set(labels)


def test_long_run_is_thinned_and_keeps_both_ends(evaluation, metrics):
    long = [metrics[0] | {"step": step, "tokens": 1898 * step} for step in range(1, 5001)]
    html = render_report(evaluation, metrics=long)
    assert len(html) < 200_000
    assert "9,490,000" in html


def test_untrusted_text_is_escaped_everywhere(evaluation, training, metrics, factors, dataset):
    hostile = f"{SCRIPT}\"'$x$&\x00"
    results = {model: {hostile: scores["film-plots"]} for model, scores in evaluation["results"].items()}
    evaluation |= {"task": hostile, "sets": {hostile: {"role": hostile, "source": hostile, "num_samples": 1}}}
    evaluation |= {"results": results, "base_model": hostile, "candidate_model": hostile}
    evaluation["decision"]["rules"][0] |= {"name": hostile, "detail": hostile}
    evaluation["examples"] = [dict.fromkeys(("set", "prompt", "reference", "base", "candidate"), hostile)]
    training |= {"device": hostile, "config": {"max_grad_norm": 0, hostile: hostile}}
    dataset |= {"data_uri": hostile, "files": {hostile: hostile}}
    html = render_report(evaluation, training=training, metrics=metrics, factors=factors, dataset=dataset)
    assert "<script" not in html
    assert "script" not in Page(html).tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_prompt_with_a_script_is_shown_as_text(page):
    assert "Sarcastic? &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page


def test_answer_equal_to_the_reference_is_marked(page):
    text = Page(page).text["examples"]
    assert "Candidate ✓ as the reference" in text
    assert "Base ✓" not in text


def test_page_refers_to_nothing_outside_it(page):
    assert re.findall(r"https?://|//[\w.]+\.\w+/|@import", page) == []
    assert not {"script", "link", "img", "image", "iframe", "object"} & set(Page(page).tags)
    references = [value for name, value in Page(page).attributes if name in ("href", "src")]
    assert all(value.startswith("#") for value in references)


def test_ids_are_unique_and_references_resolve(page):
    attributes = Page(page).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in attributes if name == "href"}
    targets |= {target for _, value in attributes for target in re.findall(r"url\(#([^)]+)\)", value)}
    targets |= {value for name, value in attributes if name == "aria-labelledby"}
    assert targets
    assert targets <= set(ids)


def test_every_plot_has_a_title(page):
    assert page.count("<svg") == 4
    assert (
        len(re.findall(r'<svg viewBox="[^"]+" role="img" aria-labelledby="([\w-]+)">\s*<title id="\1">\w', page)) == 4
    )


def test_equal_inputs_give_equal_pages(page, factors):
    assert new_page(factors) == page


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_shown_as_such(evaluation, loss: float):
    evaluation["results"]["candidate"]["film-plots"] |= {"loss": loss, "perplexity": loss}
    (row,) = [row for row in Page(render_report(evaluation)).rows if row[0].startswith("film-plots")]
    assert row[2:7] == ["3.000", str(loss), "–", "20.09", str(loss)]


def test_page_with_lone_surrogates_can_be_written(evaluation, tmp_path):
    evaluation["examples"][0]["candidate"] = json.loads(r'"\ud83d"')
    (tmp_path / "report.html").write_text(render_report(evaluation), encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "text"), [(-0.421, "−42.1"), (0.01, "+1.0"), (-0.00001, "0.0"), (12.5, "+1,250.0"), (math.nan, "+nan")]
)
def test_signed_percent(value: float, text: str):
    assert format_percent(value, signed=True) == f"{text}\N{NO-BREAK SPACE}%"


@pytest.mark.parametrize(("seconds", "text"), [(23.44, "23.4 s"), (204, "3 min 24 s"), (7505, "2 h 05 min")])
def test_duration(seconds: float, text: str):
    assert format_duration(seconds) == text
