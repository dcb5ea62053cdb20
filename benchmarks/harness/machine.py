# SPDX-License-Identifier: Apache-2.0
"""The machine that a benchmark runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe_machine() -> dict[str, str | int | float]:
    """Return processor, cores, memory, system and load, as results record them."""
    facts: dict[str, str | int | float] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
    }
    libc = " ".join(part for part in platform.libc_ver() if part)
    if libc:
        facts["libc"] = libc
    memory = _memory_bytes()
    if memory:
        facts["memory_gib"] = round(memory / 2**30, 1)
    if hasattr(os, "getloadavg"):
        facts["load_before"] = load()
    return facts


def load() -> float:
    """Return the load of the last minute; NaN if the system does not report it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: use the platform module
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
