"""What this machine can do for edgecompress: versions, CPU, memory, GPU, runtimes, latency table, cache.

Nothing is imported here that may be missing: a doctor must be able to see a patient who cannot walk.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from edgecompress.machine import memory_bytes, memory_limit_bytes

Status = Literal["ok", "missing", "problem", "info"]
PYTHONS = ((3, 11), (3, 13))
LOW_DISK_BYTES = 2 * 10**9
# What a package is imported as, where that is not its name with underscores.
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL"}
DOT_PRODUCT = {
    "avx512_vnni": "VNNI (AVX-512)", "avx_vnni": "VNNI (AVX)", "amx_int8": "AMX int8", "asimddp": "dot product",
    "i8mm": "int8 matrix multiply",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``fix`` is the command or step that mends it; only a required one fails a checkup."""

    group: str
    name: str
    status: Status
    found: str
    fix: str = ""
    required: bool = False

    @property
    def failed(self) -> bool:
        """Whether edgecompress cannot work like this."""
        return self.required and self.status in ("missing", "problem")


@dataclass(frozen=True)
class Checkup:
    """All findings, in the order in which they are shown."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether everything that is required is there."""
        return not any(finding.failed for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {"healthy": self.healthy, "findings": [asdict(finding) for finding in self.findings]}


def examine() -> Checkup:
    """Look at everything; a look that fails is itself a finding."""
    findings: list[Finding] = []
    for group, look in LOOKS.items():
        try:
            findings += look()
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            findings.append(Finding(group, "look", "problem", f"cannot be looked at ({text})"))
    return Checkup(tuple(findings))


# ------------------------------------------------------------------------------------------------------- software


def _python() -> list[Finding]:
    first, last = (".".join(map(str, version)) for version in PYTHONS)
    fits = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    return [
        Finding("software", "edgecompress", "ok", _version("edgecompress") or "not installed as a package"),
        Finding(
            "software", "Python", "ok" if fits else "problem", platform.python_version(),
            "" if fits else f"use Python {first} to {last}", required=True,
        ),
    ]  # fmt: skip


def _packages() -> list[Finding]:
    """Every required package: installed, young enough, and really importable."""
    return [_package(line) for line in metadata.requires("edgecompress") or () if "extra ==" not in line]


def _package(line: str) -> Finding:
    requirement = line.partition(";")[0].strip()
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    found = _version(name)
    install = f"pip install '{requirement}'"
    if found is None:
        return Finding("software", name, "missing", "not installed", install, required=True)
    if not _satisfies(found, requirement):
        wanted = requirement.removeprefix(name)
        return Finding("software", name, "problem", f"{found}, needs {wanted}", install, required=True)
    error = _import_error(MODULES.get(name, name.replace("-", "_")))
    if error:
        again = f"pip install --force-reinstall '{requirement}'"
        return Finding("software", name, "problem", f"{found} cannot be imported: {error}", again, required=True)
    return Finding("software", name, "ok", found, required=True)


def _satisfies(found: str, requirement: str) -> bool:
    try:
        from packaging.requirements import Requirement
    except ImportError:  # comes with several of our packages, but is none that we ask for
        return True
    return Requirement(requirement).specifier.contains(found, prereleases=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str:
    """Why ``module`` cannot be imported; empty if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


# ------------------------------------------------------------------------------------------------------- hardware


def _hardware() -> list[Finding]:
    from edgecompress.latency_tables.agent import machine_facts

    facts = machine_facts()
    flags = facts["flags"].split()
    dot = [text for flag, text in DOT_PRODUCT.items() if flag in flags]
    without = "none of VNNI, AMX, dot product: int8 files run, but slower, and x86 kernels may saturate"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [
        Finding("hardware", "CPU", "info", f"{facts['cpu']} ({platform.machine()})"),
        Finding("hardware", "integer instructions", "info", ", ".join(dot) or without),
        Finding("hardware", "cores", "info", f"{usable} usable of {facts['cores']}, governor {facts['governor']}"),
        Finding("hardware", "memory", "info", _memory()),
    ]


def _memory() -> str:
    known, limit = memory_bytes(), memory_limit_bytes()
    if known is None:
        return "not known"
    held = f", this process may use {_gb(limit)}" if limit is not None else ""
    return f"{_gb(known[0])}, {_gb(known[1])} free{held}"


def _gpu() -> list[Finding]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    boards = (
        [line.strip() for line in done.stdout.splitlines() if line.strip()] if done and done.returncode == 0 else []
    )
    jetson = _text("/etc/nv_tegra_release").splitlines()
    if jetson:
        boards.append(f"Jetson, {jetson[0].lstrip('# ')}")
    if boards:
        return [Finding("hardware", "GPU and driver", "ok", "; ".join(boards))]
    why = " (nvidia-smi fails)" if done is not None and done.returncode else ""
    return [
        Finding(
            "hardware", "GPU and driver", "missing",
            f"no NVIDIA GPU{why}; only building a TensorRT engine needs one, on the device that runs it",
        )
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------- runtimes, exporters


def _runtimes() -> list[Finding]:
    return [
        _onnx_runtime(),
        _optional("runtimes", "TensorRT", "tensorrt", "tensorrt", "builds engines on a machine with the target's GPU"),
        _optional(
            "runtimes", "TensorRT-RTX", "tensorrt_rtx", "tensorrt-check", "checks without a GPU that TensorRT accepts files"
        ),
    ]  # fmt: skip


def _onnx_runtime() -> Finding:
    error = _import_error("onnxruntime")
    if error:
        cure = "pip install --force-reinstall onnxruntime"
        return Finding("runtimes", "ONNX Runtime", "missing", f"cannot be imported: {error}", cure, required=True)
    import onnxruntime

    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    return Finding("runtimes", "ONNX Runtime", "ok", f"{onnxruntime.__version__} ({providers})", required=True)


def _extras() -> list[Finding]:
    return [
        _optional("extras", "timm", "timm", "timm", "models by timm:NAME"),
        _optional("extras", "TensorBoard", "tensorboard", "tensorboard", "compress --tensorboard"),
    ]


def _optional(group: str, name: str, module: str, extra: str, use: str) -> Finding:
    """An extra of ours: present and importable, or the command that installs it."""
    install = f"pip install 'edgecompress[{extra}]'"
    if importlib.util.find_spec(module) is None:
        return Finding(group, name, "missing", f"not installed; {use}", install)
    error = _import_error(module)
    if error:
        return Finding(group, name, "problem", f"cannot be imported: {error}", install)
    return Finding(group, name, "ok", str(getattr(sys.modules[module], "__version__", "installed")))


def _exporters() -> list[Finding]:
    from edgecompress.exporters.formats import EXPORTERS

    notes = {
        "tensorrt": "writes the ONNX and build_on_device.py; the engine is built on the device",
        "ncnn": "writes and proves with edgecompress[ncnn]",
        "executorch": "writes and proves with edgecompress[executorch]",
        "litert": "writes and proves with edgecompress[litert]",
    }
    runtime = _onnx_runtime()  # every file is proven in it
    if runtime.failed:
        about = "cannot prove what it writes: ONNX Runtime is missing"
        return [Finding("exporters", name, "problem", about, runtime.fix) for name in EXPORTERS]
    return [Finding("exporters", name, "ok", notes.get(name, "writes and proves")) for name in EXPORTERS]


# ---------------------------------------------------------------------------------------------- latency table, disk


def _tables() -> list[Finding]:
    """Whether the cache holds a table that was measured on this very machine and runtime."""
    from edgecompress.latency_tables.predict import find_table, tables_folder
    from edgecompress.latency_tables.targets import all_targets, is_this_machine

    here = [target for target in all_targets().values() if is_this_machine(target)]
    if not here:
        return [Finding("latency", "table", "info", "this machine is none of the targets: latencies are estimated")]
    findings = []
    for target in here:
        profile = f"edgecompress profile --target {target.name} --model resnet8"
        others = len(list(tables_folder().glob(f"{target.name}--*.csv")))
        table = find_table(target)
        if table is not None and table.usable:
            about = (
                f"{len(table.usable)} kernels measured on this machine with {table.provenance.setting.runtime_version}"
            )
            findings.append(Finding("latency", target.name, "ok", about))
        elif others:
            about = f"{others} in the cache, none of this CPU, runtime version and one thread: latencies are estimated"
            findings.append(Finding("latency", target.name, "problem", about, profile))
        else:
            findings.append(Finding("latency", target.name, "missing", "no table: latencies are estimated", profile))
    return findings


def _disk() -> list[Finding]:
    from edgecompress.files import cache_folder

    mend = "free some space, or name another folder with EDGECOMPRESS_CACHE"
    try:
        cache = cache_folder()
        with tempfile.NamedTemporaryFile(dir=cache):
            pass
    except OSError as error:
        return [Finding("disk", "cache", "problem", f"cannot be written: {error}", mend, required=True)]
    findings = [Finding("disk", "cache", "ok", f"{cache} can be written", required=True)]
    for name, folder in (("free for the cache", cache), ("free here", Path.cwd())):
        free = shutil.disk_usage(folder).free
        low = free < LOW_DISK_BYTES
        findings.append(Finding("disk", name, "problem" if low else "ok", _gb(free), mend if low else ""))
    return findings


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


LOOKS: dict[str, Callable[[], list[Finding]]] = {
    "python": _python,
    "software": _packages,
    "hardware": _hardware,
    "gpu": _gpu,
    "runtimes": _runtimes,
    "exporters": _exporters,
    "extras": _extras,
    "latency": _tables,
    "disk": _disk,
}
