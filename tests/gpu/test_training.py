"""Steps of the real training loop on CUDA: the losses of the CPU, and the memory of the dry run."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

from osft.data.chat import Sample
from osft.data.packing import Feeding, collate
from osft.data.samples import SampleList
from osft.models.likelihood import token_nll
from osft.settings.training import TrainConfig
from osft.subspace import factor_store, select_targets
from osft.subspace.calibration import measure
from osft.subspace.preflight import preflight
from osft.training.liger import apply_liger
from osft.training.loop import make_optimizer, train_step
from osft.training.plan import plan
from osft.training.sharded_model import load_sharded
from tests.conftest import feeding, tiny_llama, write_jsonl
from tests.gpu.models import FAMILIES, build, texts

pytestmark = pytest.mark.gpu

STEPS = 10
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Callable[[str, str], TrainConfig]:
    """By family and what is protected: settings whose factors were computed on the CPU, for both devices."""
    root = tmp_path_factory.mktemp("gpu-training")

    @cache
    def made(family: str, protect: str) -> TrainConfig:
        folder = root / family
        model = build(family)
        if not folder.exists():
            model.save_pretrained(folder)
        config = TrainConfig(
            model_path=str(folder),
            data_path="unused",
            ckpt_output_dir="unused",
            protect=protect,
            unfreeze_rank_ratio=0.25,
            effective_batch_size=12,
            max_tokens_per_gpu=256,
            max_seq_len=64,
            learning_rate=2e-3,
            dtype="float32",
        )
        store = {"store": root / "factors", "device": "cpu"}
        if protect == "weights":
            factors = factor_store.precompute(folder, config=config.subspace, **store)
        else:
            statistics = measure(model, select_targets(model), texts(seed=2), feeding=feeding())
            factors = factor_store.precompute_by_inputs(
                folder, config=config.subspace, statistics=statistics, statistics_file="", **store
            )
        return config.replace(factors=str(factors.path))

    return made


def loaded(config: TrainConfig, device: torch.device) -> nn.Module:
    """The model, as the worker loads it."""
    found = preflight(config.model_path, attn_implementation=config.attn_implementation)
    how = {"device": device, "attention": found.attention, "loss_head": found.loss_head}
    return load_sharded(config, config.model_path, config.factors, **how)[0]


def losses(
    config: TrainConfig, device: torch.device, prepare: Callable[[nn.Module], None] = lambda model: None
) -> list[float]:
    """Nats per loss token of each step; every step takes the same samples, packed into several micro-batches."""
    model = loaded(config, device)
    prepare(model)
    model.train()
    optimizer = make_optimizer(model, config, fused=True)
    samples = SampleList(texts())
    feeding = Feeding(max_tokens=config.max_tokens_per_gpu, device=device)
    batches = [batch for _, batch in feeding.batches(samples)]
    assert len(batches) > 1
    num_loss_tokens = sum(len(batch.targets) for batch in batches)
    found = []
    for _ in range(STEPS):
        loss_sum, _, _ = train_step(
            model, optimizer, batches, num_loss_tokens=num_loss_tokens, max_grad_norm=config.max_grad_norm
        )
        found.append(loss_sum.item() / num_loss_tokens)
    return found


@pytest.mark.parametrize("protect", ["weights", "activations"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_cpu(settings, device, family, protect):
    config = settings(family, protect)
    found = losses(config, device)
    assert found == pytest.approx(losses(config, CPU), rel=1e-4)
    assert found[-1] < found[0] - 0.005, "nothing was learned, so the test shows nothing"


@pytest.mark.parametrize("protect", ["weights", "activations"])
def test_bfloat16_ends_where_float32_does(settings, device, protect):
    config = settings("llama", protect)
    exact, rounded = losses(config, device), losses(config.replace(dtype="bfloat16"), device)
    assert rounded[-1] < rounded[0] - 0.005
    assert rounded[-1] == pytest.approx(exact[-1], rel=0.02)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_liger_changes_nothing_but_the_time(settings, device, monkeypatch, dtype, tolerance):
    pytest.importorskip("liger_kernel")
    if device.type != "cuda":
        pytest.skip("Liger's kernels need CUDA")
    from transformers.models.llama import modeling_llama

    config = settings("llama", "weights").replace(dtype=dtype)
    without = losses(config, device)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # which Liger replaces for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    assert losses(config, device, prepare=apply_liger) == pytest.approx(without, rel=tolerance)


@pytest.mark.parametrize("protect", ["weights", "activations"])
def test_gradient_checkpointing_changes_no_loss(settings, device, protect):
    config = settings("llama", protect)
    found = losses(config.replace(gradient_checkpointing=True), device)
    assert found == pytest.approx(losses(config, device), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_do_not_see_each_other(settings, device, family):
    config = settings(family, "weights")
    model = loaded(config, device)
    samples = texts()
    with torch.no_grad():
        packed = token_nll(model.eval(), collate(samples).to(device))
        alone = torch.cat([token_nll(model, collate([sample]).to(device)) for sample in samples])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["kept", "recomputed"])
def test_peak_memory_is_that_of_the_dry_run(device, tmp_path, gradient_checkpointing):
    tokens, folder = 4096 if device.type == "cuda" else 32, tmp_path / "model"
    model = tiny_llama(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=4, vocab_size=8192, max_position_embeddings=tokens
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    row = [1] * (tokens // 4)
    config = TrainConfig(
        model_path=str(folder),
        data_path=str(write_jsonl(tmp_path / "texts.jsonl", [{"input_ids": row, "labels": row}] * 8)),
        use_processed_dataset=True,
        ckpt_output_dir="unused",
        unfreeze_rank_ratio=0.25,
        effective_batch_size=8,
        max_tokens_per_gpu=tokens,
        max_seq_len=len(row),
        learning_rate=1e-4,
        dtype="bfloat16",
        gradient_checkpointing=gradient_checkpointing,
        nproc_per_node=1,
    )
    (estimate,) = [each for each in plan(config).memory if each.gpus == 1]
    lines = {line.name: line.bytes for line in estimate.lines if line.name != "allowance"}  # what tensors take
    factors = factor_store.precompute(folder, tmp_path / "factors", config.subspace, device=device.type).path
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    trained = loaded(config.replace(factors=str(factors)), device)
    optimizer = make_optimizer(trained.train(), config, fused=True)
    batches = [collate([Sample(row, row)] * 4).to(device)] * 2  # in the second one gradients are there from the first
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        train_step(trained, optimizer, batches, num_loss_tokens=2 * len(batches[0].targets))
    if device.type != "cuda":
        pytest.skip("only CUDA's allocator tells its peak")
    peak = torch.cuda.max_memory_allocated() - before
    print(f"\npeak {peak / 2**20:,.0f} MiB, estimate {sum(lines.values()) / 2**20:,.0f} MiB: {lines}")
    assert peak == pytest.approx(sum(lines.values()), rel=0.25)
