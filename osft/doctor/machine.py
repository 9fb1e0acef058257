"""This machine: Python and the packages, GPUs and their kernels, memory and disk."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from rich.filesize import decimal

from osft.doctor.finding import Finding, error, ok, warning
from osft.doctor.subject import Subject
from osft.process.memory import memory_available
from osft.storage.client import scratch_path

_SMALL_MEMORY, _SMALL_DISK = 8e9, 10e9
"""Bytes. A round of a 135M model took 5 GB of memory on two CPU cores."""


def check_packages(subject: Subject) -> Iterator[Finding]:
    """Is each package there that osft needs, in a release that it knows?"""
    yield ok("Python", f"{platform.python_version()} on {platform.platform()}")
    wrong, missing_extras = [], set()
    for line in importlib.metadata.requires("osft") or []:
        requirement = Requirement(line)
        extra = _extra_of(requirement)
        if extra == "dev":
            continue
        installed = _installed(requirement.name)
        if installed is None and extra:
            missing_extras.add(extra)
        elif installed is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} is {installed}, and {requirement.specifier} is needed")
    if wrong:
        yield error("packages", "; ".join(wrong), "pip install 'osft[all]' (make setup in a checkout)")
    else:
        yield ok("packages", f"osft {importlib.metadata.version('osft')} has all that it needs, in releases it knows")
    if missing_extras:
        yield ok(
            "extras", f"not installed: {', '.join(sorted(missing_extras))} (pip install 'osft[NAME]' where needed)"
        )


def _extra_of(requirement: Requirement) -> str:
    """The extra that a requirement belongs to; "" for one of osft itself."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return ""
    names = importlib.metadata.metadata("osft").get_all("Provides-Extra") or []
    return next((name for name in names if requirement.marker.evaluate({"extra": name})), "")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_gpus(subject: Subject) -> Iterator[Finding]:
    """Does torch see the GPUs, in a build that has code for them? Is Liger there?"""
    import torch

    built = torch.version.cuda
    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists():
            reason = (
                "torch has no CUDA" if built is None else f"torch is built for CUDA {built}, and finds no driver for it"
            )
            remedy = "Install the CUDA build of torch, and a driver that is new enough (nvidia-smi)"
            yield error("GPUs", f"there is one here, and torch {torch.__version__} does not use it: {reason}", remedy)
        else:
            yield ok("GPUs", f"none here; torch {torch.__version__} computes on {os.cpu_count()} CPUs")
        return
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        capability = f"sm_{device.major}{device.minor}"
        about, memory = f"GPU {number}", decimal(device.total_memory)
        same_major = [one for one in torch.cuda.get_arch_list() if one.startswith(f"sm_{device.major}")]
        if same_major:
            yield ok(about, f"{device.name}, {memory}, {capability}, CUDA {built}")
        else:
            built_for = ", ".join(torch.cuda.get_arch_list())
            text = f"{device.name} is {capability}, and torch {torch.__version__} has code for {built_for}"
            yield error(about, text, "Install a build of torch that has code for it")
    if importlib.util.find_spec("liger_kernel") is None:
        yield warning(
            "Liger", "is not installed: norms and MLPs run without fused kernels", "pip install 'osft[liger]'"
        )
    else:
        yield ok("Liger", f"{importlib.metadata.version('liger-kernel')} is used on these GPUs")


def check_memory(subject: Subject) -> Iterator[Finding]:
    """Are there memory and disk for a model?"""
    available = memory_available()
    if available < _SMALL_MEMORY:
        text = f"{decimal(available)} available; a round of a 135M model takes 5 GB"
        yield warning("memory", text, "End other programs, raise the container's limit, or use a larger machine")
    else:
        yield ok("memory", f"{decimal(available)} available")
    folder = scratch_path()
    there = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(there).free
    if free < _SMALL_DISK:
        remedy = "Free some, or set OSFT_SCRATCH to a folder on a larger disk"
        yield warning("scratch folder", f"{folder} has {decimal(free)} free", remedy)
    else:
        yield ok("scratch folder", f"{folder} has {decimal(free)} free")
