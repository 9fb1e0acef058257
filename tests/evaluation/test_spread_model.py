"""A model whose blocks are in several places computes what it does in one.

On a machine without GPUs these are its memory and its disk, from where accelerate brings a block's weights while it
computes, as it does from the CPU's memory for a GPU. What is special about two GPUs cannot be seen here.
"""

from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from osft.data.records import read_records
from osft.evaluation.drift import compare
from osft.evaluation.generation import generate
from osft.evaluation.scoring import score_records
from osft.subspace import select_targets
from osft.subspace.calibration import measure
from tests.conftest import feeding
from tests.subspace.test_calibration import moments, texts


@pytest.fixture(scope="module")
def whole_and_spread(model_folder, tmp_path_factory):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, device_map=places, offload_folder=tmp_path_factory.mktemp("offloaded")
    )
    assert spread.model.layers[1].mlp.up_proj.weight.is_meta
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval(), spread.eval()


def test_scores_answers_and_drift_are_the_same(whole_and_spread, model_folder, chats):
    tokenizer, records = AutoTokenizer.from_pretrained(model_folder), list(read_records(str(chats)))[:12]
    whole, spread = whole_and_spread
    expected, found = (asdict(score_records(model, tokenizer, records)) for model in whole_and_spread)
    assert found == expected
    assert generate(spread, tokenizer, records[:3]) == generate(whole, tokenizer, records[:3])
    (drift,) = compare([whole, spread], [tokenizer] * 2, records).drift
    assert drift.kl == [0.0] * len(records)


def test_statistics_are_the_same(whole_and_spread):
    expected, found = (
        moments(measure(model, select_targets(model), texts(), feeding=feeding())) for model in whole_and_spread
    )
    for target, values in expected.items():
        for value, direct in zip(found[target], values, strict=True):
            torch.testing.assert_close(value, direct)
