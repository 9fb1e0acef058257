"""Functions of MKL's vector library: the first call of a process gives what every other call gives."""

import subprocess
import sys

import pytest
import torch

from osft.process.vector_math import _FUNCTIONS, settle_vector_math

PROCESSES = 16
"""Without `settle_vector_math` one in four is wrong on a Xeon: all are right then in one case of 100."""
COSINES = """
import torch
from osft.process.vector_math import settle_vector_math
settle_vector_math()
angles = torch.linspace(0, 70, 27_008)
first = torch.cos(angles)
assert torch.equal(first, torch.cos(angles)), (first - torch.cos(angles)).abs().max()
"""
IMPORTED = """
import {module}
from osft.process.vector_math import settle_vector_math
assert settle_vector_math.cache_info().currsize == 1
"""


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_each_function_is_called_once_by_one_thread(dtype, monkeypatch):
    called = []

    def noted(name):
        function = getattr(torch, name)

        def call(number):
            assert number.numel() == 1
            called.append((name, number.dtype))
            return function(number)

        return call

    for name in _FUNCTIONS:
        monkeypatch.setattr(torch, name, noted(name))
    settle_vector_math.cache_clear()
    settle_vector_math()
    settle_vector_math()
    assert [name for name, of in called if of == dtype] == list(_FUNCTIONS)


@pytest.mark.slow
def test_first_cosines_of_a_process_are_right():
    for _ in range(PROCESSES):
        run(COSINES)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["osft.models.loading", "osft.models.likelihood", "osft.subspace"])
def test_whoever_computes_with_a_model_has_made_the_first_calls(module):
    run(IMPORTED.format(module=module))
