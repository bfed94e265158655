"""A user's own object by name: ``package.module:attribute`` from the working directory or an installed package."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any

from edgecompress.errors import UsageError


def imported(name: str, what: str, error_kind: type[UsageError]) -> Any:
    """Import ``name``.

    Args:
        name: ``package.module:attribute``.
        what: what it stands for, for example ``"data factory"``.
        error_kind: raised with one sentence when the import fails.
    """
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    importlib.invalidate_caches()
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise error_kind(
            f"Cannot import the {what} '{name}': {type(error).__name__}: {error}{place_of(error)}. "
            "Run from the folder that holds it."
        ) from error


def place_of(error: BaseException) -> str:
    """`` (file.py, line 7)``: the innermost line of the user's own code that ``error`` passed through; else nothing."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and frame.filename[:1] != "<"]
    library = importlib.import_module("edgecompress").__path__[0]
    own = [frame for frame in own if not frame.filename.startswith((library, importlib.__path__[0]))]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
