"""What this machine has left: memory, counted with the limit that a container sets; and giving some of it back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path


def memory_bytes() -> tuple[int, int] | None:
    """All memory and what is free of it, of the machine; None where the system does not say."""
    kilobytes = {line.split(":")[0]: line.split()[1] for line in _text("/proc/meminfo").splitlines() if ":" in line}
    if "MemTotal" not in kilobytes:
        return None
    return int(kilobytes["MemTotal"]) * 1024, int(kilobytes.get("MemAvailable", 0)) * 1024


def memory_limit_bytes() -> int | None:
    """What the control group of this process may use; None if it has no limit."""
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    return int(limit) if limit.isdigit() else None


def free_memory_bytes() -> int:
    """Memory that this process may still take; 4 GB where the system does not say."""
    known = memory_bytes()
    free = 4_000_000_000 if known is None else known[1]
    limit, used = memory_limit_bytes(), _text("/sys/fs/cgroup/memory.current").strip()
    return free if limit is None or not used.isdigit() else min(free, limit - int(used))


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not say."""
    pages = _text("/proc/self/statm").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else 0


def give_memory_back() -> None:
    """Hand memory that is free inside this process back to the system, where the C library can (glibc).

    Networks of many sizes that come and go leave gaps in its heap, which then holds much more than is used.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    import ctypes

    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # musl has none
        return None
