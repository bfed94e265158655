"""A run's configuration as ``run.toml``: what `edgecompress compress --config` reads, and every run writes of itself.

Paths in the file are relative to the file. In a `Config` they are relative to the working directory, so that the file
and the same options on the command line give one and the same configuration.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from edgecompress.spec import Config

FILE_NAME = "run.toml"
_ALWAYS_PATHS = ("table", "runs", "tensorboard", "pick")
_GRAPH_SUFFIXES = (".onnx", ".pt2")
_KEYWORDS = {"weights": ("default", "none"), "preprocessing": ("auto", "data", "weights")}


def to_toml(config: Config, run: Path) -> str:
    """The text of ``run.toml`` in the folder ``run``: every option that has a value, and the run's own name."""
    lines = [
        "# Made by edgecompress. 'edgecompress compress --config run.toml' runs it; paths are relative to this file."
    ]
    if config.model.startswith("<"):
        lines.append("# The network was handed over in memory: name its package.module:factory as the model.")
    folder = Path(os.path.realpath(run))
    values: dict[str, object] = {"name": run.name, "runs": ".."}
    for key, value in config:
        if isinstance(value, str) and is_path(key, value, Path()):
            value = _seen_from(folder, value)
        values[key] = value
    return "\n".join([*lines, *(f"{key} = {_toml(value)}" for key, value in values.items() if value is not None), ""])


def from_file(key: str, value: str, folder: Path) -> str:
    """The value of option ``key`` as the command line would say it, when a file in ``folder`` says ``value``."""
    if os.path.isabs(value) or not is_path(key, value, folder):
        return value
    whole = os.path.normpath(os.path.join(os.path.realpath(folder), value))
    try:
        return os.path.relpath(whole, os.path.realpath(os.curdir))
    except ValueError:  # another drive
        return whole


def is_path(key: str, value: str, folder: Path) -> bool:
    """Whether ``value`` names a file or folder; one without a separator counts as data only if it is in ``folder``."""
    if key in _ALWAYS_PATHS:
        return True
    if key in _KEYWORDS:
        return value.lower() not in _KEYWORDS[key]
    if key == "model":
        return value.lower().endswith(_GRAPH_SUFFIXES) or ("/" in value and ":" not in value)
    if key != "data" or (":" in value and not os.path.isabs(value)):
        return False
    return (
        "/" in value or os.sep in value or value in (".", "..") or ((folder / value).is_dir() and not _built_in(value))
    )


def _built_in(name: str) -> bool:
    from edgecompress.data import BUILT_IN

    return name in BUILT_IN


def _seen_from(folder: Path, value: str) -> str:
    """A path relative to the working directory, relative to ``folder``; an absolute one stays."""
    if os.path.isabs(value):
        return value
    try:
        return os.path.relpath(os.path.join(os.path.realpath(os.curdir), value), folder)
    except ValueError:
        return os.path.abspath(value)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL and for characters beyond the first plane.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    assert isinstance(value, tuple)
    return f"[{', '.join(_toml(item) for item in value)}]"
