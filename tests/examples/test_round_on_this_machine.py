"""The notebook for this machine, with a tiny model: three runs of the compiled pipeline and what it shows."""

import html
import json
import re
from pathlib import Path

import pytest
from nbformat import NotebookNode

from osft.tracking import registry, runs
from tests.conftest import write_jsonl
from tests.examples.conftest import Execute, shown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def letters(count: int) -> list[dict]:
    """A second task: which of two letters comes first."""
    records = []
    for number in range(count):
        first, second = chr(97 + number * 7 % 26), chr(97 + (number * 11 + 5) % 26)
        question = {"role": "user", "content": f"letters {first} {second}, number {number}"}
        answer = {"role": "assistant", "content": "left" if first <= second else "right"}
        records.append({"messages": [question, answer], "choices": ["left", "right"]})
    return records


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def parameters(storage: Path, model_folder: Path, chats: Path) -> str:
    text = write_jsonl(storage / "prose.jsonl", [{"text": f"a plain text, number {i}"} for i in range(20)])
    settings = {
        "anchor_uris": json.dumps([str(text)]),
        "model_name": "notebook",
        "effective_batch_size": 8,
        "learning_rate": 0.02,
        "stiffness": 10.0,  # in a random model no direction is free of use
        "num_epochs": 8,
        "nproc_per_node": 1,
        "gate": json.dumps({"max_drift": {"bound": 10}, "max_forgetting": {"bound": 10}}),
    }
    values = {
        "MODEL": str(model_folder),
        "DATA": str(chats),
        "NEXT_DATA": str(write_jsonl(storage / "letters.jsonl", letters(120))),
        "SETTINGS": [f"{name}={value}" for name, value in settings.items()],
    }
    return "\n".join([*(f"{name} = {value!r}" for name, value in values.items()), f"STORAGE = Path({str(storage)!r})"])


@pytest.fixture(scope="module", autouse=True)
def notebook(execute: Execute, parameters: str) -> NotebookNode:
    return execute("round_on_this_machine.ipynb", parameters, seconds_a_cell=600, HF_HUB_OFFLINE="1")


def test_records_are_shown(notebook):
    assert shown(notebook, "records").startswith("120 records in larger-number.jsonl\n")
    assert '"choices"' in shown(notebook, "records")


def test_decision_has_the_number_of_each_rule(notebook):
    promoted, gain, drift, own_drift = shown(notebook, "decision").splitlines()
    assert promoted == "promoted"
    assert gain.startswith("passed min_gain of larger-number (loss, against base)")
    assert drift.startswith("passed max_drift of prose (kl, against base)")
    assert own_drift.startswith("passed max_drift of self-written text (kl, against base)")


def test_report_of_the_round_is_shown(notebook, storage):
    (cell,) = [cell for cell in notebook.cells if cell.id == "report"]
    page = html.unescape(re.search('srcdoc="([^"]*)"', cell.outputs[0].data["text/html"])[1])
    assert page in [file.read_text() for file in (storage / "rounds").glob("*/report.html")]
    assert "larger-number" in page


def test_loss_curve_is_drawn(notebook):
    (cell,) = [cell for cell in notebook.cells if cell.id == "curve"]
    assert any("image/png" in output.get("data", {}) for output in cell.outputs)


def test_answers_are_of_both_models(notebook):
    for name in ("larger-number", "prompt", "reference", "base", "candidate"):
        assert name in shown(notebook, "answers")


def test_tuned_model_answers(notebook):
    assert shown(notebook, "chat").strip().endswith(("'first'", "'second'"))


def test_same_data_again_is_nothing_to_learn(notebook, storage):
    rounds = [json.loads(file.read_text()) for file in (storage / "rounds").glob("*/round.json")]
    assert len([found for found in rounds if not found["nothing_to_learn"]]) == 2
    idle = {f"round: {found['nothing_to_learn']}" for found in rounds if found["nothing_to_learn"]}
    assert " ".join(shown(notebook, "again").split()).endswith(tuple(idle))


def test_new_data_is_a_second_version_and_a_row_of_the_matrix(notebook, storage):
    champion = registry.champion(runs.client("", storage), "notebook")
    assert champion == 2
    for text in ("notebook version 1", "notebook version 2 (candidate, champion)", "letters", "larger-number"):
        assert text in shown(notebook, "tree")
    assert "after letters" in shown(notebook, "matrix")
    assert "backward transfer" in shown(notebook, "matrix")


def test_opened_again_it_trains_nothing_and_shows_the_champions_round(notebook, execute, parameters, storage):
    trained = set((storage / "rounds").glob("*/train"))
    opened_again = execute("round_on_this_machine.ipynb", parameters, seconds_a_cell=600)
    assert set((storage / "rounds").glob("*/train")) == trained
    assert "min_gain of letters (loss, against champion)" in shown(opened_again, "decision")
