"""Of every architecture: what is computed and learned in micro-batches is what is computed and learned one by one."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from osft.data.chat import IGNORE, Sample
from osft.data.packing import Batching, MicroBatch, collate, plan_micro_batches
from osft.models.checkpoint import CheckpointReader
from osft.models.conversion import ModelWeights
from osft.models.likelihood import token_nll
from osft.models.loading import empty_model, load_model, without_dropout
from osft.models.packed_attention import masked, register
from osft.process.private_names import set_attention
from osft.settings.subspace import SubspaceConfig
from osft.subspace import inject, osft_layers
from osft.subspace.preflight import Preflight
from osft.training.loop import train_step
from osft.training.saving import save_merged
from tests import architectures
from tests.architectures import CLASSES, KINDS, NOT_BUILT, TABLE, VOCABULARY, found, render, small_config

REFUSED = {
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    *("prophetnet", "whisper", "cpmant", "reformer", "xlm", "xlnet"),
}
TRAINED = [kind for kind in KINDS if kind not in REFUSED]
NO_GRADIENT = r"\.experts\.|\.router\.|\.indexer\.|\.compressor\.|\.encoder_attn\."
"""Of experts that no token chose, of what only ranks experts or tokens, of what needs more tokens, and of what looks at
an encoder that is not there."""


def test_table_is_that_of_the_installed_transformers():
    assert TABLE.read_text(encoding="utf-8") == render()


def test_every_architecture_is_tried_or_left_out_for_a_reason():
    assert set(NOT_BUILT) <= set(CLASSES)
    assert len(KINDS) >= 45
    assert {kind for kind in KINDS if isinstance(found(kind), str)} == REFUSED
    assert {kind for kind in TRAINED if found(kind).batching is Batching.PADDED} >= {"mamba2", "granitemoehybrid"}
    assert architectures.SPECIAL.keys() <= set(KINDS)


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in (9, 5, 12, 7)]
    return [Sample(row, [IGNORE, IGNORE, *row[2:]]) for row in rows]


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(without_dropout(small_config(kind)))
    with torch.no_grad():  # biases and norms that a misplaced tensor would show, and what begins as zero
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def micro_batches(batching: Batching) -> list[MicroBatch]:
    made = samples()
    (plan,) = plan_micro_batches([len(sample.input_ids) for sample in made], 24, batching=batching)
    assert max(map(len, plan)) > 1
    return [collate([made[i] for i in chosen], batching) for chosen in plan]


def nll_of_samples(model: PreTrainedModel, batching: Batching) -> torch.Tensor:
    """(samples,) nats."""
    made = samples()
    (plan,) = plan_micro_batches([len(sample.input_ids) for sample in made], 24, batching=batching)
    nll = torch.zeros(len(made), dtype=torch.float64)
    for chosen in plan:
        batch = collate([made[i] for i in chosen], batching)
        nll.index_add_(0, torch.tensor(chosen)[batch.sample_of_target], token_nll(model, batch).double())
    return nll


def gradients(model: PreTrainedModel, batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    """Of each layer's coefficients, by one step of plain gradient descent, which is undone."""
    layers = dict(osft_layers(model))
    optimizer = torch.optim.SGD([layer.coefficients for layer in layers.values()], lr=1e-3)
    train_step(model.train(), optimizer, batches, num_loss_tokens=20)
    found = {name: layer.coefficients.detach().clone() for name, layer in layers.items()}
    with torch.no_grad():
        for layer in layers.values():
            layer.coefficients.zero_()
            layer.refresh_(0.0)
    return found


@pytest.mark.parametrize("kind", TRAINED)
def test_batches_compute_and_train_what_single_samples_do_and_the_result_is_saved(kind, tmp_path: Path):
    result = found(kind)
    assert isinstance(result, Preflight), result
    model = build(kind)
    model.save_pretrained(tmp_path / "model")

    # Scoring
    with torch.no_grad():
        together = nll_of_samples(model.eval(), result.batching)
        alone = torch.stack([token_nll(model, collate([s], Batching.PADDED)).double().sum() for s in samples()])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)

    # Training
    stored = ModelWeights(CheckpointReader(tmp_path / "model"), empty_model(tmp_path / "model"))
    inject(model, SubspaceConfig(unfreeze_rank_ratio=0.5))
    one_by_one = gradients(model, [collate([sample], Batching.PADDED) for sample in samples()])
    for name, gradient in gradients(model, micro_batches(result.batching)).items():
        scale = one_by_one[name].abs().max()
        torch.testing.assert_close(gradient, one_by_one[name], rtol=1e-3, atol=1e-3 * scale.item(), msg=name)
    learned = [name for name, gradient in one_by_one.items() if gradient.any()]
    assert all(re.search(NO_GRADIENT, name) for name in set(one_by_one) - set(learned))

    # Saving
    with torch.no_grad():
        for _, layer in osft_layers(model):
            layer.coefficients.normal_(std=0.05)
            layer.refresh_(0.0)
        save_merged(model, stored, tmp_path / "tuned")
        tuned = load_model(tmp_path / "tuned", dtype=torch.float32)
        batch = collate(samples()[:1], Batching.PADDED)
        expected, before = (
            token_nll(model.eval(), batch),
            token_nll(load_model(tmp_path / "model", dtype=torch.float32), batch),
        )
        torch.testing.assert_close(token_nll(tuned, batch), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before, expected, atol=1e-3), "nothing was learned, so the test shows nothing"


def test_boundaries_give_what_a_mask_gives_with_samples_longer_than_were_tried():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in (50, 13, 60)]
    batch = collate([Sample(row, row) for row in rows])
    register("osft_test", masked)
    by_kernel = [kind for kind in TRAINED if found(kind).attention]
    assert len(by_kernel) >= 80
    for kind in by_kernel:
        model = build(kind).eval()
        with torch.no_grad():
            expected = token_nll(model, batch)
            set_attention(model.config, "osft_test")
            torch.testing.assert_close(token_nll(model, batch), expected, rtol=1e-4, atol=1e-4, msg=kind)
