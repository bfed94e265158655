"""What identifies the machine that a table is measured on, and the state it is in."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine_facts() -> dict[str, str]:
    """What identifies this machine and its state: CPU, the instructions that matter, cores, kernel, governor, load."""
    info = _cpu_info()
    flags = (info.get("flags") or info.get("Features") or "").split()
    wanted = (
        "avx2",
        "avx512f",
        "avx512_vnni",
        "avx_vnni",
        "avx512_bf16",
        "amx_int8",
        "asimd",
        "asimddp",
        "fphp",
        "i8mm",
        "sve",
    )
    name = info.get("model name") or _text_of("/proc/device-tree/model") or platform.processor() or platform.machine()
    return {
        "cpu": name,
        "cpu_model": "/".join(info.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "flags": " ".join(flag for flag in wanted if flag in flags),
        "cores": str(os.cpu_count() or 1),
        "kernel": platform.release(),
        "governor": _text_of("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "load": " ".join(f"{value:.2f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown",
    }


def device_id() -> str:
    """A short name that is equal on equal CPUs: ``amd-epyc-25-17-1-avx512_vnni``."""
    facts = machine_facts()
    best = next(
        (
            flag
            for flag in ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "i8mm", "asimddp")
            if flag in facts["flags"].split()
        ),
        "",
    )
    text = f"{facts['cpu']} {facts['cpu_model']} {best}".lower()
    return "-".join("".join(c if c.isalnum() or c == "_" else " " for c in text).split())


def _cpu_info() -> dict[str, str]:
    text = _text_of("/proc/cpuinfo")
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""
