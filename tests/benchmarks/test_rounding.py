"""The measurement of roundings, on a random model of two blocks and random text."""

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks.rounding import LastBlocks, Settings, measure, report, table_rows
from tests.conftest import tiny_llama

SETTINGS = Settings(learning_rates=(1e-4, 1e-2), seeds=(0, 1), blocks=1, steps=3, sample_tokens=40, held_out_samples=2)
TEXTS = {"the training text": 6, "held-out pages": 2, "web text": 3, "held-out web text": 2}


def tokens() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(0, 50, (count, 40), generator=generator) for name, count in TEXTS.items()}


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    model = tiny_llama()
    with torch.no_grad():  # as a checkpoint in bfloat16
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return measure(model, tokens(), SETTINGS, lambda _: None)


def test_last_blocks_compute_what_the_whole_model_computes():
    model, texts = tiny_llama().eval(), tokens()
    used = torch.unique(torch.cat([text.flatten() for text in texts.values()]))
    with torch.no_grad():
        expected = model(texts["web text"][1:2]).logits[0][:, used].log_softmax(-1)
        last = LastBlocks(model, texts, 1)
        found = last.log_probabilities(last.texts["web text"], 1)
    torch.testing.assert_close(found, expected)


def test_only_rounded_weights_leak_and_nearest_loses_the_most(records):
    for record in records:
        if record["way"] == "exact":
            assert record["frozen_share"] < 1e-3  # float32 noise of an update that is small, too
            assert (record["kept"], record["error"]) == (1.0, 0.0)
        else:
            assert record["frozen_share"] > 0.01
    small = {record["way"]: record for record in records if record["learning_rate"] == 1e-4 and record["seed"] == 0}
    assert small["nearest"]["changed"] < 0.5 * small["exact"]["changed"]
    assert small["nearest"]["error"] < small["stochastic"]["error"]


def test_table_has_a_row_for_every_rate_and_way_with_the_mean_over_the_seeds(records, tmp_path, capsys):
    rows = table_rows(records)
    assert len(rows) == 2 * 5
    gains = [record["gain"] for record in records if record["way"] == "exact" and record["learning_rate"] == 1e-2]
    (row,) = [row for row in rows if row[:2] == ["0.01", "exact"]]
    assert float(row[2]) == pytest.approx(sum(gains) / 2, abs=1e-4)
    machine = {"processor": "a processor", "torch": "1", "transformers": "2"}
    report(
        {"date": "today", "machine": machine, "settings": asdict(SETTINGS), "records": records, "total_seconds": 60.0},
        tmp_path,
    )
    assert (tmp_path / "rounding_cpu.md").read_text().count("\n| 0.01 |") == 5
    assert json.loads((tmp_path / "rounding_cpu.json").read_text())["records"] == records
