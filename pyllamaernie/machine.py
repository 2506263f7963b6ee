"""What this machine has for the process: processors, free memory, and the files that the build installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def free_memory_bytes() -> int:
    """What the system could give to this process now."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 8 << 30


def n_cpu() -> int:
    """CPUs that this process may use."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:
        return os.cpu_count() or 1


def installed(name: str) -> Path:
    """Where the build put a file or folder (`bin`, `data`, `licenses`): beside the compiled module.

    In an editable installation that is not where the sources are.
    """
    found = importlib.util.find_spec("pyllamaernie._core")
    home = Path(__file__) if found is None or found.origin is None else Path(found.origin)
    return home.parent / name
