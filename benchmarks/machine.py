"""What measurements depend on besides the code: the machine, its packages, and the memory that this process holds."""

import ctypes
import gc
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, cores, GPU (with device `cuda`) and the versions of what computes."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = models[0].partition(":")[2].strip() if models else processor
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        **{package: version(package) for package in ("torch", "transformers", "peft")},
    }


def resident() -> dict[str, int]:
    """Resident bytes of this process: now, their peak, and what of them is mapped files (the kernel can drop those)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM", "RssFile"))}
    return {name: 1024 * int(value) for name, value in values.items()}


def return_freed_memory() -> None:
    """Give what was freed back to the kernel, so that `resident` does not count it."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def allocated_memory(device: str) -> int:
    """Bytes that tensors hold on a GPU, or that the process holds on a CPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else resident()["VmRSS"]


def reset_peak_memory(device: str) -> None:
    """Begin anew with the peak of `allocated_memory`."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """The peak of `allocated_memory` since `reset_peak_memory`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident()["VmHWM"]
