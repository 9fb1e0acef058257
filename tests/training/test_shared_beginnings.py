"""On a CPU, training computes what samples begin with once for all of a micro-batch, and learns the same."""

import json
from pathlib import Path

import pytest

from osft import osft
from osft.data.packing import MicroBatch
from osft.models.likelihood import token_nll
from osft.subspace.preflight import Preflight
from tests.conftest import write_jsonl
from tests.training.in_process import run_in_process


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The tokens of each micro-batch that is trained on."""
    tokens: list[int] = []

    def counted(model, batch: MicroBatch):
        tokens.append(batch.input_ids.numel())
        return token_nll(model, batch)

    monkeypatch.setattr("osft.training.loop.token_nll", counted)
    return tokens


def losses(folder: Path, **given: str) -> list[float]:
    osft(
        **given,
        unfreeze_rank_ratio=0.5,
        effective_batch_size=8,
        max_tokens_per_gpu=400,
        max_seq_len=128,
        learning_rate=5e-3,
        num_epochs=3,
        ckpt_output_dir=str(folder),
    )
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_computes_a_question_once_and_learns_the_same(model_folder, tmp_path, monkeypatch, computed):
    run_in_process(monkeypatch)
    asked = [("Which of these two is larger? " + f"{a} or {b}", str(max(a, b))) for a in range(10, 14) for b in (5, 17)]
    chats = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in asked
    ]
    given = {"model_path": str(model_folder), "data_path": str(write_jsonl(tmp_path / "chats.jsonl", chats))}
    shared = losses(tmp_path / "shared", **given)
    with_sharing = sum(computed)
    computed.clear()
    monkeypatch.setattr(Preflight, "shared_batching", property(lambda self: self.batching))
    assert losses(tmp_path / "packed", **given) == pytest.approx(shared, rel=1e-5)
    assert len(shared) == 3
    assert shared[-1] < shared[0]
    assert with_sharing < 0.5 * sum(computed)
