"""How far a candidate's predictions are from another model's."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from osft.data.chat import IGNORE, tokenize
from osft.data.packing import Batching
from osft.data.records import Record
from osft.evaluation.drift import RecordDrift, compare, dtype_that_fits, plan_comparison
from osft.evaluation.evaluate import EvaluationSet, evaluate, load_set
from osft.evaluation.scoring import score_records
from osft.settings.subspace import SubspaceConfig
from osft.subspace.preflight import Preflight
from osft.training.factors import compute_factors
from osft.training.statistics import self_written_text
from tests.conftest import arithmetic, byte_tokenizer, tiny_llama

TOKENIZERS = (byte_tokenizer(), byte_tokenizer())


def chats(count: int, seed: int = 0) -> list[Record]:
    return [Record(source=f"f:{i}", messages=tuple(r["messages"])) for i, r in enumerate(arithmetic(count, seed))]


def moved(model: Any, size: float, seed: int = 1) -> Any:
    """The model with noise in its output's weights."""
    torch.manual_seed(seed)
    with torch.no_grad():
        model.model.norm.weight.add_(size * torch.randn_like(model.model.norm.weight))
    return model


def base() -> Any:
    return tiny_llama().eval()


def drift(reference: Any, model: Any, records: Any, tokenizers: Any = TOKENIZERS, **how: Any) -> RecordDrift | None:
    """From one model to another."""
    (found,) = compare([reference, model], tokenizers, records, **how).drift
    return found


def expected_kl(reference: Any, model: Any, record: Record) -> float:
    """By PyTorch, in float64, of one sample alone."""
    sample = tokenize(record, TOKENIZERS[0])
    input_ids = torch.tensor([sample.input_ids])
    with torch.no_grad():
        log_p, log_q = (each.double()(input_ids).logits[0, :-1].log_softmax(-1) for each in (reference, model))
    counts = torch.tensor(sample.labels[1:]) != IGNORE
    return float(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)[counts].sum())


def test_drift_of_a_record_is_pytorchs_divergence_over_what_counts_in_the_loss():
    records = [*chats(5), Record(source="t", text="Some plain text, of which all counts.")]
    found = drift(base(), moved(base(), 0.1), records)
    expected = [expected_kl(base(), moved(base(), 0.1), record) for record in records]
    assert found.kl == pytest.approx(expected, rel=1e-3)
    assert min(found.kl) > 1e-3
    assert found.num_tokens == [tokenize(record, TOKENIZERS[0]).num_loss_tokens for record in records]


def test_model_has_not_drifted_from_itself_at_all():
    model = base()
    assert drift(model, model, chats(4)).kl == [0.0] * 4


def test_several_references_are_compared_as_each_alone():
    records = [*chats(3), Record(source="t", text="Some text.")]
    near, far = moved(base(), 0.05), moved(base(), 0.1)
    found = compare([base(), near, far], (TOKENIZERS * 2)[:3], records, with_scores=True)
    assert found.drift == [drift(base(), far, records), drift(near, far, records)]
    assert found.scores == [score_records(model, TOKENIZERS[0], records) for model in (base(), near, far)]


def test_divergence_is_that_of_the_right_answers_where_all_choices_are_read():
    records = [replace(record, choices=("<", "=", record.messages[-1]["content"])) for record in chats(5)]
    models, tokenizers = [base(), moved(base(), 0.1)], TOKENIZERS
    found = compare(models, tokenizers, records, with_scores=True, batching=Batching.BRANCHED)
    (expected,) = compare(models, tokenizers, records).drift
    assert found.drift[0].num_tokens == expected.num_tokens
    assert found.drift[0].kl == pytest.approx(expected.kl, rel=1e-3)
    assert [score.accuracy_kind for score in found.scores] == ["choice"] * 2


def test_small_drift_grows_with_the_square_of_the_update():
    found = [drift(base(), moved(base(), size), chats(4)).summary().kl for size in (1e-4, 2e-4)]
    assert 0 < found[0] < 1e-7
    assert found[1] / found[0] == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(("max_tokens", "batching"), [(1, "packed"), (150, "packed"), (150, "padded")])
def test_drift_does_not_depend_on_what_is_batched_together(max_tokens, batching):
    records = chats(7)
    models = base(), moved(base(), 0.1)
    expected = drift(*models, records)
    found = drift(*models, records, max_tokens=max_tokens, batching=Batching(batching))
    assert found.num_tokens == expected.num_tokens
    assert found.kl == pytest.approx(expected.kl, rel=1e-3)


def test_summary_is_the_mean_over_tokens_with_the_error_of_a_ratio():
    found = RecordDrift([0.2, 0.0, 1.0], [2, 1, 3], "float32").summary()
    assert (found.kl, found.num_tokens, found.dtype) == (pytest.approx(0.2), 6, "float32")
    residuals = [0.2 - 2 * 0.2, 0.0 - 0.2, 1.0 - 3 * 0.2]
    assert found.stderr == pytest.approx(math.sqrt(3 / 2 * sum(value**2 for value in residuals)) / 6)
    assert RecordDrift([0.2], [2], "float32").summary().stderr is None


def test_both_models_are_compared_in_float32_where_they_fit():
    parameters, memory = 2 * 8_000_000_000, 80 * 2**30
    assert dtype_that_fits(parameters, memory) == torch.float32
    assert dtype_that_fits(2 * parameters, memory) == torch.bfloat16
    assert drift(base().bfloat16(), base().bfloat16(), chats(1)).dtype == "bfloat16"


def test_all_models_are_compared_at_once_where_they_fit(models, monkeypatch):
    folders = [Path(folder) for folder in models.values()]
    size = 4 * sum(parameter.numel() for parameter in base().parameters())  # its embeddings are tied, and stored once
    for memory, expected in ((3 * size / 0.84, True), (3 * size / 0.86, False)):
        monkeypatch.setattr("osft.evaluation.drift.memory_available", lambda memory=memory: memory)
        assert plan_comparison(folders) == (torch.float32, expected)


def test_models_that_read_other_tokens_or_predict_others_cannot_be_compared():
    other = byte_tokenizer()
    other.chat_template = other.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    assert drift(base(), base(), chats(2), (TOKENIZERS[0], other)) is None
    wider = tiny_llama(vocab_size=300).eval()
    assert drift(base(), wider, chats(2)) is None


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = {}
    for name, model in {"base": base(), "champion": moved(base(), 0.05), "candidate": moved(base(), 0.1)}.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        folders[name] = str(folder)
    return folders


SETS = [
    EvaluationSet("new", "new task", "new.jsonl", tuple(chats(4))),
    EvaluationSet("old", "earlier task", "old.jsonl", tuple(chats(3, seed=1))),
    EvaluationSet("web", "anchor", "web.jsonl", (Record(source="w", text="Web text."), Record(source="v", text="So."))),
    EvaluationSet("written", "self-written", "w.jsonl", tuple(Record(source="s", text=t) for t in ("I.", "I am."))),
]


def test_evaluation_has_the_drift_from_each_other_model_on_every_set(models):
    found = evaluate(models, SETS, num_examples=0)
    assert list(found.drift) == ["base", "champion"]
    others = {"base": base(), "champion": moved(base(), 0.05)}
    for name, other in others.items():
        assert list(found.drift[name]) == [s.name for s in SETS]
        for s in SETS:
            expected = drift(other, moved(base(), 0.1), s.records, batching=Batching.BRANCHED)
            assert found.drift[name][s.name].kl == pytest.approx(expected.summary().kl, rel=1e-3)


def test_on_self_written_text_drift_is_all_that_is_measured(models):
    found = evaluate(models, SETS, num_examples=1)
    assert found.sets["written"].role == "self-written"
    scored = {"new", "old", "web"}
    assert all(set(found.results[name]) == scored for name in models)
    assert all(set(changes) == scored for changes in found.changes.values())


def test_candidate_that_is_the_base_model_has_not_drifted(models):
    found = evaluate({"base": models["base"], "candidate": models["base"]}, SETS, num_examples=0)
    assert {drift.kl for drift in found.drift["base"].values()} == {0.0}


def test_drift_of_models_that_cannot_be_compared_is_none(models, tmp_path):
    tiny_llama(vocab_size=300).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    store = str(tmp_path / "store")
    for _ in range(2):  # measured, and read from the store
        found = evaluate(models | {"candidate": str(tmp_path)}, SETS[:1], num_examples=0, score_store=store)
        assert found.drift["base"] == {"new": None}


def test_text_that_the_base_model_wrote_is_found_from_its_factors(model_folder, tmp_path):
    subspace = SubspaceConfig(protect="activations", calibration_tokens=256, unfreeze_rank_ratio=0.25)
    factors = compute_factors(model_folder, "none", tmp_path, subspace, preflight=Preflight(Batching.PACKED, "tiny"))
    written = load_set(self_written_text(tmp_path / factors.statistics), "self-written")
    tokens = [len(byte_tokenizer()(record.text)["input_ids"]) for record in written.records]
    assert len(tokens) > 1
    assert sum(tokens) >= 256, "bytes that are no UTF-8 read as more"
    Path(written.source).unlink()
    assert self_written_text(tmp_path / factors.statistics) is None


def test_drift_is_measured_again_for_other_records_and_the_other_direction(models, tmp_path):
    def kl(candidate: str, reference: str, of_set: EvaluationSet) -> float:
        pair = {"base": models[reference], "candidate": models[candidate]}
        found = evaluate(pair, [of_set], num_examples=0, score_store=str(tmp_path))
        return found.drift["base"][of_set.name].kl

    other = replace(SETS[0], records=SETS[0].records[:2])
    values = [
        kl("candidate", "base", SETS[0]),
        kl("base", "candidate", SETS[0]),
        kl("champion", "base", SETS[0]),
        kl("candidate", "base", other),
    ]
    assert len(set(values)) == 4
