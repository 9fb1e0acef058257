"""The memory that there is."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup/memory.max")


def memory_available() -> int:
    """Bytes that this process may still take: the system's, or the container's if that is less."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines() if Path("/proc/meminfo").exists() else []
    system = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    system = system or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP.read_text(encoding="utf-8").strip() if _CGROUP.is_file() else "max"
    if limit == "max":
        return system
    used = int((_CGROUP.parent / "memory.current").read_text(encoding="utf-8"))
    return min(system, int(limit) - used)
