"""Where the tests run: `make test-gpu` on a CUDA GPU. GPU_TESTS_DEVICE=cpu tries the tests themselves without one."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def device() -> Iterator[torch.device]:
    """The device that is compared with the CPU, computing in full float32."""
    name = os.environ.get("GPU_TESTS_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU here")
    before = torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield torch.device(name)
    torch.backends.cuda.matmul.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])
