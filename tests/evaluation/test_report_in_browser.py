"""The report in a real browser: `make test-report`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from docs.browser import Page, browser
from docs.screenshot import take_screenshot
from tests.evaluation.round_report import (
    COST,
    KINDS,
    new_dataset,
    new_evaluation,
    new_factors,
    new_metrics,
    new_training,
    rendered,
)

pytestmark = pytest.mark.browser
WIDTHS = (1280, 400)

# Elements that reach beyond the window's right edge. What lies in a box that scrolls counts by the box.
TOO_WIDE = """
[...document.body.querySelectorAll("*")].filter(element => {
  const scrolls = element.closest(".wide, .text");
  const box = scrolls && scrolls !== element ? scrolls : element;
  return box.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5;
}).map(element => element.outerHTML.slice(0, 120))
"""

# Texts whose contrast with what is behind them is below WCAG's 4.5, as [text, contrast]. Numbers in heat maps lie on
# cells of their own; another test measures those.
UNREADABLE = """
(() => {
  const rgb = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = color => {
    const [r, g, b] = rgb(color).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if ((rgb(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join("");
    const drawn = element.namespaceURI.endsWith("svg");
    if (!text || (drawn && (element.tagName !== "text" || getComputedStyle(element).fill === "rgb(255, 255, 255)")))
      continue;
    const style = getComputedStyle(element);
    const pair = [luminance(drawn ? style.fill : style.color), luminance(background(element))].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (contrast < 4.5) found.push([text.slice(0, 40), contrast]);
  }
  return found;
})()
"""

# Drawn text that its picture cuts off.
CLIPPED = """
[...document.querySelectorAll("svg text")].filter(text => {
  const box = text.getBoundingClientRect(), frame = text.ownerSVGElement.getBoundingClientRect();
  return box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 ||
    box.bottom > frame.bottom + 1;
}).map(text => text.textContent)
"""

SMALLEST_TEXT = """
Math.min(...[...document.body.querySelectorAll("*")].filter(element => !element.closest("svg") &&
  [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim())
).map(element => parseFloat(getComputedStyle(element).fontSize)))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a third round."""
    folder = tmp_path_factory.mktemp("report")
    factors = new_factors(folder, blocks=30, kinds=KINDS)
    inputs: dict[str, Any] = {"training": new_training(factors), "metrics": new_metrics(60), "dataset": new_dataset()}
    html = rendered(new_evaluation(3, benchmarks=True), factors=factors, cost=COST, **inputs)
    (folder / "report.html").write_text(html, encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def new_browser() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.fixture(scope="module", params=WIDTHS)
def page(new_browser: Page, report: Path, request: pytest.FixtureRequest) -> Page:
    """The report, open in a window of a computer and of a phone."""
    new_browser.open(report, width=request.param)
    return new_browser


def test_browser_shows_the_decision(page):
    assert page.evaluate("document.querySelector('.banner strong').innerText") == "✓ Promoted"


def test_page_asks_for_nothing_but_itself(page):
    asked = {event["request"]["url"] for method, event in page.events if method == "Network.requestWillBeSent"}
    assert {url.partition(":")[0] for url in asked} == {"file"}
    assert len(asked) == 1


def test_page_raises_no_error_and_logs_nothing(page):
    loud = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert [event for event in page.events if event[0] in loud] == []


def test_nothing_is_wider_than_the_window(page):
    assert page.evaluate(TOO_WIDE) == []
    # clientWidth is the window's: on a phone innerWidth grows with what does not fit.
    assert page.evaluate("document.documentElement.clientWidth") in WIDTHS
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_no_label_of_a_picture_is_cut_off(page):
    assert page.evaluate(CLIPPED) == []


def test_text_is_dark_and_large_enough_to_read(page):
    assert page.evaluate(UNREADABLE) == []
    assert page.evaluate(SMALLEST_TEXT) >= 12


def test_pictures_are_drawn_at_a_readable_size(page):
    scales = page.evaluate("[...document.querySelectorAll('svg')].map(s => s.clientWidth / s.viewBox.baseVal.width)")
    assert min(scales) > 0.95, "CSS pixels a point: text of 8.5 points is 8 pixels high or more"


def test_script_in_a_prompt_does_not_run(page):
    assert page.evaluate("document.scripts.length") == 0
    assert page.evaluate("document.querySelector('.prompt .text').innerText.includes('<script>alert(1)')") is True


def test_dark_mode_of_the_reader_keeps_the_page_light(page):
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    try:
        assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate(UNREADABLE) == []
    finally:
        page.call("Emulation.setEmulatedMedia", features=[])


def test_thirty_rounds_fit_the_window(new_browser, tmp_path):
    evaluation = new_evaluation(30)
    (tmp_path / "long.html").write_text(rendered(evaluation), encoding="utf-8")
    for width in WIDTHS:
        new_browser.open(tmp_path / "long.html", width=width)
        assert new_browser.evaluate(TOO_WIDE) == []
        assert new_browser.evaluate(CLIPPED) == []


def test_words_without_spaces_do_not_widen_the_page(new_browser, tmp_path):
    text = (
        json.dumps(new_evaluation(3, benchmarks=True)).replace("film-reviews", "f" * 300).replace("serious", "s" * 300)
    )
    (tmp_path / "wide.html").write_text(rendered(json.loads(text)), encoding="utf-8")
    for width in WIDTHS:
        new_browser.open(tmp_path / "wide.html", width=width)
        assert new_browser.evaluate(TOO_WIDE) == []


def test_screenshot_is_a_picture_of_the_whole_width(report, tmp_path):
    take_screenshot(report, tmp_path / "report.png", width=1100, height=1600)
    png = (tmp_path / "report.png").read_bytes()
    assert (int.from_bytes(png[16:20]), int.from_bytes(png[20:24])) == (1100, 1600)
