"""How an artifact reaches its folder: a place that can be written, and its row in ``export.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgecompress.errors import BadFileError, UsageError
from edgecompress.exporters import verify
from edgecompress.files import read_json, write_bytes
from edgecompress.spec import Artifact

RECORD = "export.json"


def check_place(path: Path) -> None:
    """Refuse a path that cannot become a file, before any work is done for it.

    Raises:
        UsageError: it is a folder, or its folder cannot be made or written.
    """
    if path.is_dir():
        raise UsageError(f"Cannot write {path}: it is a folder. Name a file.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"Cannot write {path}: {folder} is no folder that you may write to. Name another place.")


def recorded(folder: Path) -> dict[str, Any]:
    """What ``export.json`` of ``folder`` says, by format; nothing where there is none.

    Raises:
        BadFileError: it is no record.
    """
    path = folder / RECORD
    known = read_json(path, "export record") if path.exists() else {}
    if not isinstance(known, dict):
        raise BadFileError(
            f"The export record {path} is broken: it holds no formats by name. Delete it, then export again."
        )
    return known


def as_record(known: Mapping[str, Any], format_name: str, artifact: Artifact) -> bytes:
    """The content of ``export.json`` with the artifact's row beside those in ``known``."""
    rows = {**known, format_name: artifact.model_dump(mode="json")}
    return (json.dumps(rows, indent=1) + "\n").encode()


def record_engine(folder: Path, source: Artifact, built: Mapping[str, Any]) -> Artifact:
    """Write an engine that was built here beside its ONNX file ``source`` into ``export.json``; ``built`` is engine.json."""
    checks: dict[str, verify.Value] = {
        f"engine_{key}": value for key, value in (built["check"] or {"checked": False}).items() if value is not None
    }
    checks["engine_precisions"] = ", ".join(f"{count} {name}" for name, count in built["precisions"].items())
    checks["engine_median_us"] = built["latency"]["gpu"]["median_us"]
    engine = source.model_copy(
        update={
            "path": str(Path(source.path).with_name("model.engine")),
            "format": "engine",
            "sha256": built["engine_sha256"],
            "size_bytes": built["size_bytes"],
            "oldest_runtime": f"{built['product']} {built['tensorrt']} on {built['gpu']}, no other",
            "checks": checks,
        }
    )
    write_bytes(folder / RECORD, as_record(recorded(folder), "engine", engine))
    return engine
