"""What this machine has left: memory, counted with the limit that a container sets."""

from __future__ import annotations

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
