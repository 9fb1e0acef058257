"""Statistics measured on samples, compared with what a direct computation gives."""

import copy
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, GPT2Config

from osft.data.chat import Sample
from osft.data.packing import Batching
from osft.settings.subspace import SubspaceConfig
from osft.subspace import calibration, inject, select_targets
from osft.subspace.calibration import measure, sample_tokens
from tests import conftest
from tests.conftest import feeding

VOCABULARY = 48
LENGTHS = (9, 14, 6, 11, 9)


def tiny_llama() -> torch.nn.Module:
    return conftest.tiny_llama(vocab_size=VOCABULARY, tie_word_embeddings=False).eval()


def tiny_gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    return AutoModelForCausalLM.from_config(config).eval()


def texts(lengths=LENGTHS, seed=1) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [Sample(row, row) for row in rows]


def measured(model, samples=None, max_tokens=2048, batching=Batching.PACKED, **settings):
    how = feeding(max_tokens, batching=batching)
    return measure(model, select_targets(model), samples or texts(), feeding=how, **settings)


def moments(statistics):
    """Target -> C, s, S."""
    return {
        target: (each.moment.dense(), each.gradient_energies[target], each.output_moments[target].dense())
        for each in statistics.inputs()
        for target in each.targets
    }


def kl_per_token(before, after, samples) -> float:
    """Mean over all tokens of KL(before || after) of the predicted distributions, in nats; samples of one length."""
    ids = torch.tensor([sample.input_ids for sample in samples])
    with torch.no_grad():
        old, new = (model(ids).logits.double().log_softmax(-1) for model in (before, after))
    return (old.exp() * (old - new)).sum().item() / ids.numel()


def test_input_moments_are_the_mean_over_all_tokens():
    model, samples = tiny_llama(), texts()
    inputs = []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1).detach()))
    for sample in samples:
        model(torch.tensor([sample.input_ids]))
    handle.remove()
    rows = torch.cat(inputs).double()
    found = moments(measured(model))["model.layers.1.mlp.down_proj"][0]
    torch.testing.assert_close(found.double(), rows.T @ rows / sum(LENGTHS), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_layers_with_the_same_input_share_its_moment(build):
    groups = [each.targets for each in measured(build()).inputs()]
    short = [tuple(name.rsplit(".", 1)[-1] for name in group) for group in groups]
    if build is tiny_llama:
        block = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    else:
        block = [("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",)]
    assert short == block * 2


@pytest.mark.parametrize("max_tokens", [14, 30, 2048])
@pytest.mark.parametrize("batching", Batching)
def test_statistics_do_not_depend_on_the_batches(max_tokens, batching):
    model = tiny_llama()
    alone = moments(measured(model, max_tokens=14, batching=Batching.PADDED))
    for target, found in moments(measured(model, max_tokens=max_tokens, batching=batching)).items():
        for value, expected in zip(found, alone[target], strict=True):
            assert (value - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("batching", Batching)
def test_shape_of_output_moments_is_of_drawn_tokens_and_their_size_of_all(monkeypatch, batching):
    model = tiny_llama()
    whole = moments(measured(model))
    monkeypatch.setattr(calibration, "OUTPUT_TOKENS", 12)
    alone = moments(measured(model, max_tokens=14, batching=Batching.PADDED))
    for target, (inputs, energy, outputs) in moments(measured(model, max_tokens=30, batching=batching)).items():
        torch.testing.assert_close((inputs, energy), whole[target][:2])
        assert (outputs - alone[target][2]).norm() <= 1e-5 * outputs.norm(), "the same tokens are drawn"
        assert (outputs - whole[target][2]).norm() > 0.1 * outputs.norm(), "they are not all"
        assert outputs.trace().item() == pytest.approx(len(outputs) * energy.item(), rel=1e-5)


def test_statistics_do_not_depend_on_the_memory():
    model = tiny_llama()
    one_pass, many = moments(measured(model)), moments(measured(model, memory=1))
    for target, found in many.items():
        for value, expected in zip(found, one_pass[target], strict=True):
            assert (value - expected).norm() <= 1e-5 * expected.norm()


def test_layers_in_training_have_the_statistics_of_plain_ones():
    model = tiny_llama()
    plain = moments(measured(model))
    targets = select_targets(model)
    inject(model, SubspaceConfig(unfreeze_rank_ratio=0.5)).train()
    in_training = moments(measure(model, targets, texts(), feeding=feeding()))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(parameter.requires_grad for parameter in model.parameters())
    for target, found in in_training.items():
        for value, expected in zip(found, plain[target], strict=True):
            assert (value - expected).norm() <= 1e-5 * expected.norm()


def test_without_gradients_every_layer_counts_alike():
    for each in measured(tiny_llama(), gradients=False).inputs():
        assert [energy.item() for energy in each.gradient_energies.values()] == [1.0] * len(each.targets)
        assert not each.output_moments


def test_tokens_are_drawn_with_the_models_probabilities():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).repeat(4000, 1)
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    shares = sample_tokens(logits, uniforms).bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("vocabulary", [48, 256, 257, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_is_the_one_in_whose_share_of_the_distribution_the_number_lies(vocabulary, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(400, vocabulary, generator=generator)).to(dtype)
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    ends = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    expected = torch.searchsorted(ends, uniforms[:, None] * ends[:, -1:], right=True)[:, 0].clamp_max(vocabulary - 1)
    assert torch.equal(sample_tokens(logits, uniforms), expected)


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        measure(tiny_llama(), select_targets(tiny_llama()), [], feeding=feeding())


def test_predicted_drift_of_each_layer_is_the_measured_one():
    """Within 10 %, but for the layer before the attention, whose effects on one output add up over positions."""
    model = tiny_gpt2()
    samples = texts((30,) * 150)
    statistics = measured(model, samples)
    generator = torch.Generator().manual_seed(2)
    for each in statistics.inputs():
        for target in each.targets:
            changed = copy.deepcopy(model)
            weight = changed.get_parameter(f"{target}.weight")
            update = torch.randn(weight.shape, generator=generator) * 0.05 * weight.std()
            weight.data += update
            outputs = each.output_moments[target].dense()
            predicted = 0.5 * ((outputs @ update.T @ each.moment.dense()) * update.T).sum().item()
            error = 0.35 if target.endswith("c_attn") else 0.1
            assert predicted == pytest.approx(kl_per_token(model, changed, samples), rel=error), target


def _rank(rank: int, folder: Path, sharded: bool) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = tiny_llama()
    targets = select_targets(model)
    if sharded:
        inject(model, SubspaceConfig(unfreeze_rank_ratio=0.5))
        mesh = init_device_mesh("cpu", (2,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    statistics = measure(model, targets, texts(), feeding=feeding(15, rank=rank, world_size=2))
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.save((moments(statistics), statistics.parts[0]), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_processes_with_unequal_shares_get_the_statistics_of_one(tmp_path, sharded):
    """Five samples in three micro-batches of each of two processes: one has nothing to do in the last of them."""
    multiprocessing.spawn(_rank, args=(tmp_path, sharded), nprocs=2)
    alone = measured(tiny_llama())
    (found, part), (others, same) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert part == same
    assert part.weight_rms == pytest.approx(alone.parts[0].weight_rms, rel=1e-6)
    assert part.mean_curvature == pytest.approx(alone.parts[0].mean_curvature, rel=1e-5)
    assert not others, "only rank 0 decomposes"
    for target, expected in moments(alone).items():
        for value, direct in zip(found[target], expected, strict=True):
            assert (value - direct).norm() <= 1e-5 * direct.norm()
