"""Attention of packed samples without a mask: the real kernels against SDPA, and what a step asks of the host."""

import importlib.util

import pytest
import torch

from osft.data.chat import Sample
from osft.data.packing import collate
from osft.models.likelihood import token_nll
from osft.models.packed_attention import KERNELS, AttentionShape, disagreement, use_kernel
from osft.subspace.model import inject
from osft.subspace.preflight import preflight
from osft.training.loop import make_optimizer, train_step
from tests.conftest import tiny_llama
from tests.training.test_distillation import settings

pytestmark = pytest.mark.gpu

SHAPES = {
    "plain": AttentionShape(heads=8, key_value_heads=8, head_size=64, value_size=64, scale=0.125, window=0),
    "grouped": AttentionShape(heads=32, key_value_heads=8, head_size=128, value_size=128, scale=128**-0.5, window=0),
    "window": AttentionShape(heads=4, key_value_heads=2, head_size=64, value_size=64, scale=0.125, window=4),
    "narrow-values": AttentionShape(heads=4, key_value_heads=4, head_size=192, value_size=128, scale=0.07, window=0),
    "wide": AttentionShape(heads=4, key_value_heads=1, head_size=256, value_size=256, scale=0.0625, window=0),
}
TOKENS = 16384


@pytest.fixture
def cuda(device) -> torch.device:
    if device.type != "cuda" or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernels need a GPU of the Ampere generation or newer")
    return device


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("implementation", KERNELS, ids=lambda each: each.package)
def test_kernel_gives_what_sdpa_with_a_mask_gives(cuda, implementation, shape, dtype):
    if importlib.util.find_spec(implementation.package.partition(".")[0]) is None:
        pytest.skip(f"{implementation.package} is not installed")
    assert disagreement(implementation.kernel, [shape], dtype=dtype, device=cuda) == ""


def packed_rows(tokens: int) -> list[Sample]:
    row = [token % 250 for token in range(tokens // 8)]
    return [Sample(row, row)] * 8


def model_on(device: torch.device, folder) -> torch.nn.Module:
    model = tiny_llama(hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=TOKENS)
    model.config.save_pretrained(folder)
    return model.to(device, torch.bfloat16)


def test_losses_are_those_of_a_mask_and_no_memory_grows_with_the_square_of_the_tokens(cuda, tmp_path):
    model = model_on(cuda, tmp_path)
    batch = collate(packed_rows(2048)).to(cuda)
    expected = token_nll(model, batch).detach()
    assert use_kernel(model, preflight(tmp_path).attention, cuda) is not None
    torch.testing.assert_close(token_nll(model, batch).detach(), expected, rtol=2e-2, atol=2e-2)
    peaks = []
    for tokens in (TOKENS // 2, TOKENS):
        rows = collate(packed_rows(tokens)).to(cuda)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        token_nll(model, rows).sum().backward()
        model.zero_grad(set_to_none=True)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.2 * peaks[0]


def test_step_does_not_wait_for_the_device(device, tmp_path):
    config = settings(max_tokens_per_gpu=2048)
    model = inject(model_on(torch.device("cpu"), tmp_path).float(), config.subspace).to(device, torch.bfloat16).train()
    if device.type == "cuda":
        assert use_kernel(model, preflight(tmp_path).attention, device) is not None
    optimizer = make_optimizer(model, config, fused=True)

    def step() -> torch.Tensor:
        batches = [collate(packed_rows(2048)).to(device) for _ in range(2)]
        return train_step(model, optimizer, batches, num_loss_tokens=4080, max_grad_norm=1.0)[0]

    step()  # moments are made, kernels loaded
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
