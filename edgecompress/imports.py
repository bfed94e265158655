"""A user's own object by name: ``package.module:attribute`` from the working directory or an installed package."""

from __future__ import annotations

import importlib
import sys
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
            f"Cannot import the {what} '{name}': {type(error).__name__}: {error}. Run from the folder that holds it."
        ) from error
